"""Train a chat model on comparisons without a reward model: direct preference optimisation.

    python recipes/dpo.py --model.base.pretrained runs/sft/model --export_dir runs/dpo/model
    python recipes/dpo.py --model.base.pretrained FOLDER --data.sources my_pairs.jsonl --inspect
    python recipes/dpo.py --model.base.pretrained FOLDER --model.adapter.method lora

Adapters want a higher learning rate than all weights: --model.optimizer.init_args.lr 5e-5.
The defaults stand in recipes/configs/dpo.yaml; --help lists every setting, --print_config writes
them as YAML. A run that was stopped goes on where it was when the command is repeated.
"""

from pathlib import Path

from lit_llm.callbacks.answers import SampleAnswers
from lit_llm.cli import RecipeCLI
from lit_llm.console import recipe
from lit_llm.data.preference import PreferenceDataModule
from lit_llm.modules.dpo import DPOModule


@recipe
def main(args: list[str] | None = None) -> RecipeCLI:
    """Measure, train, measure again, export, report."""
    cli = RecipeCLI(
        DPOModule,
        PreferenceDataModule,
        output_dir="runs/dpo",
        config=Path(__file__).parent / "configs" / "dpo.yaml",
        samples=SampleAnswers,
        args=args,
    )
    cli.test("before")
    cli.fit()
    cli.test("after")
    cli.export()
    cli.report()
    return cli


if __name__ == "__main__":
    main()
