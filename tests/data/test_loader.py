import itertools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from lit_llm.data.loader import Cursor, ResumableLoader, held_out_loader
from lit_llm.data.mixture import Mixture


class Numbers(Dataset):
    """Sample i holds i, and 1 + i % 3 targets."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        labels = torch.full((4,), -100)
        labels[1 : 2 + index % 3] = index
        return {"number": torch.tensor(index), "labels": labels}


def collate(samples):
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def count(batch):
    return int((batch["labels"] != -100).sum())


def make(consumed=0, *, size=40, batch=2, accumulate=1, workers=0, **options):
    cursor = Cursor(consumed)
    loader = ResumableLoader(
        Numbers(size),
        Mixture([size // 4, size - size // 4], [1, 1], seed=7),
        cursor,
        micro_batch_size=batch,
        collate_fn=collate,
        count_targets=count,
        accumulate=accumulate,
        num_workers=workers,
        **options,
    )
    return loader, cursor


def numbers(batch):
    return batch["number"].tolist()


def joined(batches):
    return list(itertools.chain.from_iterable(numbers(batch) for batch in batches))


def run(loader, epochs):
    return [batch for _ in range(epochs) for batch in loader]


def test_an_epoch_follows_the_stream_and_the_next_goes_on():
    loader, cursor = make(size=41, batch=2)
    assert len(loader) == 20
    seen = [number for batch in run(loader, 3) for number in numbers(batch)]
    # 41 samples are 20 batches: the 41st is the first of the second epoch, none is skipped.
    assert seen == Mixture([10, 31], [1, 1], seed=7).indices(0, 120).tolist()
    assert cursor.consumed == 120


@pytest.mark.parametrize(("ranks", "batch"), [(2, 4), (4, 2), (8, 1)])
def test_the_samples_of_a_step_do_not_depend_on_the_number_of_ranks(ranks, batch):
    one, _ = make(batch=8)
    many = [make(batch=batch, rank=r, world_size=ranks)[0] for r in range(ranks)]
    assert {len(loader) for loader in many} == {len(one)} == {5}
    for whole, *parts in zip(run(one, 2), *(run(loader, 2) for loader in many), strict=True):
        assert joined(parts) == numbers(whole)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 2, 3, 6, 7, 8, 13])
def test_resuming_anywhere_equals_a_straight_run(stop, workers):
    # 7 batches an epoch in windows of 3: 3 + 3 + 1.
    options = {"size": 28, "batch": 4, "accumulate": 3}
    straight = run(make(**options)[0], 3)
    loader, cursor = make(**options, workers=workers)
    first = []
    while len(first) < stop:
        for batch in loader:
            first.append(batch)
            if len(first) == stop:
                break
    assert cursor.consumed == 4 * stop  # what workers and the window hold ahead is not counted
    resumed, _ = make(cursor.consumed, **options, workers=workers)
    assert len(resumed) == 7
    rest = run(resumed, 3)[: 21 - stop]
    assert [numbers(batch) for batch in first + rest] == [numbers(batch) for batch in straight]
    if stop % 7 % 3 == 0:  # at the border of a window its targets are the same too
        targets = [int(batch["num_targets"]) for batch in straight]
        assert [int(batch["num_targets"]) for batch in first + rest] == targets


def test_a_checkpoint_of_two_ranks_resumes_on_one():
    ranks = [make(batch=2, rank=r, world_size=2) for r in range(2)]
    for loader, _ in ranks:
        batches = iter(loader)
        for _ in range(3):
            next(batches)
    consumed = ranks[0][1].consumed
    assert consumed == ranks[1][1].consumed == 12
    resumed, _ = make(consumed, batch=4)
    stream = Mixture([10, 30], [1, 1], seed=7)
    rest = [number for batch in resumed for number in numbers(batch)]
    assert rest == stream.indices(12, 40).tolist()


def test_targets_are_those_of_the_whole_window_the_last_one_shorter():
    loader, _ = make(size=28, batch=4, accumulate=3)
    stream = Mixture([7, 21], [1, 1], seed=7).indices(0, 28)
    windows = [stream[:12], stream[12:24], stream[24:]]
    expected = [sum(1 + int(number) % 3 for number in window) for window in windows]
    given = [batch["num_targets"] for batch in loader]
    assert [int(n) for n in given] == 3 * expected[:1] + 3 * expected[1:2] + expected[2:]
    assert given[0].shape == () and given[0].dtype == torch.int64


def test_resuming_inside_a_window_counts_what_is_left_of_it():
    stream = Mixture([7, 21], [1, 1], seed=7).indices(0, 28)
    loader, _ = make(4, size=28, batch=4, accumulate=3)
    left = sum(1 + int(number) % 3 for number in stream[4:12])
    given = [int(batch["num_targets"]) for batch in loader]
    assert given[:2] == [left, left]


def test_windows_follow_the_batches_that_the_trainer_counts():
    # After a resume with another number of ranks the cursor (4 batches) tells something else.
    loader, cursor = make(16, size=28, batch=4, accumulate=3, batches_done=lambda: 2)
    stream = Mixture([7, 21], [1, 1], seed=7).indices(16, 36)
    batches = list(loader)
    assert [number for batch in batches for number in numbers(batch)] == stream.tolist()
    windows = [stream[:4], stream[4:16], stream[16:]]  # batches 3 | 4 5 6 | 7 of the epoch
    expected = [sum(1 + int(number) % 3 for number in window) for window in windows]
    given = [int(batch["num_targets"]) for batch in batches]
    assert given == [expected[0], *3 * expected[1:2], expected[2]]
    assert cursor.consumed == 36


def test_making_iterators_without_reading_them_changes_nothing():
    loader, cursor = make()
    early = iter(loader)
    iter(loader)
    assert cursor.consumed == 0
    cursor.consumed = 8  # a checkpoint is loaded after the loader was made
    assert numbers(next(early)) == Mixture([10, 30], [1, 1], seed=7).indices(8, 10).tolist()


def test_max_batches_cuts_the_epoch_and_its_last_window():
    loader, _ = make(size=28, batch=4, accumulate=3, max_batches=4)
    assert len(loader) == 7
    stream = Mixture([7, 21], [1, 1], seed=7).indices(0, 32)
    epochs = [list(loader), list(loader)]
    assert [len(epoch) for epoch in epochs] == [4, 4]
    flat = [number for epoch in epochs for batch in epoch for number in numbers(batch)]
    assert flat == stream.tolist()
    last = epochs[0][-1]
    assert int(last["num_targets"]) == count(last)


@pytest.mark.parametrize("workers", [0, 1])
def test_iterating_leaves_the_global_random_states_alone(workers):
    loader, _ = make(workers=workers)
    held_out = held_out_loader(
        Numbers(5), micro_batch_size=2, collate_fn=collate, num_workers=workers
    )
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert len(list(loader)) == 20
    assert len(list(held_out)) == 3
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def test_the_loader_saves_its_cursor_for_lightning():
    loader, _ = make()
    next(iter(loader))
    other, cursor = make()
    other.load_state_dict(loader.state_dict())
    assert cursor.consumed == 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 5, 8])
def test_held_out_samples_are_counted_once_with_equal_batches_on_all_ranks(size, ranks):
    batches = [
        list(
            held_out_loader(
                Numbers(size), micro_batch_size=2, collate_fn=collate, rank=r, world_size=ranks
            )
        )
        for r in range(ranks)
    ]
    assert len({len(rank) for rank in batches}) == 1
    targets = sum(count(batch) for rank in batches for batch in rank)
    assert targets == sum(1 + number % 3 for number in range(size))
    if ranks == 1:
        assert joined(batches[0]) == list(range(size))
