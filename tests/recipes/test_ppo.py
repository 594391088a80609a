"""The PPO recipe run whole: what it logs and leaves, and what stays as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ppo
import pytest
import torch

from lit_llm.modules.ppo import PPOModule
from tests.recipes.ppo_runs import (
    LORA,
    SHORT,
    arguments,
    checkpoint,
    learned,
    logged,
    records,
    trained,
)

KL_COEF = 0.05
RULE = "--model.rewards=[{function: length_window, options: {longest: 4}}]"


class Run:
    """A finished run with what went through its module's doors.

    Attributes:
        cli: What the recipe gave back.
        folder: Of the run.
        modes: Whether a module of reference or rewards was ever in training mode.
        answers: Prompts and responses of the last evaluation, the policy's and the reference's.
    """

    def __init__(self, folder: Path, args: list[str], main: Callable[[list[str]], Any]) -> None:
        self.folder = folder
        self.modes: set[bool] = set()
        self.answers: list[tuple[list[int], Any]] = []
        views, respond = PPOModule.views, PPOModule.respond

        def watched(module: Any, *inputs: Any) -> Any:
            frozen = [part for part in (module.reference, module.rewards) if part is not None]
            self.modes |= {one.training for part in frozen for one in part.modules()}
            return views(module, *inputs)

        def kept(module: Any, prompts: Any, seeds: Any, **how: Any) -> Any:
            found = respond(module, prompts, seeds, **how)
            if not how.get("by_reference"):
                pairs = zip(prompts, found, strict=True)
                self.answers = [(prompt.ids, response) for prompt, response in pairs]
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PPOModule, "views", watched)
            patch.setattr(PPOModule, "respond", kept)
            self.cli = main(args)


def reward_folder(tiny_chat: Path, folder: Path, **config: Any) -> Path:
    """A reward model by transformers alone, with the policy's tokenizer; its scores differ."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_chat / "model")
    settings = AutoConfig.from_pretrained(
        tiny_chat / "model", num_labels=1, pad_token_id=tokenizer.pad_token_id, **config
    )
    torch.manual_seed(7)
    model = AutoModelForSequenceClassification.from_config(settings)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(tiny_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_folder(tiny_chat, tmp_path_factory.mktemp("rewards") / "judge" / "model")


@pytest.fixture(scope="module", params=["rule", "model"])
def run(
    request: pytest.FixtureRequest,
    tiny_ppo: Path,
    judge: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """All weights and a rule, or adapters (with others for the critic) and a reward model."""
    output = tmp_path_factory.mktemp("ppo")
    args = arguments(tiny_ppo, output, f"--export_dir={output / 'model'}")
    if request.param == "model":
        args += [f"--model.rewards={judge}", *LORA, "--model.optimizer.init_args.lr=0.02"]
        return Run(output, args, trained)
    args += [RULE, f"--model.judges={judge}", f"--model.ppo.value_from={judge}"]
    return Run(output, args, ppo.main)


def start_of(tiny_chat: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_chat / "model").eval()


# ----- what a run leaves --------------------------------------------------------------------------


def test_everything_promised_is_logged(run: Run) -> None:
    found = logged(run.folder)
    own = {"length_window", "judge"} & {run.cli.model.rewards.names[0]}
    expected = {f"scores/{name}" for name in own}
    parts = {
        "objective": "kl scores scores_std rlhf_reward non_score_reward entropy kl_coef",
        "policy": "approxkl clipfrac ratio_mean ratio_max first_ratio_error skipped entropy",
        "loss": "policy value",
        "value": "clipfrac explained_variance",
        "rollout": "response_length eos_rate repetition tokens_per_s seconds",
    }
    expected |= {f"{part}/{name}" for part, names in parts.items() for name in names.split()}
    assert own and expected <= found.keys()
    for name in expected:  # the three iterations, at the last step of each
        assert list(found[name]) == [3, 7, 11], name
    assert len(found["train/loss"]) == len(found["train/lr"]) == 12
    evaluated = {"objective/scores", "objective/kl", "rollout/eos_rate", "rollout/response_length"}
    assert {f"val/{name}" for name in evaluated} <= found.keys()


def test_the_logged_numbers_fit_together(run: Run) -> None:
    found = {name: list(values.values()) for name, values in learned(run.folder).items()}
    (score,) = (values for name, values in found.items() if name.startswith("scores/"))
    assert found["objective/scores"] == pytest.approx(score, abs=1e-6)
    # Policy and reference are one model at first, and none is learned of before the next rollout.
    assert found["objective/kl"][0] == 0
    assert found["objective/kl"][2] != 0
    for kl, other, total, value, ends in zip(
        *(found[f"objective/{name}"] for name in ("kl", "non_score_reward", "rlhf_reward")),
        score,
        found["rollout/eos_rate"],
        strict=True,
    ):
        assert other == pytest.approx(-KL_COEF * kl, abs=1e-6)
        assert total == pytest.approx(value - 0.1 * (1 - ends) + other, abs=1e-5)
    assert found["policy/first_ratio_error"] == [0, 0, 0]


def test_a_run_leaves_measures_responses_and_a_report(run: Run) -> None:
    results = json.loads((run.folder / "evaluation.json").read_text())
    rows = records(run.folder / "test_responses.jsonl")
    before = [row for row in rows if row["step"] == 0]
    after = [row for row in rows if row["step"] == 12]
    assert [row["index"] for row in before] == [row["index"] for row in after] == list(range(8))
    for name, part in (("before", before), ("after", after)):
        mean = sum(row["score"] for row in part) / 8
        assert results[name]["objective/scores"] == pytest.approx(mean, abs=1e-5)
    # The reference answers as the policy did before it learned: model, seeds and prompts are same.
    for first, last in zip(before, after, strict=True):
        assert last["prompt"] == first["prompt"]
        assert last["baseline"] == first["response"]
        assert last["baseline_score"] == pytest.approx(first["score"], abs=1e-5)
        assert first["baseline"] is None
    assert any(row["response"] != row["baseline"] for row in after)
    wins = [1.0 * (row["winner"] == "policy") + 0.5 * (row["winner"] == "tie") for row in after]
    assert results["after"]["win_rate"] == pytest.approx(sum(wins) / 8)
    assert "win_rate" not in results["before"]
    shown = records(run.folder / "responses.jsonl")
    assert [row["step"] for row in shown] == [8, 8, 8]  # after two of the three iterations
    if run.cli.model.adapter is None:
        report = (run.folder / "report.md").read_text()
        for word in ("win rate", "objective/kl", "Health", "Responses", "win rate/judge"):
            assert word in report, word


def test_scores_are_those_of_the_rule_or_of_transformers(run: Run, judge: Path) -> None:
    rows = [r for r in records(run.folder / "test_responses.jsonl") if r["step"] == 12]
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(judge).eval()
    with torch.no_grad():
        scores = [float(model(torch.tensor([p + r.ids])).logits) for p, r in run.answers]
    name = next(name for name in rows[0]["scores"] if name != "length_window")
    assert [row["scores"][name] for row in rows] == pytest.approx(scores, abs=1e-4)
    if "length_window" in rows[0]["scores"]:
        assert [row["score"] for row in rows] == [float(row["length"] <= 4) for row in rows]
    else:
        assert [row["score"] for row in rows] == pytest.approx(scores, abs=1e-4)


def test_the_exported_model_is_the_policy(run: Run, tiny_chat: Path) -> None:
    """What it says of its own answers is the KL that was measured, and what the policy says."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(run.folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    start, live = start_of(tiny_chat), run.cli.model.model.eval()
    rows = [row for row in records(run.folder / "test_responses.jsonl") if row["step"] == 12]
    assert len(run.answers) == len(rows)
    for (prompt, response), row in zip(run.answers, rows, strict=True):
        assert tokenizer.decode(response.ids, skip_special_tokens=True) == row["response"]
        tokens = torch.tensor([prompt + response.ids])
        with torch.no_grad():
            own, other, trained = (
                model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                for model in (policy, start, live)
            )
        torch.testing.assert_close(own, trained, atol=1e-5, rtol=1e-5)
        chosen = tokens[0, len(prompt) :, None]
        kl = float((own.gather(1, chosen) - other.gather(1, chosen)).sum())
        assert row["kl"] == pytest.approx(kl, abs=1e-3)
    assert max(abs(row["kl"]) for row in rows) > 0.01


# ----- what stays as it was -----------------------------------------------------------------------


def test_reference_and_rewards_are_never_trained(run: Run, tiny_chat: Path, judge: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    module = run.cli.model
    assert run.modes == {False}
    start = start_of(tiny_chat).state_dict()
    if module.adapter is None:
        reference = module.reference.state_dict()
        assert any(not torch.equal(module.model.state_dict()[n], v) for n, v in start.items())
    else:
        frozen = module.model.get_base_model().state_dict()
        reference = {name.replace(".base_layer", ""): v for name, v in frozen.items()}
    for name, value in start.items():
        assert torch.equal(reference[name], value), name
    scorer = (module.rewards if module.judges is None else module.judges).models[0]
    for name, value in AutoModelForSequenceClassification.from_pretrained(judge).named_parameters():
        assert torch.equal(dict(scorer.named_parameters())[name], value), name
    frozen = [p for n, p in module.named_parameters() if n.startswith(("ref", "rewards", "judges"))]
    assert not any(p.requires_grad or p.grad is not None for p in frozen)


def test_a_checkpoint_holds_what_is_trained_and_loads_by_itself(run: Run) -> None:
    module = run.cli.model
    state = checkpoint(run.folder, 12)["state_dict"]
    trained = {name for name, value in module.named_parameters() if value.requires_grad}
    assert trained <= state.keys()
    assert not [name for name in state if name.startswith(("reference", "rewards", "judges"))]
    if module.adapter is not None:
        assert state.keys() == trained
    path = run.folder / "checkpoints" / "step=00000012.ckpt"
    loaded = PPOModule.load_from_checkpoint(path, weights_only=True)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name
    assert loaded.iteration == 3
    assert loaded.rewards is None


@pytest.mark.parametrize("run", ["model"], indirect=True)
def test_the_critics_adapters_learn_and_stay_behind(run: Run, tiny_chat: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    weights = dict(run.cli.model.model.named_parameters())
    critic = [v for n, v in weights.items() if n.endswith("lora_B.value.weight")]
    assert critic and all(bool(v.any()) for v in critic)
    assert bool(run.cli.model.value_head.weight.any())
    folder = run.folder / "adapter"
    assert not [path for path in folder.iterdir() if path.is_dir()]
    saved = load_file(folder / "adapter_model.safetensors")
    assert len(saved) == sum(".default." in name for name in weights)
    # By hand: the policy's adapters on top of the weights it started from, and nothing else.
    layer = "model.layers.1.mlp.up_proj"
    exported = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    start = start_of(tiny_chat).get_parameter(f"{layer}.weight")
    down, up = (weights[f"base_model.model.{layer}.lora_{side}.default.weight"] for side in "AB")
    torch.testing.assert_close(
        exported.get_parameter(f"{layer}.weight"), start + 32 / 4 * up @ down
    )


# ----- the first ratio ----------------------------------------------------------------------------

GROUPS = ("--model.ppo.group_size=4", "--model.ppo.advantage=")
HALF = "--trainer.precision=bf16-mixed"
SHARED = "--model.ppo.value_model=shared"


@pytest.mark.parametrize(
    "kind",
    [
        (),
        (HALF,),
        ("--trainer.precision=bf16-true",),
        (HALF, SHARED, "--model.ppo.micro_batch_size=4"),
        (SHARED, *LORA),
        (HALF, *LORA),
        (GROUPS[0], GROUPS[1] + "grpo", "--model.generation.temperature=0.7"),
        (GROUPS[0], GROUPS[1] + "rloo", HALF, *LORA),
        ("--model.base.gradient_checkpointing=true", "--model.ppo.micro_batch_size=1"),
        ("--model.rollout_engine=lit_llm.rollout.engine:TransformersEngine", HALF),
    ],
    ids=lambda kind: " ".join(one.rpartition(".")[2] for one in kind) or "plain",
)
def test_the_first_minibatch_is_exactly_on_policy(
    kind: tuple[str, ...], tiny_ppo: Path, tmp_path: Path
) -> None:
    trained(arguments(tiny_ppo, tmp_path, *SHORT, *kind))
    found = learned(tmp_path)
    assert list(found["policy/first_ratio_error"].values()) == [0, 0]
    assert min(found["policy/approxkl"].values()) > 0  # and later ones are not
    assert ("loss/value" in found) == (GROUPS[0] not in kind)


# ----- stopping early -----------------------------------------------------------------------------


def test_an_iteration_that_moves_too_far_is_cut_short(tiny_ppo: Path, tmp_path: Path) -> None:
    """The first minibatch cannot be far away; the second is, and is the last to be learned from."""
    args = arguments(tiny_ppo, tmp_path, *SHORT, "--model.ppo.target_approxkl=1e-9")
    trained([*args, "--checkpoint.every_n_steps=1"])
    found = learned(tmp_path)
    assert found["policy/skipped"] == {3: 2, 7: 2}
    # The rate goes on falling, over all steps that might have been.
    expected = [0.003 * (1 - step / 8) for step in range(8)]
    assert list(found["train/lr"].values()) == pytest.approx(expected)
    states = [checkpoint(tmp_path, step) for step in range(1, 9)]
    for before, after, same in zip(states, states[1:], [0, 1, 1, 0, 0, 1, 1], strict=False):
        for name in ("model.model.embed_tokens.weight", "value_model.head.weight"):
            equal = torch.equal(before["state_dict"][name], after["state_dict"][name])
            assert equal == bool(same), (name, after["global_step"])
