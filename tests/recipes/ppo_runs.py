"""What the tests of PPO share: command lines, and what a run has left."""

import csv
import json
from pathlib import Path
from typing import Any

import ppo
import pytest
import torch

from lit_llm.cli import RecipeCLI

LORA = ("--model.adapter.method=lora", "--model.adapter.r=4")
UNMEASURED = ("--data.val_prompts=0", "--data.test_prompts=0")
SHORT = (*UNMEASURED, "--trainer.max_epochs=2", "--checkpoint.every_n_steps=100")
TIMINGS = ("rollout/seconds", "rollout/tokens_per_s", "perf/")


def trained(args: list[str]) -> Any:
    """Run the recipe but for its report, whose curves take longer than everything else here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecipeCLI, "report", lambda self: None)
        return ppo.main(args)


def arguments(tiny_ppo: Path, output: Path, *extra: str) -> list[str]:
    """Command line of a tiny run."""
    return [f"--config={tiny_ppo / 'ppo.yaml'}", f"--output_dir={output}", *extra]


def everything_on(tiny: Path) -> tuple[str, ...]:
    """All weights, a critic of its own, and whatever else has a state."""
    return (
        "--model.ppo.kl_target=0.01",
        "--model.ppo.kl_horizon=32",
        "--model.ppo.normalise_scores=running",
        "--model.ppo.ptx_coef=0.5",
        f"--data.ptx_sources={tiny / 'first.jsonl'}",
        "--model.ppo.ent_coef=0.01",
    )


def checkpoint(run: Path, step: int) -> dict[str, Any]:
    """A checkpoint of a run."""
    path = run / "checkpoints" / f"step={step:08d}.ckpt"
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(run: Path) -> dict[str, dict[int, float]]:
    """Every metric of a run's CSV by its step; what was logged last counts."""
    found: dict[str, dict[int, float]] = {}
    with (run / "metrics" / "version_0" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for name, value in row.items():
                if value:
                    found.setdefault(name, {})[step] = float(value)
    return found


def learned(run: Path, first: int = 0) -> dict[str, dict[int, float]]:
    """What was logged of the training from a step on, but how long it took."""
    return {
        name: {step: value for step, value in values.items() if step >= first}
        for name, values in logged(run).items()
        if not name.startswith(("val/", "test/", *TIMINGS))
    }
