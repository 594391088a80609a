"""The life of a small language model from one command, on what comes with Python.

    python recipes/lifecycle.py
    python recipes/lifecycle.py --from pretrain
    python recipes/lifecycle.py --output_dir runs/mine --pretrain.trainer.max_steps 2000

Each stage is the recipe of its name with a config of its own, and resumes where it was stopped.
``--STAGE.SETTING VALUE`` changes a setting of one stage.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path

import evaluate
import ppo
import pretrain
import reward
import sft
import tokenizer

from lit_llm.console import recipe
from lit_llm.errors import UserError

MARGIN = 0.15  # by which the model must beat the unigram model and gzip, in bits per byte
WELL_FORMED = 0.8  # share of held-out questions that must be answered in form and with an end
STAGES = {
    "tokenizer": tokenizer.main,
    "pretrain": pretrain.main,
    "sft": sft.main,
    "reward": reward.main,
    "ppo": ppo.main,
    "evaluation": evaluate.main,
}
CONFIGS = Path(__file__).parent / "configs" / "lifecycle"


@recipe
def main(args: list[str] | None = None) -> None:
    """Run the stages in order, each on what the one before it left."""
    names = list(STAGES)
    parser = ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="--STAGE.SETTING VALUE changes a setting of one stage: --sft.trainer.max_steps 500",
        formatter_class=ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", default="runs/lifecycle", help="Folder of all stages.")
    for name, default in (("from", names[0]), ("to", names[-1])):
        text = f"The {'first' if name == 'from' else 'last'} stage to run."
        parser.add_argument(f"--{name}", choices=names, default=default, help=text)
    chosen, overrides = parser.parse_known_args(args)
    first, last = (names.index(getattr(chosen, name)) for name in ("from", "to"))
    if first > last:
        raise UserError(f"--from {names[first]} comes after --to {names[last]}; swap them")
    changed = stage_overrides(overrides)
    folder = chosen.output_dir
    links = {
        "tokenizer": [f"--output_dir={folder}/tokenizer"],
        "pretrain": [
            f"--output_dir={folder}/pretrain",
            f"--export_dir={folder}/pretrain/model",
            f"--data.tokenizer={folder}/tokenizer",
            f"--data.cache_dir={folder}/cache",
        ],
        "sft": [
            f"--output_dir={folder}/sft",
            f"--export_dir={folder}/sft/model",
            f"--model.base.pretrained={folder}/pretrain/model",
            f"--data.cache_dir={folder}/cache",
        ],
        "reward": [
            f"--output_dir={folder}/reward",
            f"--export_dir={folder}/reward/model",
            f"--model.base.pretrained={folder}/sft/model",
            f"--data.cache_dir={folder}/cache",
        ],
        "ppo": [
            f"--output_dir={folder}/ppo",
            f"--export_dir={folder}/ppo/model",
            f"--model.base.pretrained={folder}/sft/model",
            f"--model.rewards={folder}/reward/model",
            f"--model.ppo.value_from={folder}/reward/model",
            f"--data.cache_dir={folder}/cache",
        ],
        "evaluation": [
            f"--output_dir={folder}/evaluation",
            f"--model={folder}/pretrain/model",
            f"--compare={folder}/sft/model,{folder}/ppo/model",
            f"--judge={folder}/reward/model",
        ],
    }
    checks = {
        "pretrain": check_margin,
        "sft": check_answers,
        "reward": check_accuracy,
        "ppo": check_wins,
    }
    for name in names[first : last + 1]:
        print(f"\n=== {name} ===", flush=True)
        config = CONFIGS / f"{name}.yaml"
        given = [f"--config={config}"] if config.exists() else []
        run = STAGES[name]([*given, *links[name], *changed[name]])
        if run is not None and name in checks:
            checks[name](run.results)


def stage_overrides(args: list[str]) -> dict[str, list[str]]:
    """Sort ``--STAGE.SETTING VALUE`` by stage."""
    changed: dict[str, list[str]] = {name: [] for name in STAGES}
    stage = None
    for arg in args:
        name, dot, setting = arg.removeprefix("--").partition(".")
        if arg.startswith("--"):
            if not dot or name not in STAGES:
                raise UserError(f"there is no setting {arg}; name a stage: --pretrain.{name} ...")
            stage, arg = name, f"--{setting}"
        if stage is None:
            raise UserError(f"'{arg}' belongs to no setting; see --help")
        changed[stage].append(arg)
    return changed


def check_margin(results: dict[str, dict[str, float]]) -> None:
    """Say whether the model learned more than its references know, and fail if it did not."""
    model = results["after"]["bits_per_byte"]
    reference = min(results[name]["bits_per_byte"] for name in ("unigram", "gzip"))
    share = 1 - model / reference
    if share < MARGIN:
        raise UserError(
            f"the model needs {model:.3f} bits per byte on held-out text, the better reference "
            f"{reference:.3f}: it must be {MARGIN:.0%} below; train it longer"
        )
    print(f"{share:.0%} fewer bits per byte than the better reference ({MARGIN:.0%} is required)")


def check_answers(results: dict[str, dict[str, float]]) -> None:
    """Say whether the model answers in the trained form and stops, and fail if it does not."""
    before, after = (results[name]["well_formed_rate"] for name in ("before", "after"))
    if after < WELL_FORMED:
        raise UserError(
            f"{after:.0%} of the answers to held-out questions have the trained form and end by "
            f"themselves: it must be {WELL_FORMED:.0%}; train it longer"
        )
    print(
        f"{after:.0%} of the answers are well formed and end by themselves, {before:.0%} before "
        f"({WELL_FORMED:.0%} is required)"
    )


def check_accuracy(results: dict[str, dict[str, float]]) -> None:
    """Say how often the reward model is right, and fail if length alone explains it."""
    after = results["after"]
    accuracy, low, high, judge = (
        after[name] for name in ("accuracy", "accuracy_low", "accuracy_high", "length_judge")
    )
    told = f"held-out accuracy {accuracy:.3f} (95 % interval {low:.3f} to {high:.3f})"
    if low <= max(judge, 0.5):
        raise UserError(
            f"the reward model has a {told}: not clearly above chance and above the {judge:.3f} of "
            "preferring answers by their length; train it longer"
        )
    print(f"{told}; preferring answers by their length: {judge:.3f}")


def check_wins(results: dict[str, dict[str, float]]) -> None:
    """Say how much better the answers have become, and fail if they certainly have not."""
    before, after = results["before"], results["after"]
    low, high = after["win_rate_low"], after["win_rate_high"]
    told = (
        f"reward {before['objective/scores']:.3f} before, {after['objective/scores']:.3f} after; "
        f"KL {after['objective/kl']:.2f} nats; win rate against the fine-tuned model "
        f"{after['win_rate']:.3f} (95 % interval {low:.3f} to {high:.3f})"
    )
    if low <= 0.5:
        raise UserError(f"PPO has not certainly made the answers better: {told}; train it longer")
    print(told)


if __name__ == "__main__":
    main()
