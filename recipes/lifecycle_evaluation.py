"""The last stage of the life cycle: every model measured on the same held-out text and questions.

    python recipes/lifecycle.py --from evaluation
    python recipes/lifecycle_evaluation.py --output_dir runs/lifecycle

What a stage costs the abilities of the stages before it is seen side by side.
"""

import json
from argparse import ArgumentParser
from pathlib import Path

from lit_llm.callbacks.answers import SampleAnswers
from lit_llm.cli import RecipeCLI
from lit_llm.console import recipe
from lit_llm.data.instruction import InstructionDataModule
from lit_llm.data.text import TextDataModule
from lit_llm.evaluation.report import results_table
from lit_llm.modules.causal_lm import CausalLMModule
from lit_llm.modules.sft import SFTModule
from lit_llm.strategies.checkpoint_io import write_text

MODELS = ("pretrain", "sft", "ppo")
CONFIGS = Path(__file__).parent / "configs" / "lifecycle"


@recipe
def main(args: list[str] | None = None) -> None:
    """Measure the models of a life cycle, and write one table."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="runs/lifecycle", help="Folder of all stages.")
    folder = Path(parser.parse_args(args).output_dir)
    rows = {}
    for name in MODELS:
        common = [
            f"--model.base.pretrained={folder / name / 'model'}",
            f"--data.cache_dir={folder / 'cache'}",
            "--trainer.enable_progress_bar=false",
            "--logging.wandb=off",
            "--resume=never",
        ]
        text = RecipeCLI(
            CausalLMModule,
            TextDataModule,
            output_dir=str(folder / "evaluation" / name / "text"),
            config=CONFIGS / "pretrain.yaml",
            args=[*common, f"--data.tokenizer={folder / 'tokenizer'}"],
        )
        text.test(name)
        questions = RecipeCLI(
            SFTModule,
            InstructionDataModule,
            output_dir=str(folder / "evaluation" / name / "questions"),
            config=CONFIGS / "sft.yaml",
            samples=SampleAnswers,
            args=common,
        )
        questions.test(name)
        told = ("stop_rate", "well_formed_rate", "rouge_l")
        answered = questions.results[name]
        rows[name] = {
            "bits_per_byte": text.results[name]["bits_per_byte"],
            **{measure: answered[measure] for measure in told if measure in answered},
        }
    table = results_table(rows)
    write_text(folder / "evaluation" / "report.md", f"# The stages, side by side\n\n{table}\n")
    write_text(folder / "evaluation" / "evaluation.json", json.dumps(rows, indent=2))
    print(f"\n{table}\n\nreport: {folder / 'evaluation' / 'report.md'}")


if __name__ == "__main__":
    main()
