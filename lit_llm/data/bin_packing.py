"""Whole samples packed into rows of one capacity, none cut and hardly any padding.

Legend: N samples, C capacity of a bin in tokens, n tokens of a bin.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_llm.data.packing import IGNORED


def best_fit(lengths: Sequence[int], capacity: int, *, seed: int = 0) -> list[list[int]]:
    """Pack samples into few bins by best fit, longest first.

    Each sample goes to the bin with the least room that still holds it. Rooms are whole numbers, so
    the bin is found by bisection over the rooms that occur, at most C of them (best-fit packing:
    Ding et al. 2024, https://arxiv.org/abs/2404.10830). The result depends on the arguments only;
    samples of equal length are taken, and the samples within a bin lie, in random order.

    Args:
        lengths: Tokens of each of the N samples.
        capacity: C, the most tokens of a bin.
        seed: Seed of both random orders.

    Returns:
        The bins, each a list of indices into ``lengths``; every index occurs once.

    Raises:
        ValueError: When a length is below 1 or above the capacity.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    wrong = np.flatnonzero((sizes < 1) | (sizes > capacity))
    if len(wrong):
        raise ValueError(
            f"sample {wrong[0]} has {sizes[wrong[0]]} tokens; a bin takes 1 to {capacity}"
        )
    # Raw bits: only they are promised to be the same in every version of NumPy.
    ties, places = np.random.PCG64(seed).random_raw(2 * len(sizes)).reshape(2, -1)
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity)]  # bins with so many tokens left
    rooms: list[int] = []  # ascending, those that some bin has
    for index in np.lexsort((ties, -sizes)).tolist():
        length = int(sizes[index])
        position = bisect_left(rooms, length)
        if position == len(rooms):
            room, chosen = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[position]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del rooms[position]
        bins[chosen].append(index)
        if left := room - length:
            if not by_room[left]:
                insort(rooms, left)
            by_room[left].append(chosen)
    order = places.tolist()
    for packed in bins:
        packed.sort(key=order.__getitem__)
    return bins


class PackedSamples(Dataset[dict[str, Tensor]]):
    """Item ``i`` is the samples of bin ``i`` end to end, kept apart from each other.

    An item is a dict of ``input_ids`` and ``labels`` (n,) aligned with them, ``document_ids`` (n,),
    counted from 0 within the bin, ``position_ids`` (n,), which restart with every sample, and
    ``source`` (). All are long. The first token of a sample is no target, since the tokens before
    it are not its context.

    Args:
        samples: Dicts with ``input_ids`` and ``labels``, each long and of one length.
        bins: Indices of the samples in each bin.
        source: Index of the source, copied into every item.
    """

    def __init__(
        self, samples: Dataset[dict[str, Tensor]], bins: Sequence[Sequence[int]], source: int
    ) -> None:
        self.samples = samples
        self.source = source
        # Two arrays instead of a list a bin: workers get them as they are, and share them.
        self._indices = np.fromiter(chain.from_iterable(bins), dtype=np.int64)
        self._ends = np.cumsum([len(packed) for packed in bins], dtype=np.int64)

    def __len__(self) -> int:
        """The number of bins."""
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Bin ``index``, counted from 0."""
        if not 0 <= index < len(self):
            raise IndexError(f"bin {index} of {len(self)}")
        start = self._ends[index - 1] if index else 0
        samples = [self.samples[int(i)] for i in self._indices[start : self._ends[index]]]
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        begins = lengths.cumsum(0) - lengths
        labels = torch.cat([sample["labels"] for sample in samples])
        labels[begins] = IGNORED
        return {
            "input_ids": torch.cat([sample["input_ids"] for sample in samples]),
            "labels": labels,
            "document_ids": torch.arange(len(samples)).repeat_interleave(lengths),
            "position_ids": torch.arange(len(labels)) - begins.repeat_interleave(lengths),
            "source": torch.tensor(self.source),
        }


class UnpackedSamples(Dataset[dict[str, Tensor]]):
    """Item ``i`` is sample ``i``: ``input_ids`` (n,), ``labels`` (n,) and ``source`` (), long.

    Args:
        samples: Dicts with ``input_ids`` and ``labels``, each long and of one length.
        source: Index of the source, copied into every item.
    """

    def __init__(self, samples: Dataset[dict[str, Tensor]], source: int) -> None:
        self.samples = samples
        self.source = source

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample ``index``, counted from 0."""
        sample = self.samples[index]
        return {
            "input_ids": sample["input_ids"],
            "labels": sample["labels"],
            "source": torch.tensor(self.source),
        }
