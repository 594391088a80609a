"""Modules and tensors that FSDP2 and tensor parallelism divide: their whole, and a rank's part."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard


def shard(module: nn.Module, settings: dict[str, Any]) -> None:
    """Shard a module; its class, which FSDP2 replaces, keeps its name in logs and checkpoints.

    Args:
        module: Its weights, but for those of parts that are sharded already, become shards.
        settings: For ``torch.distributed.fsdp.fully_shard``.
    """
    before = type(module)
    fully_shard(module, **settings)
    after = type(module)
    after.__name__, after.__qualname__ = before.__name__, before.__qualname__
    after.__module__ = before.__module__


def reshard(module: nn.Module | None) -> None:
    """Free the weights that a forward pass left gathered: after it ``parameters()`` are shards."""
    for child in () if module is None else module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


def whole(value: Tensor) -> Tensor:
    """The full tensor of a parameter or of what the optimizer keeps of it; all ranks have to ask.

    Args:
        value: As it is after ``reshard``; what no strategy divides is returned as it is.
    """
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_of(value: Tensor, like: DTensor) -> Tensor:
    """This rank's part of a whole tensor, without a word to the other ranks.

    FSDP2 divides what tensor parallelism has divided before, but lists its dimension of the mesh
    first: so the last dimension divides first.

    Args:
        value: The whole tensor.
        like: A tensor that is divided as it shall be.
    """
    place = like.device_mesh.get_coordinate()
    assert place is not None
    for dimension in reversed(range(like.device_mesh.ndim)):
        placement = like.placements[dimension]
        if isinstance(placement, (Shard, _StridedShard)):
            parts = like.device_mesh.size(dimension)
            chunks = value.chunk(parts, placement.dim)
            empty = value.narrow(placement.dim, 0, 0)  # fewer rows than ranks
            value = chunks[place[dimension]] if place[dimension] < len(chunks) else empty
    return value


def divided_as(value: Any, parameter: Tensor) -> Any:
    """What an optimizer keeps of a parameter, divided as that is; a count of steps stays as it is.

    Args:
        value: A whole tensor of the parameter's shape, or anything else.
        parameter: The parameter, divided or not.
    """
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or not value.ndim:
        return value
    local = shard_of(value, parameter).to(parameter.device).contiguous()
    return DTensor.from_local(
        local.clone(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


@torch.no_grad()
def make_equal(module: nn.Module, device: torch.device) -> None:
    """Give all ranks rank 0's weights where they differ, as they do if nothing was seeded.

    Args:
        module: The module, whole on each rank.
        device: Where the process group takes tensors from.
    """
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    sums = [tensor.sum(dtype=torch.float64) for tensor in tensors]
    mine = torch.stack(sums).to(device) if sums else torch.zeros(1, device=device)
    rank_zeros = mine.clone()
    dist.broadcast(rank_zeros, src=0)
    differ = (mine != rank_zeros).any().int()
    dist.all_reduce(differ)
    if not differ:
        return
    rank_zero_info("The ranks built different weights; all take those of rank 0")
    for tensor in tensors:
        sent = tensor.to(device)
        dist.broadcast(sent, src=0)
        tensor.copy_(sent)
