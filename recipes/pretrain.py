"""Pre-train a causal language model: next-token prediction on text.

    python recipes/pretrain.py
    python recipes/pretrain.py --data.sources '[{path: my_texts/}]' --model.base.preset llama-15m
    python recipes/pretrain.py --model.base.pretrained FOLDER_OR_HUB_NAME --trainer.max_steps 500

The defaults stand in recipes/configs/pretrain.yaml; --help lists every setting, --print_config
writes them as YAML. A run that was stopped goes on where it was when the command is repeated.
"""

from pathlib import Path

from lit_llm.cli import RecipeCLI
from lit_llm.console import recipe
from lit_llm.data.text import TextDataModule
from lit_llm.evaluation.references import reference_measures
from lit_llm.modules.causal_lm import CausalLMModule


@recipe
def main(args: list[str] | None = None) -> RecipeCLI:
    """Measure, train, measure again, export, report."""
    cli = RecipeCLI(
        CausalLMModule,
        TextDataModule,
        output_dir="runs/pretrain",
        config=Path(__file__).parent / "configs" / "pretrain.yaml",
        args=args,
    )
    cli.test("before")
    cli.fit()
    cli.test("after")
    cli.export()
    cli.report(reference_measures)
    return cli


if __name__ == "__main__":
    main()
