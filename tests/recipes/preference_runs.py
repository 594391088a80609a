"""What the tests of reward models and of DPO share: command lines, and measures done by hand."""

import csv
import json
from pathlib import Path
from typing import Any

import torch


def arguments(folder: Path, recipe: str, output: Path, *extra: str) -> list[str]:
    """Command line of a tiny run."""
    return [f"--config={folder / recipe}.yaml", f"--output_dir={output}", *extra]


def logged(run: Path) -> dict[str, list[float]]:
    """Every metric of a run's CSV, in order."""
    found: dict[str, list[float]] = {}
    with (run / "metrics" / "version_0" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value:
                    found.setdefault(name, []).append(float(value))
    return found


def sequences(tokenizer: Any, path: Path) -> list[tuple[list[int], list[int]]]:
    """Ids of prompt and answer up to the end of the turn, the better and the worse of each line."""
    found = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        pair = []
        for name in ("chosen", "rejected"):
            text = tokenizer.apply_chat_template(record["prompt"] + record[name], tokenize=False)
            pair.append(tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"])
        found.append((pair[0], pair[1]))
    return found


@torch.no_grad()
def scores(model: Any, texts: list[list[int]]) -> torch.Tensor:
    """What transformers' own classifier says of each text, one at a time, (N, heads)."""
    model.eval()
    return torch.cat([model(torch.tensor([ids])).logits for ids in texts])
