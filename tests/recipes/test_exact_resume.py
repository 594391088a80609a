"""k steps, SIGKILL, resume to m: the same weights, bit for bit, as m steps at once."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def command(tiny: Path, output: Path, *extra: str) -> list[str]:
    """The pre-training recipe with shuffling, mixing, accumulation, workers and dropout on."""
    return [
        sys.executable,
        str(ROOT / "recipes" / "pretrain.py"),
        f"--config={tiny / 'tiny.yaml'}",
        f"--output_dir={output}",
        "--data.num_workers=2",
        "--data.isolate_documents=true",  # windows with different numbers of targets
        "--trainer.max_steps=40",
        *extra,
    ]


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
def straight(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run that nobody disturbs."""
    output = tmp_path_factory.mktemp("straight")
    subprocess.run(command(tiny, output), check=True, stdout=subprocess.DEVNULL)
    return final_state(output)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    number: signal.Signals, tiny: Path, tmp_path: Path, straight: dict[str, Any]
) -> None:
    process = subprocess.Popen(
        command(tiny, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
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
        command(tiny, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(b"step "):
            break
    process.kill()
    process.communicate()
    again = subprocess.run(command(tiny, tmp_path), check=True, capture_output=True)
    assert b"Resuming from" in again.stdout + again.stderr
    for path in (tmp_path / "checkpoints").glob("step=*.ckpt"):
        state = torch.load(path, weights_only=True)
        assert state["TextDataModule"]["consumed"] == state["global_step"] * 2 * 2, path
    resumed = final_state(tmp_path)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "rng", "TextDataModule"):
        assert_equal(straight[part], resumed[part], part)
    assert straight["global_step"] == resumed["global_step"] == 40


@pytest.mark.slow
def test_sigterm_to_one_of_two_ranks_saves_and_stops_both(tiny: Path, tmp_path: Path) -> None:
    extra = ("--trainer.devices=2", "--trainer.strategy=ddp")
    process = subprocess.Popen(
        command(tiny, tmp_path, *extra, "--trainer.max_steps=100000"),
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
