"""Every recipe learns under every strategy what it learns in one process.

Losses and gradient norms of each optimizer step and the final weights, of the checkpoint and of the
exported model; for PPO also what was sampled, its rewards and KL.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.recipes.ppo_runs import checkpoint, logged
from tests.strategies.recipe_cases import (
    BF16,
    CHECKPOINTING,
    CLIP,
    DICTATED,
    LORA,
    RECIPES,
    STEPS,
    STRATEGIES,
    arguments,
    run,
)
from tests.strategies.world import World

THOROUGH = pytest.mark.thorough
pytestmark = [pytest.mark.xdist_group("two_ranks"), pytest.mark.slow]


@dataclass(frozen=True)
class Tolerance:
    """How far two runs may be apart.

    Args:
        loss: Of every step's loss, in nats.
        norm: Of every step's gradient norm, as a share of it: they are from below 1 to 30.
        weights: Of each weight after the last step.
    """

    loss: float
    norm: float
    weights: float


FP32 = Tolerance(loss=1e-5, norm=1e-5, weights=1e-5)
# Where a weight lies between two numbers of bfloat16, its last bit of float32 decides which it is,
# and so moves products by 0.4 %; under PPO that may take a token over the clip range, and its
# gradient away. AdamW moves no weight by more than the learning rate, 3e-3, for it.
BF16_TOLERANCE = Tolerance(loss=5e-3, norm=5e-2, weights=3e-3)

UNSURE = ("objective/kl", "rewards/accuracies")
"""Of DPO: the random numbers of the answers that KL is estimated from are shared by the prompts of
a rank; and before the first step policy and reference are the same, so rounding makes one win."""


class Parity:
    """Runs in both worlds, and what they are apart.

    Args:
        folder: With the recipes' settings; the runs of one process are kept there.
        ranks: Two processes.
        output: Folder of the run on two ranks.
        record: Keeps a fact for the table of results.
    """

    def __init__(
        self, folder: Path, ranks: World, output: Path, record: Callable[[str, Any], None]
    ) -> None:
        self.folder = folder
        self.ranks = ranks
        self.output = output
        self.record = record

    def check(
        self,
        variant: str,
        recipe: str,
        strategy: str,
        limit: Tolerance,
        *extra: str,
        only_together: Sequence[str] = (),
    ) -> tuple[Path, Path]:
        """Run a recipe in one process and on two ranks, and compare what they have learned.

        Args:
            variant: Heading of the results.
            recipe: Name of the recipe.
            strategy: Name of the strategy.
            limit: How far they may be apart.
            extra: More settings of both.
            only_together: More settings of the two ranks.

        Returns:
            The folders of both runs.
        """
        self.record("case", (variant, recipe, strategy))
        one = self.folder / "-".join(["one", recipe, *(s.rpartition(".")[2] for s in extra)])
        if not one.exists():
            run(recipe, self._arguments(recipe, one, None, *extra))
        args = self._arguments(recipe, self.output, strategy, *extra, *only_together)
        self.ranks.run("tests.strategies.recipe_cases:run", recipe, args)
        found = differences(one, self.output)
        self.record("differences", found)
        assert all(found[name] <= most for name, most in asdict(limit).items()), (found, limit)
        return one, self.output

    def _arguments(self, recipe: str, output: Path, strategy: str | None, *extra: str) -> list[str]:
        export = f"--export_dir={output / 'model'}"
        return arguments(self.folder, recipe, output, strategy, export, *extra)


@pytest.fixture
def parity(parity_folder: Path, two_ranks: World, tmp_path: Path, record_property: Any) -> Parity:
    return Parity(parity_folder, two_ranks, tmp_path, record_property)


def needed(strategy: str) -> Any:
    """The strategy, skipped where its library is not installed."""
    missing = "deepspeed" in strategy and importlib.util.find_spec("deepspeed") is None
    skip = pytest.mark.skipif(missing, reason="needs deepspeed: pip install 'lit_llm[deepspeed]'")
    return pytest.param(strategy, marks=skip)


every_strategy = pytest.mark.parametrize("strategy", [needed(name) for name in STRATEGIES])
FIRST = ("ddp", "fsdp2", "tensor_parallel", "deepspeed_zero3")
"""One of each kind; the others are like one of them, and thorough."""
first_strategies = pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(name, marks=[*needed(name).marks, *([] if name in FIRST else [THOROUGH])])
        for name in STRATEGIES
    ],
)
every_recipe = pytest.mark.parametrize("recipe", RECIPES)


@first_strategies
@every_recipe
def test_fp32(recipe: str, strategy: str, parity: Parity) -> None:
    """Clipped, accumulated over unequal numbers of tokens, with a shorter last window."""
    one, two = parity.check("fp32", recipe, strategy, FP32)
    same_measures(one, two, but=UNSURE if recipe == "dpo" else ())
    assert clipped(one) >= STEPS / 2
    if recipe == "ppo":
        same_rollouts(one, two)


@pytest.mark.thorough
@every_strategy
def test_activation_checkpointing(strategy: str, parity: Parity) -> None:
    """Beside one process that keeps its activations."""
    name = "fp32, activation checkpointing"
    parity.check(name, "sft", strategy, FP32, only_together=CHECKPOINTING)


@pytest.mark.thorough
@every_strategy
def test_adapters(strategy: str, parity: Parity) -> None:
    """Only the adapters are trained, and they are merged into what is exported."""
    parity.check("fp32, LoRA", "sft", strategy, FP32, *LORA)


@pytest.mark.thorough
@every_strategy
@every_recipe
def test_bf16(recipe: str, strategy: str, parity: Parity) -> None:
    """Mixed precision together with activation checkpointing."""
    extra = (*BF16, *(DICTATED if recipe == "ppo" else ()))
    name = "bf16-mixed, activation checkpointing"
    parity.check(name, recipe, strategy, BF16_TOLERANCE, *extra, only_together=CHECKPOINTING)


# ----- how two runs are compared ------------------------------------------------------------------


def differences(one: Path, two: Path) -> dict[str, float]:
    """The largest differences of two runs that have logged and kept the same things."""
    logs = [measured(folder) for folder in (one, two)]
    assert logs[0].keys() == logs[1].keys()
    found = {}
    for short, name in (("loss", "train/loss"), ("norm", "train/grad_norm")):
        values = [log[name] for log in logs]
        assert len(values[0]) == STEPS and values[0].keys() == values[1].keys()
        unit = {step: value if short == "norm" else 1.0 for step, value in values[0].items()}
        found[short] = max(abs(values[1][step] - values[0][step]) / unit[step] for step in unit)
    states = [checkpoint(folder, STEPS)["state_dict"] for folder in (one, two)]
    models = [load_file(folder / "model" / "model.safetensors") for folder in (one, two)]
    found["weights"] = max(largest_difference(*states), largest_difference(*models))
    return found


def same_measures(one: Path, two: Path, but: tuple[str, ...]) -> None:
    """Check all that was logged, and the tests' results.

    Args:
        one: Folder of the one run.
        two: Folder of the other.
        but: Ends of the names of what may differ.
    """
    near = functools.partial(pytest.approx, abs=1e-4, rel=1e-4)
    found = []
    for folder in (one, two):
        tests = json.loads((folder / "evaluation.json").read_text())
        measures = measured(folder) | {
            f"{when} {k}": v for when in tests for k, v in tests[when].items()
        }
        found.append({k: v for k, v in measures.items() if not k.endswith(but)})
    assert found[0].keys() == found[1].keys()
    for name, values in found[0].items():
        assert found[1][name] == near(values), name


def measured(folder: Path) -> dict[str, dict[int, float]]:
    """Every metric of a run by its step, but how long things took."""
    timed = ("seconds", "per_s", "mfu", "memory")
    return {name: at for name, at in logged(folder).items() if not name.endswith(timed)}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Of two models' weights, under the same names, in the same shapes and types."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor.shape, tensor.dtype) == (second[name].shape, second[name].dtype), name
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def clipped(folder: Path) -> int:
    """Optimizer steps whose gradient was too long."""
    return sum(norm > CLIP for norm in logged(folder)["train/grad_norm"].values())


def same_rollouts(one: Path, two: Path) -> None:
    """Check what PPO has sampled in each iteration, and what it was worth."""
    for step in (4, 8, 12):
        kept = [checkpoint(folder, step)["ppo"]["experience"] for folder in (one, two)]
        for part in ("input_ids", "attention_mask", "response_mask", "order"):
            assert torch.equal(kept[0][part], kept[1][part]), (step, part)
    logs = [logged(folder) for folder in (one, two)]
    for name in ("objective/scores", "objective/kl", "objective/kl_coef"):
        assert len(logs[0][name]) == 3
        for step, value in logs[0][name].items():
            assert logs[1][name][step] == pytest.approx(value, abs=1e-5), (name, step)
