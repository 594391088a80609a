"""Checkpoint folders: written by two ranks, read by others, whole or absent."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_llm.errors import UserError
from lit_llm.strategies.flat_slice import FlatSlice, blocks
from lit_llm.strategies.sharded_checkpoint import (
    load_optimizer,
    load_weights,
    module_entries,
    read_sharded,
    save_sharded,
)

# ----- slices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (4, 1), (2, 3, 4), (3, 1, 2, 2)])
def test_blocks_cover_a_range_once_and_in_order(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    whole = torch.arange(size).reshape(shape)
    for start, end in itertools.combinations_with_replacement(range(size + 1), 2):
        found = [
            whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].flatten()
            for offsets, sizes in blocks(start, end, shape)
        ]
        assert torch.cat([*found, whole.new_empty(0)]).tolist() == list(range(start, end))


# ----- one process ------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def small(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 1, bias=False)})
    model["a"].register_buffer("scale", torch.rand(2))
    model["a"].register_buffer("unsaved", torch.rand(2), persistent=False)
    model["c"] = model["b"]
    groups = [{"params": [model["a"].weight]}, {"params": [model["a"].bias, model["b"].weight]}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for parameter in [model["a"].weight, model["b"].weight]:  # none of the bias
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    return model, optimizer


def test_one_process_reads_what_it_wrote(group: None, tmp_path: Path) -> None:
    model, optimizer = small(0)
    extra = {"epoch": 3, "state_dict": {}, "optimizer_states": [{}]}
    save_sharded(tmp_path / "x.ckpt", extra, model, [optimizer])
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]
    found = read_sharded(tmp_path / "x.ckpt")
    expected = model.state_dict()
    assert list(found["state_dict"]) == list(expected)
    assert all(torch.equal(found["state_dict"][n], v) for n, v in expected.items())
    assert found["state_dict"]["b.weight"] is found["state_dict"]["c.weight"]
    state = optimizer.state_dict()
    assert found["optimizer_states"][0]["param_groups"] == state["param_groups"]
    assert found["optimizer_states"][0]["state"].keys() == {0, 2} == state["state"].keys()
    for number, key in itertools.product(state["state"], ("exp_avg", "exp_avg_sq", "step")):
        value = found["optimizer_states"][0]["state"][number][key]
        assert torch.equal(value, state["state"][number][key])
    assert found["epoch"] == 3
    assert "optimizer_states" not in read_sharded(tmp_path / "x.ckpt", with_optimizers=False)


def test_what_is_left_out_is_neither_saved_nor_asked_for(group: None, tmp_path: Path) -> None:
    model, _ = small(0)
    left_out = {"a.bias"}
    save_sharded(tmp_path / "x.ckpt", {}, model, left_out=left_out)
    assert "a.bias" not in read_sharded(tmp_path / "x.ckpt")["state_dict"]
    other, _ = small(1)
    bias = other["a"].bias.detach().clone()
    with pytest.raises(UserError, match="another model: a.bias exists only here"):
        load_weights(tmp_path / "x.ckpt", other)
    load_weights(tmp_path / "x.ckpt", other, left_out=left_out)
    assert torch.equal(other["a"].bias, bias)
    assert torch.equal(other["a"].weight, model["a"].weight)
    assert torch.equal(other["a"].scale, model["a"].scale)
    assert not torch.equal(other["a"].unsaved, model["a"].unsaved)


def test_slices_take_their_part_alone(group: None, tmp_path: Path) -> None:
    model, _ = small(0)
    save_sharded(tmp_path / "x.ckpt", {}, model)
    other, _ = small(1)
    before = {name: value.detach().clone() for name, value in module_entries(other)}

    def whole(name: str, tensor: Tensor) -> Tensor:
        return FlatSlice(tensor.view(-1)[1:-1], 1, tensor.shape) if tensor.numel() > 2 else tensor

    load_weights(tmp_path / "x.ckpt", other, whole=whole)
    for name, value in model.named_parameters():
        expected = before[name].flatten()
        expected[1:-1] = value.detach().flatten()[1:-1]
        assert torch.equal(dict(module_entries(other))[name].flatten(), expected), name


def test_optimizers_take_state_and_options(group: None, tmp_path: Path) -> None:
    model, optimizer = small(0)
    save_sharded(tmp_path / "x.ckpt", {}, model, [optimizer])
    other, mine = small(1)
    mine.param_groups[0]["lr"] = 7.0
    mine.step()
    load_optimizer(tmp_path / "x.ckpt", other, mine)
    assert mine.param_groups[0]["lr"] == 0.1
    expected, found = optimizer.state_dict()["state"], mine.state_dict()["state"]
    assert found.keys() == expected.keys()
    for number, key in itertools.product(expected, ("exp_avg", "exp_avg_sq", "step")):
        assert torch.equal(found[number][key], expected[number][key])
        assert found[number][key].dtype == expected[number][key].dtype
    fewer = torch.optim.AdamW(other["a"].parameters())
    with pytest.raises(UserError, match="optimizer trains other parameters"):
        load_optimizer(tmp_path / "x.ckpt", other, fewer)


def test_another_shape_is_named(group: None, tmp_path: Path) -> None:
    model, _ = small(0)
    save_sharded(tmp_path / "x.ckpt", {}, model)
    model["a"] = nn.Linear(3, 5)
    model["a"].register_buffer("scale", torch.rand(2))
    with pytest.raises(UserError, match=r"a.weight has shape \(4, 3\) there and \(5, 3\) here"):
        load_weights(tmp_path / "x.ckpt", model)


def test_a_failed_save_leaves_the_old_folder(
    group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = small(0)
    path = tmp_path / "x.ckpt"
    save_sharded(path, {"epoch": 1}, model)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("torch.distributed.checkpoint.save", fail)
        with pytest.raises(OSError, match="disk full"):
            save_sharded(path, {"epoch": 2}, model)
    assert read_sharded(path)["epoch"] == 1
    assert (tmp_path / "x.ckpt.partial").exists()
    save_sharded(path, {"epoch": 3}, model)
    assert read_sharded(path)["epoch"] == 3
    assert [found.name for found in tmp_path.iterdir()] == ["x.ckpt"]


def test_broken_folders_end_in_one_sentence(group: None, tmp_path: Path) -> None:
    model, _ = small(0)
    with pytest.raises(UserError, match="no checkpoint at"):
        read_sharded(tmp_path / "absent")
    for name in ("meta.pt", ".metadata"):
        save_sharded(tmp_path / "x.ckpt", {}, model)
        (tmp_path / "x.ckpt" / name).unlink()
        with pytest.raises(UserError, match="x.ckpt is incomplete or damaged"):
            read_sharded(tmp_path / "x.ckpt")
    save_sharded(tmp_path / "x.ckpt", {}, model)
    (data,) = (tmp_path / "x.ckpt").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(UserError, match="x.ckpt is damaged"):
        read_sharded(tmp_path / "x.ckpt")
