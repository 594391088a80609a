"""Two ranks train the reward model and the policy of one, and measure the same."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.recipes.preference_runs import arguments

ROOT = Path(__file__).parents[2]


@pytest.mark.thorough  # tests/strategies looks at two ranks too
@pytest.mark.parametrize("recipe", ["reward", "dpo"])
def test_two_ranks_train_the_model_of_one(
    recipe: str, tiny_preferences: Path, tmp_path: Path
) -> None:
    """2 x 2 prompts an update on two ranks, 2 x 2 accumulated on one: the same prompts."""
    states = {}
    runs = {"one": ("1", "2"), "two": ("2", "1")}
    for name, (devices, accumulate) in runs.items():
        args = [
            *arguments(tiny_preferences, recipe, tmp_path / name),
            "--model.base.dropout=0",
            "--model.optimizer.class_path=torch.optim.SGD",
            "--model.optimizer.init_args.lr=0.05",
            "--trainer.max_steps=4",
            "--trainer.val_check_interval=4",
            f"--trainer.accumulate_grad_batches={accumulate}",
            f"--trainer.devices={devices}",
            f"--trainer.strategy={'ddp' if devices == '2' else 'auto'}",
            "--data.micro_batch_size=2",
            "--data.val_micro_batch_size=3",
            "--trainer.limit_val_batches=1.0",
            f"--data.cache_dir={tmp_path / name / 'cache'}",
            *(["--samples.count=0", "--samples.test_count=0"] if recipe == "dpo" else []),
            *(["--model.kl_prompts=0"] if recipe == "dpo" else []),
        ]
        if devices == "1":
            importlib.import_module(recipe).main(args)
        else:
            command = [sys.executable, str(ROOT / "recipes" / f"{recipe}.py"), *args]
            subprocess.run(command, check=True, capture_output=True, timeout=240)
        path = tmp_path / name / "checkpoints" / "step=00000004.ckpt"
        states[name] = torch.load(path, weights_only=True)["state_dict"]
    for key, value in states["one"].items():
        torch.testing.assert_close(states["two"][key], value, atol=2e-6, rtol=1e-5, msg=key)
    results = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in runs]
    for measure, value in results[0]["after"].items():
        assert results[1]["after"][measure] == pytest.approx(value, rel=1e-3, abs=1e-5), measure
    assert results[0]["before"]["loss"] != results[0]["after"]["loss"]
