"""What only GPUs can show. Nobody has run these yet, says docs/strategies.md."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.strategies.recipe_cases import BF16, STRATEGIES, arguments
from tests.strategies.test_parity import needed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason="needs two CUDA devices; run it where they are"
    ),
]
ROOT = Path(__file__).parents[2]


def on_gpus(folder: Path, recipe: str, output: Path, strategy: str, *extra: str) -> dict:
    """Run a recipe on two devices by Lightning's own launcher; its test before and after."""
    args = arguments(folder, recipe, output, strategy, "--trainer.accelerator=cuda", *extra)
    command = [sys.executable, str(ROOT / "recipes" / f"{recipe}.py"), *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((output / "evaluation.json").read_text())


@pytest.mark.parametrize("strategy", [needed(name) for name in STRATEGIES])
@pytest.mark.parametrize("recipe", ["pretrain", "ppo"])
def test_nccl(recipe: str, strategy: str, parity_folder: Path, tmp_path: Path) -> None:
    on_gpus(parity_folder, recipe, tmp_path, strategy, *BF16)


@pytest.mark.parametrize("strategy", [needed("deepspeed_zero3_offload")])
def test_offload(strategy: str, parity_folder: Path, tmp_path: Path) -> None:
    on_gpus(parity_folder, "sft", tmp_path, strategy, *BF16)


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs it: pip install bitsandbytes"
)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_qlora(strategy: str, parity_folder: Path, tmp_path: Path) -> None:
    """4-bit weights are stored as bfloat16, so that FSDP1 can divide them."""
    lora = ("--model.adapter.method=qlora", "--model.base.dtype=bfloat16")
    on_gpus(parity_folder, "sft", tmp_path, strategy, *lora, *BF16)


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None,
    reason="needs it: pip install transformer-engine[pytorch]",
)
def test_fp8(parity_folder: Path, tmp_path: Path) -> None:
    """Lightning's own precision plugin, under DDP."""
    on_gpus(parity_folder, "pretrain", tmp_path, "ddp", "--trainer.precision=transformer-engine")
