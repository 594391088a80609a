"""Train a reward model on comparisons, and report whether it can be trusted.

    python recipes/reward.py --model.base.pretrained runs/sft/model --export_dir runs/reward/model
    python recipes/reward.py --model.base.pretrained FOLDER --data.sources my_pairs.jsonl --inspect
    python recipes/reward.py --model.base.pretrained FOLDER --model.adapter.method lora

Adapters want a higher learning rate than all weights: --model.optimizer.init_args.lr 2e-4.
The defaults stand in recipes/configs/reward.yaml; --help lists every setting, --print_config writes
them as YAML. A run that was stopped goes on where it was when the command is repeated.
"""

from pathlib import Path

from lit_llm.callbacks.reward_report import RewardReport
from lit_llm.cli import RecipeCLI
from lit_llm.console import recipe
from lit_llm.data.preference import PreferenceDataModule
from lit_llm.modules.reward import RewardModule


@recipe
def main(args: list[str] | None = None) -> RecipeCLI:
    """Measure, train, standardise the scores, measure again, export, report."""
    cli = RecipeCLI(
        RewardModule,
        PreferenceDataModule,
        output_dir="runs/reward",
        config=Path(__file__).parent / "configs" / "reward.yaml",
        samples=RewardReport,
        args=args,
    )
    cli.test("before")
    cli.fit()
    cli.validate()
    cli.test("after")
    cli.export()
    cli.report()
    return cli


if __name__ == "__main__":
    main()
