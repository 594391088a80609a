"""What a newcomer gets wrong with several devices, told in a sentence before a rank is started."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch.distributed import checkpoint as dcp

from lit_llm.errors import UserError
from lit_llm.strategies.fsdp1 import FSDP1Strategy
from lit_llm.strategies.fsdp2 import FSDP2Strategy
from lit_llm.strategies.launch import check_launch

ROOT = Path(__file__).parents[2]


def trainer(strategy, devices=2, **settings):
    return Trainer(strategy=strategy, accelerator="cpu", devices=devices, logger=False, **settings)


def zero(**settings):
    pytest.importorskip("deepspeed", reason="needs deepspeed: pip install 'deepspeed>=0.19.8'")
    from lit_llm.strategies.zero import ZeROStrategy

    return ZeROStrategy(**settings)


@pytest.mark.parametrize("devices", [1, 3])
def test_devices_that_make_up_no_groups(devices):
    asked = trainer(FSDP2Strategy(tensor_parallel_size=2), devices)
    with pytest.raises(UserError, match=rf"tensor_parallel_size.*all nodes, {devices}; change"):
        check_launch(asked)
    check_launch(trainer(FSDP2Strategy(tensor_parallel_size=2), 4))


def test_nodes_without_a_launcher_that_would_wait_for_one_another(monkeypatch):
    for name in ("NODE_RANK", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"num_nodes 3 .*torchrun.sh"):
        check_launch(trainer("ddp", num_nodes=3))
    monkeypatch.setenv("NODE_RANK", "0")  # somebody starts it on the others
    check_launch(trainer("ddp", num_nodes=3))


def test_half_gather_without_half_precision():
    with pytest.raises(UserError, match="needs --trainer.precision bf16-mixed, not 32-true"):
        check_launch(trainer(FSDP2Strategy(half_gather=True)))
    with pytest.raises(UserError, match="needs --trainer.precision bf16-mixed, not 32-true"):
        check_launch(trainer(FSDP1Strategy(half_gather=True)))
    with pytest.raises(UserError, match="needs --trainer.precision bf16-mixed, not bf16-true"):
        check_launch(trainer(zero(half_gather=True), precision="bf16-true"))
    for strategy in (FSDP1Strategy(half_gather=True), FSDP2Strategy(half_gather=True)):
        check_launch(trainer(strategy, precision="bf16-mixed"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"gradient_clip_algorithm": "value"}, "gradient_clip_algorithm at norm"),
        ({"precision": "16-mixed"}, "--trainer.precision 16-mixed"),
    ],
)
def test_what_deepspeed_does_not_do(settings, told):
    with pytest.raises(UserError, match=told):
        check_launch(trainer(zero(), **settings))


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A sharded checkpoint as FSDP writes it, of one rank."""
    path = tmp_path / "step=00000001.ckpt"
    dcp.save({"state_dict.w": torch.ones(2)}, checkpoint_id=path, no_dist=True)
    meta = {"checkpoint": {}, "param_groups": [], "names": {"w": "w"}}
    torch.save(meta, path / "meta.pt")
    return path


@pytest.fixture
def zero_parts(tmp_path: Path) -> Path:
    """A sharded checkpoint as two ranks write it under ZeRO-2, without its contents."""
    path = tmp_path / "step=00000002.ckpt"
    (path / "checkpoint").mkdir(parents=True)
    names = ["model_states.pt", "rank_0_optim_states.pt", "rank_1_optim_states.pt"]
    for name in names:
        (path / "checkpoint" / name).write_bytes(b"1234")
    torch.save({"zero": {"stage": 2, "parts": dict.fromkeys(names, 4)}}, path / "meta.pt")
    return path


@pytest.mark.parametrize("make", [FSDP1Strategy, FSDP2Strategy])
def test_parts_of_fsdp(parts, zero_parts, make):
    check_launch(trainer(make()), parts)
    with pytest.raises(UserError, match="was written by DeepSpeed; resume with"):
        check_launch(trainer(make()), zero_parts)
    with pytest.raises(UserError, match="sharded checkpoint.*does not read; resume with"):
        check_launch(trainer("ddp"), parts)


@pytest.mark.parametrize("name", ["meta.pt", ".metadata"])
def test_half_of_a_folder_of_fsdp(parts, name):
    (parts / name).unlink()
    with pytest.raises(UserError, match=f"{parts} is incomplete or damaged.*take another"):
        check_launch(trainer(FSDP2Strategy()), parts)


def test_parts_of_zero(parts, zero_parts):
    check_launch(trainer(zero(stage=2)), zero_parts)
    with pytest.raises(UserError, match="by ZeRO stage 2, this is stage 3; resume with"):
        check_launch(trainer(zero(stage=3)), zero_parts)
    with pytest.raises(UserError, match="written by 2 ranks and there are 4 now; run as many"):
        check_launch(trainer(zero(stage=2), 4), zero_parts)
    with pytest.raises(UserError, match="no checkpoint of a deepspeed strategy; resume with"):
        check_launch(trainer(zero(stage=2)), parts)


@pytest.mark.parametrize("name", ["model_states.pt", "rank_1_optim_states.pt"])
def test_half_of_a_folder_of_zero(zero_parts, name):
    part = zero_parts / "checkpoint" / name
    for spoil in (lambda: part.write_bytes(b"123"), part.unlink):
        spoil()
        with pytest.raises(UserError, match=f"incomplete \\({name} is missing.*; take another"):
            check_launch(trainer(zero(stage=2)), zero_parts)


@pytest.mark.parametrize(
    ("own", "args", "told"),
    [
        ({"NODES": "2", "NODE": "1"}, ["recipes/sft.py"], "needs MASTER=HOST:PORT"),
        ({"NODES": "2", "MASTER": "host0"}, ["recipes/sft.py"], "needs MASTER=HOST:PORT"),
        ({"DEVICES": "1"}, [], "which recipe"),
    ],
)
def test_the_launch_file_says_what_it_misses(own, args, told):
    outer = {k: v for k, v in os.environ.items() if k not in ("NODES", "NODE", "MASTER")}
    done = subprocess.run(
        ["bash", "recipes/launch/torchrun.sh", *args],
        cwd=ROOT,
        env=outer | own,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
