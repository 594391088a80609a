"""k steps, SIGKILL, resume to m: the same weights, bit for bit, as m steps at once."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.recipes.ppo_runs import TIMINGS, UNMEASURED, everything_on

ROOT = Path(__file__).parents[2]


class Stage(NamedTuple):
    """A recipe with shuffling, mixing, accumulation, workers and dropout on."""

    recipe: str
    config: Path
    extra: tuple[str, ...]
    datamodule: str
    workers: tuple[str, ...] = ("--data.num_workers=2",)
    iteration: int = 0
    """Steps for which 8 prompts are taken at once; 0 where 2 x 2 samples are read every step."""

    def consumed(self, step: int) -> int:
        """Samples that are read up to the end of a step."""
        return 8 * -(-step // self.iteration) if self.iteration else step * 2 * 2

    def command(self, output: Path, *more: str) -> list[str]:
        return [
            sys.executable,
            str(ROOT / "recipes" / f"{self.recipe}.py"),
            f"--config={self.config}",
            f"--output_dir={output}",
            *self.workers,
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
    request: pytest.FixtureRequest,
    pretraining: Stage,
    tiny: Path,
    tiny_chat: Path,
    tiny_preferences: Path,
    tiny_ppo: Path,
) -> Stage:
    """Pre-training, fine-tuning of all weights and of adapters, a reward model, DPO, PPO."""
    if request.param == "pretrain":
        return pretraining
    if request.param == "ppo":
        extra = ("--model.ppo.num_ppo_epochs=3", "--trainer.max_epochs=-1", *UNMEASURED)
        extra += (*everything_on(tiny), "--checkpoint.every_n_steps=4", "--checkpoint.keep=2")
        return Stage("ppo", tiny_ppo / "ppo.yaml", extra, "PromptDataModule", (), iteration=6)
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


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a run that writes what it says to ``log``.

    Not to a pipe: the data loader's workers outlive a killed run by seconds, and hold it open.
    """
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def wait_for(
    sign: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 240
) -> None:
    """Wait until there is a sign while ``process`` lives."""
    end = time.monotonic() + seconds
    while not sign():
        assert process.poll() is None, "the run ended before it gave the sign"
        assert time.monotonic() < end, "the sign did not come"
        time.sleep(0.01)


def final_state(output: Path) -> dict[str, Any]:
    """The last checkpoint of a finished run."""
    path = output / "checkpoints" / "step=00000040.ckpt"
    state: dict[str, Any] = torch.load(path, weights_only=True)
    for name in TIMINGS:
        state.get("ppo", {}).get("rollout_metrics", {}).pop(name, None)
    return state


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


@pytest.mark.slow
@pytest.mark.timeout(600)  # five runs in turn, and other work may run beside
@pytest.mark.parametrize(
    ("stage", "signals"),
    [
        ("pretrain", (signal.SIGTERM, signal.SIGKILL)),  # one after the other, in one run
        pytest.param("full", (signal.SIGKILL,), marks=pytest.mark.thorough),
        ("lora", (signal.SIGKILL,)),
        pytest.param("reward", (signal.SIGKILL,), marks=pytest.mark.thorough),
        pytest.param("dpo", (signal.SIGKILL,), marks=pytest.mark.thorough),
        ("ppo", (signal.SIGKILL, signal.SIGKILL)),  # at an iteration's end, and within one
    ],
    indirect=["stage"],
    ids=lambda value: value if isinstance(value, str) else "-".join(one.name for one in value),
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    signals: tuple[signal.Signals, ...], stage: Stage, tmp_path: Path
) -> None:
    undisturbed, killed, log = (tmp_path / name for name in ("undisturbed", "killed", "log"))
    subprocess.run(stage.command(undisturbed), check=True, stdout=subprocess.DEVNULL)
    straight = final_state(undisturbed)
    checkpoints = killed / "checkpoints"
    for number, step in zip(signals, (12, 20), strict=False):
        reached = checkpoints / f"step={step:08d}.ckpt"
        assert not reached.exists(), "the signal before was answered too late"
        process = start(stage.command(killed), log)
        wait_for(reached.exists, process)
        process.send_signal(number)
        process.wait(timeout=120)
        assert not (checkpoints / "step=00000040.ckpt").exists(), "killed too late"
        if number == signal.SIGTERM:
            assert process.returncode == 0, log.read_text()
            assert "saved" in log.read_text()
            assert not (killed / "report.md").exists()
        else:
            assert process.returncode == -signal.SIGKILL
    # Killed again before it has saved anything new: what it resumed from must still be whole.
    process = start(stage.command(killed), log)
    wait_for(lambda: b"\nstep " in log.read_bytes(), process)
    process.kill()
    process.wait()
    again = subprocess.run(stage.command(killed), check=True, capture_output=True)
    assert b"Resuming from" in again.stdout + again.stderr
    for path in checkpoints.glob("step=*.ckpt"):
        state = torch.load(path, weights_only=True)
        assert state[stage.datamodule]["consumed"] == stage.consumed(state["global_step"]), path
    resumed = final_state(killed)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "rng", stage.datamodule):
        assert_equal(straight[part], resumed[part], part)
    assert_equal(straight.get("ppo"), resumed.get("ppo"), "ppo")
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
    wait_for((tmp_path / "checkpoints" / "step=00000008.ckpt").exists, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)  # until the second rank has ended, too
    assert process.returncode == 0, output.decode()
    newest = sorted((tmp_path / "checkpoints").glob("step=*.ckpt"))[-1]
    assert f"saved {newest}".encode() in output
    state = torch.load(newest, weights_only=True)
    assert len(state["rng"]) == 2
    assert not torch.equal(state["rng"][0]["torch"], state["rng"][1]["torch"])
