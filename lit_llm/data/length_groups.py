"""Samples of similar length side by side, so that batches hold little padding.

Legend: L samples of an epoch, c a chunk's positions (``blocks * block``).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lit_llm.data.loader import SampleStream


class LengthGroups:
    """The samples of a stream, reordered so that those of similar length stand side by side.

    The positions ``k * block ... (k + 1) * block - 1`` hold samples that follow each other by
    length. This is so within chunks of c positions: their samples are sorted, cut into blocks, and
    the blocks stand in random order, so short and long ones alternate. Chunks end with the epoch
    too, so each epoch has the samples that it has without grouping; a block that is cut by the end
    of an epoch is two short ones.

    Like the stream, the order is a function of the position alone: a run resumes anywhere.

    Args:
        stream: The order that is grouped.
        lengths: (samples,) tokens of each sample, by the indices that the stream gives.
        block: Positions of a block, a micro-batch.
        seed: Seed of the order of the blocks.
        blocks: Blocks of a chunk. More of them make the lengths in a block more alike, and move a
            sample further from where the stream has it.
    """

    def __init__(
        self,
        stream: SampleStream,
        lengths: Sequence[int] | NDArray[np.int64],
        block: int,
        seed: int = 0,
        blocks: int = 64,
    ) -> None:
        self.stream = stream
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.block = block
        self.seed = seed
        self.chunk = blocks * block
        self._last: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        """L, the samples of an epoch."""
        return len(self.stream)

    def indices(self, start: int, stop: int) -> NDArray[np.int64]:
        """Dataset indices of the positions ``start ... stop - 1``.

        Args:
            start: First position, from 0.
            stop: Position after the last.
        """
        parts = [np.empty(0, dtype=np.int64)]
        while start < stop:
            first, grouped = self._chunk_at(start)
            parts.append(grouped[start - first : stop - first])
            start += len(parts[-1])
        return np.concatenate(parts)

    def _chunk_at(self, position: int) -> tuple[int, NDArray[np.int64]]:
        """First position of the chunk that a position lies in, and the chunk's samples."""
        epoch, number = position // len(self), position // self.chunk
        first = max(epoch * len(self), number * self.chunk)
        # Batch after batch asks for the same chunk.
        if self._last is None or self._last[0] != first:
            last = min((epoch + 1) * len(self), (number + 1) * self.chunk)
            self._last = first, self._grouped(first, last, [self.seed, epoch, number])
        return self._last

    def _grouped(self, first: int, last: int, seeds: list[int]) -> NDArray[np.int64]:
        # Blocks are counted from position 0, not from the epoch's first: a run's batches are too.
        borders = range(first - first % self.block + self.block, last, self.block)
        sizes = np.diff([first, *borders, last])
        # Raw bits: only they are promised to be the same in every version of NumPy.
        bits = np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(len(sizes))
        order = np.argsort(bits, kind="stable")  # the shortest samples go to block order[0]
        samples = self.stream.indices(first, last)
        samples = samples[np.argsort(self.lengths[samples], kind="stable")]
        runs = np.split(samples, np.cumsum(sizes[order])[:-1])
        return np.concatenate([runs[rank] for rank in np.argsort(order)])
