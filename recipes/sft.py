"""Fine-tune a causal language model to follow instructions: supervised fine-tuning on answers.

    python recipes/sft.py --model.base.pretrained FOLDER_OR_HUB_NAME --export_dir runs/sft/model
    python recipes/sft.py --model.base.pretrained FOLDER --data.sources my_chats.jsonl --inspect
    python recipes/sft.py --model.base.pretrained FOLDER --model.adapter.method lora

The defaults stand in recipes/configs/sft.yaml; --help lists every setting, --print_config writes
them as YAML. A run that was stopped goes on where it was when the command is repeated.
"""

from pathlib import Path

from lit_llm.callbacks.answers import SampleAnswers
from lit_llm.cli import RecipeCLI
from lit_llm.console import recipe
from lit_llm.data.instruction import InstructionDataModule
from lit_llm.modules.sft import SFTModule


@recipe
def main(args: list[str] | None = None) -> RecipeCLI:
    """Measure, train, measure again, export, report."""
    cli = RecipeCLI(
        SFTModule,
        InstructionDataModule,
        output_dir="runs/sft",
        config=Path(__file__).parent / "configs" / "sft.yaml",
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
