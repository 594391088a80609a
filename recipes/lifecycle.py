"""The life of a small language model from one command, on the text that comes with Python.

    python recipes/lifecycle.py
    python recipes/lifecycle.py --from pretrain
    python recipes/lifecycle.py --output_dir runs/mine --to tokenizer

Each stage is the recipe of its name with a config of its own, and resumes where it was stopped.
"""

from argparse import ArgumentParser
from pathlib import Path

import pretrain
import tokenizer

from lit_llm.console import recipe

STAGES = {"tokenizer": tokenizer.main, "pretrain": pretrain.main}
CONFIGS = Path(__file__).parent / "configs" / "lifecycle"


@recipe
def main(args: list[str] | None = None) -> None:
    """Run the stages in order, each on what the one before it left."""
    names = list(STAGES)
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="runs/lifecycle", help="Folder of all stages.")
    parser.add_argument("--from", dest="first", choices=names, default=names[0])
    parser.add_argument("--to", dest="last", choices=names, default=names[-1])
    chosen = parser.parse_args(args)
    folder = chosen.output_dir
    links = {
        "tokenizer": [f"--output_dir={folder}/tokenizer"],
        "pretrain": [
            f"--output_dir={folder}/pretrain",
            f"--export_dir={folder}/pretrain/model",
            f"--data.tokenizer={folder}/tokenizer",
            f"--data.cache_dir={folder}/cache",
        ],
    }
    for name in names[names.index(chosen.first) : names.index(chosen.last) + 1]:
        print(f"\n=== {name} ===", flush=True)
        STAGES[name]([f"--config={CONFIGS / name}.yaml", *links[name]])


if __name__ == "__main__":
    main()
