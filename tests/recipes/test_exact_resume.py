"""k steps, SIGKILL, resume to m: the same weights, bit for bit, as m steps at once."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[2]


class Stage(NamedTuple):
    """A recipe with shuffling, mixing, accumulation, workers and dropout on."""

    recipe: str
    config: Path
    extra: tuple[str, ...]
    datamodule: str

    def command(self, output: Path, *more: str) -> list[str]:
        return [
            sys.executable,
            str(ROOT / "recipes" / f"{self.recipe}.py"),
            f"--config={self.config}",
            f"--output_dir={output}",
            "--data.num_workers=2",
            "--trainer.max_steps=40",
            *self.extra,
            *more,
        ]


@pytest.fixture(scope="module")
def pretraining(tiny: Path) -> Stage:
    isolated = ("--data.isolate_documents=true",)  # windows with different numbers of targets
    return Stage("pretrain", tiny / "tiny.yaml", isolated, "TextDataModule")


@pytest.fixture(scope="module")
def stage(
    request: pytest.FixtureRequest, pretraining: Stage, tiny_chat: Path, tiny_preferences: Path
) -> Stage:
    """Pre-training, fine-tuning of all weights and of adapters, a reward model, DPO."""
    if request.param == "pretrain":
        return pretraining
    if request.param in ("reward", "dpo"):
        extra: tuple[str, ...] = ("--data.ood_sources=null", "--trainer.limit_test_batches=2")
        if request.param == "reward":
            extra += ("--model.adapter.method=lora", "--model.adapter.dropout=0.1")
        config = tiny_preferences / f"{request.param}.yaml"
        return Stage(request.param, config, extra, "PreferenceDataModule")
    extra = ("--model.neftune_alpha=5", "--samples.test_count=0", "--samples.count=1")
    if request.param == "lora":
        extra += ("--model.adapter.method=lora", "--model.adapter.dropout=0.1")
    return Stage("sft", tiny_chat / "sft.yaml", extra, "InstructionDataModule")


def wait_for(path: Path, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Wait until ``path`` exists while ``process`` lives."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, "the run ended before it wrote the checkpoint"
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.01)


def final_state(output: Path) -> dict[str, Any]:
    """The last checkpoint of a finished run."""
    path = output / "checkpoints" / "step=00000040.ckpt"
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


def assert_equal(first: Any, second: Any, where: str = "") -> None:
    """Compare nested states exactly."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_equal(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_equal(a, b, f"{where}/{index}")
    else:
        assert first == second, where


@pytest.fixture(scope="module")
def straight(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run that nobody disturbs."""
    output = tmp_path_factory.mktemp("straight")
    subprocess.run(stage.command(output), check=True, stdout=subprocess.DEVNULL)
    return final_state(output)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("pretrain", signal.SIGKILL),
        ("pretrain", signal.SIGTERM),
        ("full", signal.SIGKILL),
        ("lora", signal.SIGKILL),
        ("reward", signal.SIGKILL),
        ("dpo", signal.SIGKILL),
    ],
    indirect=["stage"],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    number: signal.Signals, stage: Stage, tmp_path: Path, straight: dict[str, Any]
) -> None:
    process = subprocess.Popen(
        stage.command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_for(tmp_path / "checkpoints" / "step=00000012.ckpt", process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert not (tmp_path / "checkpoints" / "step=00000040.ckpt").exists(), "killed too late"
    if number == signal.SIGTERM:
        assert process.returncode == 0, output.decode()
        assert b"saved" in output
        assert not (tmp_path / "report.md").exists()
    else:
        assert process.returncode == -signal.SIGKILL
    # Killed again before it has saved anything new: what it resumed from must still be whole.
    process = subprocess.Popen(
        stage.command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(b"step "):
            break
    process.kill()
    process.communicate()
    again = subprocess.run(stage.command(tmp_path), check=True, capture_output=True)
    assert b"Resuming from" in again.stdout + again.stderr
    for path in (tmp_path / "checkpoints").glob("step=*.ckpt"):
        state = torch.load(path, weights_only=True)
        assert state[stage.datamodule]["consumed"] == state["global_step"] * 2 * 2, path
    resumed = final_state(tmp_path)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "rng", stage.datamodule):
        assert_equal(straight[part], resumed[part], part)
    assert straight["global_step"] == resumed["global_step"] == 40


@pytest.mark.slow
def test_sigterm_to_one_of_two_ranks_saves_and_stops_both(
    pretraining: Stage, tmp_path: Path
) -> None:
    extra = ("--trainer.devices=2", "--trainer.strategy=ddp")
    process = subprocess.Popen(
        pretraining.command(tmp_path, *extra, "--trainer.max_steps=100000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_for(tmp_path / "checkpoints" / "step=00000008.ckpt", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output.decode()
    newest = sorted((tmp_path / "checkpoints").glob("step=*.ckpt"))[-1]
    assert f"saved {newest}".encode() in output
    state = torch.load(newest, weights_only=True)
    assert len(state["rng"]) == 2
    assert not torch.equal(state["rng"][0]["torch"], state["rng"][1]["torch"])
