"""Preferences as samples and batches: rows, pairs and weights by hand."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from lit_llm.data.loader import held_out_loader
from lit_llm.data.preference_samples import PreferenceCollator, PreferenceSamples, count_prompts
from lit_llm.data.sample_table import SampleTable, SampleWriter

PAD, EOS = 9, 2
# Two answers; three answers with two pairs and margins; two answers of equal length.
ROWS = [
    (
        [5, 6, EOS, 5, 7, 8, EOS],
        [0, 1, 1, 0, 1, 1, 1],
        {"lengths": [3, 4], "pairs": [[1, 0]], "kinds": ["other"], "group": 20},
    ),
    (
        [3, 4, 3, 5, EOS, 3, 6],
        [0, 1, 0, 1, 1, 0, 1],
        {"lengths": [2, 3, 2], "pairs": [[0, 1], [2, 1]], "margins": [0.5, 2], "group": 21},
    ),
    ([4, EOS, 4, 8], [0, 1, 0, 1], {"lengths": [2, 2], "pairs": [[0, 1]], "group": 20}),
]


@pytest.fixture
def table(tmp_path):
    with SampleWriter(tmp_path / "a.arrow") as writer:
        for ids, trained, about in ROWS:
            writer.write(ids, [bool(flag) for flag in trained], about)
    return SampleTable(tmp_path / "a.arrow")


@pytest.fixture
def samples(table):
    return PreferenceSamples(table, source=4)


def lists(values):
    return {name: value.tolist() for name, value in values.items()}


def dtypes(values, dtype):
    return {name for name, value in values.items() if value.dtype == dtype}


def test_items_by_hand(samples):
    assert len(samples) == 3
    assert lists(samples[1]) == {
        "input_ids": [3, 4, 3, 5, EOS, 3, 6],
        "labels": [-100, 4, -100, 5, EOS, -100, 6],
        "lengths": [2, 3, 2],
        "pairs": [[0, 1], [2, 1]],
        "margins": [0.5, 2.0],
        "source": 4,
        "row": 1,
        "group": 21,
    }
    assert lists(samples[0])["margins"] == [0.0]
    assert dtypes(samples[1], torch.float32) == {"margins"}
    assert dtypes(samples[1], torch.int64) == set(samples[1]) - {"margins"}


def test_reference_log_probabilities_are_told_row_by_row(samples):
    samples.set_reference(torch.arange(7, dtype=torch.float64))
    assert [samples[i]["ref_logprobs"].tolist() for i in range(3)] == [[0, 1], [2, 3, 4], [5, 6]]
    assert samples[0]["ref_logprobs"].dtype == torch.float32
    for wrong in (torch.zeros(6), torch.zeros(7, 1)):
        with pytest.raises(ValueError, match="7 answers need as many log-probabilities"):
            samples.set_reference(wrong)


def test_batch_by_hand(samples):
    batch = PreferenceCollator(PAD, multiple_of=3)([samples[1], samples[0]])
    assert lists(batch) == {
        "input_ids": [
            [3, 4, PAD, PAD, PAD, PAD],
            [3, 5, EOS, PAD, PAD, PAD],
            [3, 6, PAD, PAD, PAD, PAD],
            [5, 6, EOS, PAD, PAD, PAD],
            [5, 7, 8, EOS, PAD, PAD],
        ],
        "labels": [
            [-100, 4, -100, -100, -100, -100],
            [-100, 5, EOS, -100, -100, -100],
            [-100, 6, -100, -100, -100, -100],
            [-100, 6, EOS, -100, -100, -100],
            [-100, 7, 8, EOS, -100, -100],
        ],
        "attention_mask": [
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
        ],
        "source": [4, 4],
        "pairs": [[0, 1], [2, 1], [4, 3]],
        "pair_weights": [0.5, 0.5, 1.0],
        "margins": [0.5, 2.0, 0.0],
        "pair_source": [4, 4, 4],
        "pair_row": [1, 1, 0],
        "pair_group": [21, 21, 20],
        "pair_index": [0, 1, 0],
    }
    floats = {"pair_weights", "margins"}
    assert dtypes(batch, torch.float32) == floats
    assert dtypes(batch, torch.int64) == set(batch) - floats
    assert count_prompts(batch) == 2


def test_sources_of_pairs(table):
    parts = [PreferenceSamples(table, source=number) for number in (0, 3)]
    batch = PreferenceCollator(PAD)([parts[1][1], parts[0][2]])
    assert batch["source"].tolist() == [3, 0]
    assert batch["pair_source"].tolist() == [3, 3, 0]
    assert batch["pair_row"].tolist() == [1, 1, 2]
    assert batch["pairs"].tolist() == [[0, 1], [2, 1], [3, 4]]


def test_reference_in_a_batch_where_all_items_have_it(table):
    one, other = PreferenceSamples(table, 0), PreferenceSamples(table, 1)
    one.set_reference(-torch.arange(7.0))
    collate = PreferenceCollator(PAD)
    assert collate([one[2], one[0]])["ref_logprobs"].tolist() == [-5, -6, 0, -1]
    assert "ref_logprobs" not in collate([one[2], other[0]])
    assert collate([one[2]])["ref_logprobs"].dtype == torch.float32


def test_many_pairs_weigh_as_one_prompt():
    answers = 10
    pairs = torch.combinations(torch.arange(answers))
    item = {
        "input_ids": torch.arange(answers),
        "labels": torch.arange(answers),
        "lengths": torch.ones(answers, dtype=torch.long),
        "pairs": pairs,
        "margins": torch.zeros(len(pairs)),
        "source": torch.tensor(0),
        "row": torch.tensor(0),
        "group": torch.tensor(0),
    }
    batch = PreferenceCollator(PAD)([item] * 30)
    assert batch["pair_weights"].shape == (30 * 45,)
    assert count_prompts(batch) == 30


def test_the_filler_of_a_held_out_loader_counts_nothing(samples):
    loaders = [
        held_out_loader(
            samples,
            micro_batch_size=2,
            collate_fn=PreferenceCollator(PAD),
            rank=rank,
            world_size=2,
        )
        for rank in range(2)
    ]
    (first,), (second,) = [list(loader) for loader in loaders]
    assert first["pair_weights"].tolist() == [1.0, 1.0]
    # Rank 1 has row 1 and, in place of a fourth one, row 0 without targets.
    assert second["pair_row"].tolist() == [1, 1, 0]
    assert second["pair_weights"].tolist() == [0.5, 0.5, 0.0]
    assert second["input_ids"].shape[0] == 5
    assert [count_prompts(batch) for batch in (first, second)] == [2, 1]


def test_width_is_limited(samples):
    assert PreferenceCollator(PAD)([samples[0]])["input_ids"].shape == (2, 8)
    assert PreferenceCollator(PAD, max_len=6)([samples[0]])["input_ids"].shape == (2, 6)
    with pytest.raises(ValueError, match="an item of 4 tokens is above max_len=3"):
        PreferenceCollator(PAD, max_len=3)([samples[0]])


def test_workers_read_the_same(samples):
    samples.set_reference(torch.arange(7.0))
    assert len(pickle.dumps(samples)) < 2000  # the table goes as its path
    loader = DataLoader(
        samples,
        batch_size=3,
        collate_fn=PreferenceCollator(PAD),
        num_workers=1,
        multiprocessing_context="forkserver",
    )
    (batch,) = loader
    own = PreferenceCollator(PAD)([samples[i] for i in range(3)])
    assert lists(batch) == lists(own)
