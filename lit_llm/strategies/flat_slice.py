"""Slices of flattened tensors, as ``torch.distributed.checkpoint`` stores tensors: in blocks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class FlatSlice(Tensor):
    """A rank's slice of a flattened tensor, as ``torch.distributed.checkpoint`` wants it: blocks.

    FSDP1 cuts a parameter anywhere in its flattened form. Such a slice is the end of a row, whole
    rows, and the beginning of a row; each is a block of the whole tensor.

    Args:
        local: The slice, 1-D; blocks are views of it, so what is loaded lands in it.
        start: Where it begins in the flattened tensor.
        shape: The whole tensor's.
    """

    _blocks: dict[tuple[int, ...], Tensor]

    @staticmethod
    def __new__(cls: Any, local: Tensor, start: int, shape: torch.Size) -> FlatSlice:  # noqa: D102
        whole: FlatSlice = Tensor._make_wrapper_subclass(
            cls, shape, dtype=local.dtype, device=local.device
        )
        local, whole._blocks = local.detach(), {}
        for offsets, sizes in blocks(start, start + local.numel(), tuple(shape)):
            begin = sum(o * math.prod(shape[d + 1 :]) for d, o in enumerate(offsets)) - start
            view = local[begin : begin + math.prod(sizes)].view(sizes)
            whole._blocks[offsets] = view
        return whole

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{func} on a slice, which is only saved and loaded")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"FlatSlice of {tuple(self.shape)}: {list(self._blocks)}"

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties(dtype=self.dtype),
                    size=self.shape,
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=block.shape)
            for offsets, block in self._blocks.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self._blocks[tuple(index.offset or ())]


def blocks(
    start: int, end: int, shape: tuple[int, ...]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a range of a flattened tensor into blocks of the tensor.

    Args:
        start: First element of the range.
        end: One past its last.
        shape: The tensor's.

    Returns:
        Offsets and sizes of the blocks, in the order of the range, each contiguous in it.
    """
    if start >= end:
        return []
    if not shape:
        return [((), ())]
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # rows that are whole
    if first > last:  # within one row
        parts = [(last, start, end)]
    else:
        parts = [(first - 1, start, first * row), (last, last * row, end)]
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for place, (at, begin, stop) in enumerate(parts):
        if place == 1 and first < last:
            found.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
        inner = blocks(begin - at * row, stop - at * row, shape[1:])
        found += [((at, *offsets), (1, *sizes)) for offsets, sizes in inner]
    return found
