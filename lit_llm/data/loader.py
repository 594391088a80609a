"""Loaders of micro-batches that resume exactly, for every stage.

Training reads a stream of samples that has no end and does not depend on ranks or workers; one
integer, the number of samples consumed, says how far it was read. Lightning keeps its own count of
batches, so a loader's length is always that of the whole epoch, never what is left of it.

Legend: B samples of a micro-batch, W ranks (data parallel), N micro-batches of an accumulation
window.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

Batch = dict[str, Any]


class SampleStream(Protocol):
    """An endless order of samples, the same for every number of ranks (see ``Mixture``)."""

    def __len__(self) -> int:
        """Samples of an epoch."""

    def indices(self, start: int, stop: int) -> NDArray[np.int64]:
        """Dataset indices of the stream's positions ``start ... stop - 1``."""


@dataclass
class Cursor:
    """How far the stream was read: one object, shared by the data module and its loaders.

    Args:
        consumed: Samples handed out so far, over all ranks and epochs. What workers or an
            accumulation window hold ahead does not count.
    """

    consumed: int = 0


class ResumableLoader:
    """Micro-batches of a sample stream from the cursor on.

    Rank r of W takes the samples ``c + r B ... c + (r + 1) B - 1`` of the stream, c being the
    cursor, which then moves by W B. One iteration ends with the epoch of ``epoch_batches``
    micro-batches; the next one goes on in the stream, nothing is skipped in between. An iterator
    reads the cursor when its first batch is asked for, so making one early, or twice, is harmless.
    Iterating draws nothing from the global random states.

    Each batch also gets ``num_targets``, a long (): the targets of its whole accumulation
    window on this rank. The windows are those of Lightning: N micro-batches from the start of the
    epoch, the last one shorter. After a resume inside a window it has only what is left, since the
    gradient of the rest is gone.

    Args:
        dataset: Samples by index. A sample must depend on its index only.
        stream: The order of the samples.
        cursor: Where to start; moved with every batch that is handed out.
        micro_batch_size: B.
        collate_fn: Makes a batch from a list of samples.
        count_targets: Target tokens of a batch.
        accumulate: N, the micro-batches of an optimizer step (``trainer.accumulate_grad_batches``).
        rank: r, this process among the data-parallel ones.
        world_size: W.
        batches_done: Tells how many micro-batches of the epoch are behind, once the next one is
            asked for. Give Lightning's own count: the windows then end where it steps, even after a
            resume with another number of ranks. By default it follows from the cursor.
        length: Micro-batches of an epoch; by default as many as one pass over the stream fills. A
            run measured in steps is one epoch, so that progress and time left mean the run.
        max_batches: Cut the epoch to so many micro-batches (``trainer.limit_train_batches``).
        num_workers: Processes that prepare batches ahead; 0 does it in this one.
        seed: Seed of the workers.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        stream: SampleStream,
        cursor: Cursor,
        *,
        micro_batch_size: int,
        collate_fn: Callable[[list[Any]], Batch],
        count_targets: Callable[[Batch], int],
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        batches_done: Callable[[], int] | None = None,
        length: int | None = None,
        max_batches: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        self.dataset = dataset
        self.stream = stream
        self.cursor = cursor
        self.micro_batch_size = micro_batch_size
        self.collate_fn = collate_fn
        self.count_targets = count_targets
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.seed = seed
        self.batches_done = batches_done
        self.length = len(stream) // self.global_batch if length is None else length
        self.epoch_batches = len(self) if max_batches is None else min(len(self), max_batches)

    def __len__(self) -> int:
        """Micro-batches of a whole epoch on each rank, whatever the cursor says."""
        return self.length

    @property
    def global_batch(self) -> int:
        """Samples that one micro-batch takes from the stream over all ranks."""
        return self.micro_batch_size * self.world_size

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the epoch."""
        if not self.epoch_batches:
            return
        start = self.cursor.consumed
        if self.batches_done is None:
            done = start // self.global_batch % self.epoch_batches
        else:
            done = self.batches_done()
        left = self.epoch_batches - done
        # A generator of its own: without one a DataLoader draws its workers' seed from the global
        # state.
        loader = DataLoader(
            self.dataset,
            batch_sampler=self._index_lists(start, left),
            collate_fn=self.collate_fn,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed + start),
        )
        batches = iter(loader)
        while done < self.epoch_batches:
            window = list(itertools.islice(batches, self.accumulate - done % self.accumulate))
            targets = torch.tensor(sum(self.count_targets(batch) for batch in window))
            for batch in window:
                done += 1
                start += self.global_batch
                self.cursor.consumed = start
                yield {**batch, "num_targets": targets.clone()}

    def _index_lists(self, start: int, batches: int) -> Iterator[list[int]]:
        for number in range(batches):
            first = start + number * self.global_batch + self.rank * self.micro_batch_size
            yield self.stream.indices(first, first + self.micro_batch_size).tolist()

    # With these two Lightning knows that the loader resumes, and does not warn that it cannot. The
    # data module saves the same number, because Lightning drops a loader's state when it builds the
    # loader early.
    def state_dict(self) -> dict[str, int]:
        """The cursor, for Lightning's checkpoint."""
        return {"consumed": self.cursor.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Set the cursor."""
        self.cursor.consumed = state["consumed"]


def held_out_loader(
    dataset: Dataset[Batch],
    *,
    micro_batch_size: int,
    collate_fn: Callable[[list[Any]], Batch],
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> DataLoader[Batch]:
    """A loader that reads every sample once, over all ranks, with as many batches on each.

    Where the samples do not divide evenly, the ranks that run short get a sample whose labels are
    all -100: no collective waits for ever, and nothing is counted twice.

    Args:
        dataset: Samples by index, dicts with ``labels``.
        micro_batch_size: Samples of a batch.
        collate_fn: Makes a batch from a list of samples.
        rank: This process among the data-parallel ones; it reads the samples rank, rank + W, ...
        world_size: W.
        num_workers: Processes that prepare batches ahead; 0 does it in this one.
    """
    return DataLoader(
        _RankShare(dataset, rank, world_size),
        batch_size=micro_batch_size,
        collate_fn=collate_fn,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),  # leave the global random state alone
    )


class _RankShare(Dataset[Batch]):
    """The samples of one rank, filled up with an ignored one to the same number on all."""

    def __init__(self, dataset: Dataset[Batch], rank: int, world_size: int) -> None:
        self.dataset = dataset
        self.rank = rank
        self.world_size = world_size
        self.total = len(dataset)  # type: ignore[arg-type]  # Dataset does not declare its length
        self.share = math.ceil(self.total / world_size)

    def __len__(self) -> int:
        return self.share

    def __getitem__(self, index: int) -> Batch:
        number = index * self.world_size + self.rank
        if number < self.total:
            return self.dataset[number]
        sample = self.dataset[0]
        return {**sample, "labels": torch.full_like(sample["labels"], -100)}
