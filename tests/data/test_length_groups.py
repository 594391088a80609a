"""Grouping by length: the same samples an epoch, in sorted blocks, from any point."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_llm.data.length_groups import LengthGroups
from lit_llm.data.mixture import Mixture


class Plain:
    """The stream 0, 1, ..., size - 1, and so again each epoch."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def indices(self, start, stop):
        return np.arange(start, stop) % self.size


def test_by_hand():
    groups = LengthGroups(Plain(10), [9, 1, 5, 3, 7, 7, 2, 8, 6, 4], 2, blocks=2)
    # Chunks of positions 0-3, 4-7 and 8-9, blocks of 2: the samples 1, 3 | 2, 0 by their lengths,
    # 6, 4 | 5, 7 and 9, 8. The order of the blocks comes from raw random bits, so this is the order
    # in every version of NumPy.
    assert groups.indices(0, 10).tolist() == [2, 0, 1, 3, 5, 7, 6, 4, 9, 8]
    # The next epoch has the rest of the third chunk, then 3, 2 | 4, 5 and 6, 9 | 8, 7.
    assert groups.indices(10, 20).tolist() == [1, 0, 4, 5, 3, 2, 6, 9, 8, 7]


def test_blocks_lie_where_a_runs_batches_do_after_the_first_epoch_too():
    lengths = np.arange(1000)
    stream = Mixture([1000], seed=4)
    groups = LengthGroups(stream, lengths, 16, blocks=8)
    assert 1000 % 16
    spans, straddling = [], 0
    for start in range(0, 10_000, 16):
        if start // 1000 != (start + 15) // 1000:
            straddling += 1
            continue
        block = lengths[groups.indices(start, start + 16)]
        assert (np.diff(block) > 0).all()
        spans.append(block[-1] - block[0])
    assert straddling == 5  # the ends of all epochs that are no multiple of 16
    # 16 of 128 in order span an eighth of the lengths; 16 at random nearly all of them.
    assert np.mean(spans) < 200


def test_a_chunk_is_sorted_as_a_whole():
    lengths = np.random.default_rng(0).permutation(64)
    groups = LengthGroups(Plain(64), lengths, 8, blocks=4)
    for first in (0, 32):
        blocks = groups.indices(first, first + 32).reshape(4, 8)
        inside = lengths[blocks]
        assert sorted(blocks.ravel()) == list(range(first, first + 32))
        inside = inside[np.argsort(inside[:, 0])]
        assert (np.diff(inside.ravel()) > 0).all()  # no block overlaps another
    starts = lengths[groups.indices(0, 64)[::8]]
    assert (np.diff(starts) < 0).any()  # and they are not in order


def test_equal_lengths_keep_the_streams_order():
    groups = LengthGroups(Plain(12), [5] * 12, 4, blocks=3)
    assert all((np.diff(block) == 1).all() for block in groups.indices(0, 12).reshape(3, 4))


def test_short_and_long_blocks_come_anywhere():
    groups = LengthGroups(Plain(80), range(80), 10, blocks=8)
    firsts = {int(groups.indices(start, start + 1)[0]) for start in range(0, 8000, 80)}
    assert firsts == set(range(0, 80, 10))
    # Where the epoch is no multiple of the block, its last, short block is no special one.
    groups = LengthGroups(Plain(75), range(75), 10, blocks=8)
    lasts = [int(groups.indices(stop - 1, stop)[0]) for stop in range(75, 7575, 75)]
    assert min(lasts) < 15 and max(lasts) == 74


def test_another_seed_is_another_order_and_nothing_else_is():
    lengths = np.random.default_rng(1).integers(1, 50, 200)
    first = LengthGroups(Mixture([200]), lengths, 4, seed=0, blocks=10).indices(0, 400)
    np.random.seed(5)
    again = LengthGroups(Mixture([200]), lengths.tolist(), 4, seed=0, blocks=10).indices(0, 400)
    other = LengthGroups(Mixture([200]), lengths, 4, seed=1, blocks=10).indices(0, 400)
    assert (first == again).all()
    assert (first != other).any()
    chunks = [first[i : i + 40].reshape(10, 4) for i in range(0, 200, 40)]
    orders = [tuple(np.argsort(lengths[chunk].sum(1))) for chunk in chunks]
    assert len(set(orders)) == len(orders)  # each chunk is shuffled anew
    plain = LengthGroups(Plain(200), lengths, 4, blocks=10)
    assert (plain.indices(0, 200) != plain.indices(200, 400)).any()  # and each epoch


@settings(max_examples=50)
@given(
    size=st.integers(1, 60),
    block=st.integers(1, 9),
    blocks=st.integers(1, 6),
    seed=st.integers(0, 3),
    cuts=st.lists(st.integers(0, 200), max_size=5),
)
def test_laws(size, block, blocks, seed, cuts):
    lengths = [(7 * i) % 11 for i in range(size)]

    def make():
        return LengthGroups(Mixture([size], seed=seed), lengths, block, seed=seed, blocks=blocks)

    assert len(make()) == size
    whole = make().indices(0, 200)
    assert whole.dtype == np.int64
    for epoch in range(200 // size):  # an epoch has each sample once
        assert sorted(whole[epoch * size : (epoch + 1) * size]) == list(range(size))
    groups = make()
    borders = [0, *sorted(cuts), 200]
    parts = [groups.indices(a, b) for a, b in itertools.pairwise(borders)]
    assert (np.concatenate(parts) == whole).all()
    for start in cuts:  # any order, overlaps too
        assert (groups.indices(start, 200) == whole[start:]).all()
    for start in range(0, 200 - block + 1, block):
        if start // size == (start + block - 1) // size:
            own = [lengths[i] for i in whole[start : start + block]]
            assert own == sorted(own)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_fewer_samples_than_a_block(size):
    groups = LengthGroups(Plain(size), range(size), 8)
    assert sorted(groups.indices(0, 5 * size)) == sorted(5 * list(range(size)))
    assert groups.indices(3, 3).tolist() == []
