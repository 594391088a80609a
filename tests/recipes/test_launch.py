"""The launch files: two nodes of one process each, on the loopback; one dies, the job goes on."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_llm.strategies.checkpoint_io import read_checkpoint
from tests.strategies.recipe_cases import arguments, run, write_settings

ROOT = Path(__file__).parents[2]
STEPS = 12
KILLED_AT = 5  # checkpoints are written every 2 steps
EVERY = ("--checkpoint.every_n_steps=2", "--checkpoint.keep=-1", "--data.test_fraction=0")

# Two processes that import torch, several times over.
pytestmark = [pytest.mark.thorough, pytest.mark.timeout(400)]


def struck(step: int, **more: Any) -> list[str]:
    settings = {"step": step, **more}
    given = ["--trainer.callbacks+=tests.recipes.launch_parts.Strike"]
    return given + [f"--trainer.callbacks.init_args.{k}={v}" for k, v in settings.items()]


def environment(**own: str) -> dict[str, str]:
    """That of a shell on a node, with this Python first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    outer = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC"))}
    return outer | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | own


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def two_nodes(folder: Path, args: list[str]) -> list[tuple[int, str]]:
    """Start the torchrun file on both nodes; exit codes and what they printed."""
    port, nodes = free_port(), []
    for number in range(2):
        own = {"NODES": "2", "NODE": str(number), "MASTER": f"127.0.0.1:{port}", "DEVICES": "1"}
        with (folder / f"node{number}.log").open("w") as log:
            nodes.append(
                subprocess.Popen(
                    ["bash", "recipes/launch/torchrun.sh", "recipes/pretrain.py", *args],
                    cwd=ROOT,
                    env=environment(**own),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    codes = [node.wait(timeout=200) for node in nodes]
    return [(code, (folder / f"node{n}.log").read_text()) for n, code in enumerate(codes)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_settings(tmp_path_factory.mktemp("settings"))


@pytest.fixture(scope="module")
def straight(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of one process that sees the same batches and does not stop."""
    output = tmp_path_factory.mktemp("straight")
    run("pretrain", arguments(settings, "pretrain", output, None, *EVERY))
    return weights(output)


def weights(output: Path) -> dict[str, torch.Tensor]:
    last = read_checkpoint(output / "checkpoints" / f"step={STEPS:08d}.ckpt")
    return {name: value.clone() for name, value in last["state_dict"].items()}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def nodes_arguments(settings: Path, output: Path) -> list[str]:
    given = arguments(settings, "pretrain", output, "ddp", *EVERY)
    return [one for one in given if not one.startswith("--trainer.devices")]


def test_a_node_dies_and_the_job_goes_on_with_two_nodes_or_one(
    settings: Path, straight: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    args = nodes_arguments(settings, output)
    killed = two_nodes(tmp_path, [*args, *struck(KILLED_AT, rank=1)])
    assert all(code != 0 for code, _ in killed), "the node that is left has to end too"
    names = sorted(path.name for path in (output / "checkpoints").glob("*.ckpt"))
    assert names == ["step=00000002.ckpt", "step=00000004.ckpt"]

    shutil.copytree(output, tmp_path / "alone")
    for code, log in two_nodes(tmp_path, args):
        assert code == 0, log[-3000:]
    assert difference(weights(output), straight) < 1e-5

    # One process takes twice as many micro-batches for the same step, and for the same epoch.
    alone = tmp_path / "alone"
    newest = f"--resume={alone}/checkpoints/step=00000004.ckpt"
    run("pretrain", arguments(settings, "pretrain", alone, None, *EVERY, newest))
    assert difference(weights(alone), straight) < 1e-5


def test_a_slurm_job_saves_before_its_time_is_over_and_queues_again(
    settings: Path, straight: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    output, bin_folder = tmp_path / "run", tmp_path / "bin"
    bin_folder.mkdir()
    commands = {
        "srun": f'exec "{sys.executable}" -m tests.recipes.launch_parts "$@"',
        "scontrol": f'echo "$@" >> "{tmp_path}/scontrol.log"',
    }
    for name, line in commands.items():
        (bin_folder / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (bin_folder / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": str(free_port()),  # Lightning makes the port of it
        "SLURM_JOB_NAME": "lit_llm",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_JOB_NODELIST": "127.0.0.1",
    }
    env = environment(**job)
    env["PATH"] = f"{bin_folder}{os.pathsep}{env['PATH']}"
    command = ["bash", "recipes/launch/slurm.sbatch", "recipes/pretrain.py"]
    command += nodes_arguments(settings, output)
    shell = tmp_path / "shell.pid"
    strike = struck(KILLED_AT, rank=1, number=int(signal.SIGTERM), file=shell)

    def submit(*more: str) -> str:
        # SLURM signals the job's own shell; its pid is known once it has started.
        starter = ["bash", "-c", f'echo $$ > "{shell}"; exec "$@"', "job", *command, *more]
        done = subprocess.run(
            starter, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    assert "SIGTERM: saved" in submit(*strike)
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {job['SLURM_JOB_ID']}\n"
    assert not (output / "checkpoints" / f"step={STEPS:08d}.ckpt").exists()
    submit()
    assert (tmp_path / "scontrol.log").read_text().count("requeue") == 1
    assert difference(weights(output), straight) < 1e-5
