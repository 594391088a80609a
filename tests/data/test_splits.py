"""Splits: fixed by the text alone, of the right size, free of leaks."""

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_llm.data.splits import assign_split
from lit_llm.errors import UserError

TEXTS = [f"document number {i}" for i in range(20_000)]


def test_by_hand():
    # The place of a text is its hash as a fraction of 2**64, spelled out here once.
    for text in TEXTS[:500]:
        digest = hashlib.blake2b(f"7\n{text}".encode(), digest_size=8).hexdigest()
        place = int(digest, 16) / 2**64
        wanted = "test" if place < 0.2 else "validation" if place < 0.5 else "train"
        assert assign_split(text, val_fraction=0.3, test_fraction=0.2, seed=7) == wanted


def test_these_never_move():
    # Written down once: a change here would mix held-out text into what others have trained on.
    numbers = {"train": (0, 1, 4, 5), "validation": (3, 14, 37, 54), "test": (2, 12, 13, 26)}
    for split, members in numbers.items():
        assert {assign_split(f"document {number}") for number in members} == {split}


def test_fractions():
    counts = Counter(assign_split(text, val_fraction=0.1, test_fraction=0.05) for text in TEXTS)
    assert counts["validation"] == pytest.approx(2_000, abs=4 * 42)  # 4 standard deviations
    assert counts["test"] == pytest.approx(1_000, abs=4 * 31)
    assert {assign_split(t, val_fraction=0, test_fraction=0) for t in TEXTS} == {"train"}


def test_a_larger_validation_takes_from_training_only():
    moves = Counter(
        (assign_split(text, val_fraction=0.05), assign_split(text, val_fraction=0.2))
        for text in TEXTS
    )
    assert {old + ">" + new for old, new in moves if old != new} == {"train>validation"}


def test_another_seed_is_another_split():
    first = [assign_split(text) for text in TEXTS[:2000]]
    assert first != [assign_split(text, seed=1) for text in TEXTS[:2000]]


@given(st.text(), st.integers(0, 99))
def test_equal_texts_are_never_apart(text, seed):
    wanted = assign_split(text, val_fraction=0.4, test_fraction=0.3, seed=seed)
    for same in (f"  {text}\n", text.replace(" ", "\n\t "), f"\x00{text}"):
        assert assign_split(same, val_fraction=0.4, test_fraction=0.3, seed=seed) == wanted
    assert assign_split("CAFÉ " + text) == assign_split("cafe\u0301  " + text)


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0.1), (0.5, 0.5), (float("nan"), 0), (0, 1)])
def test_bad_fractions(val, test):
    with pytest.raises(UserError, match="must not be negative and must leave something"):
        assign_split("x", val_fraction=val, test_fraction=test)


def test_a_corpus_is_read_cleaned_deduplicated_and_split(tmp_path):
    from lit_llm.data.cleaning import Cleaning
    from lit_llm.data.deduplication import Deduplication
    from lit_llm.data.sources import Source
    from lit_llm.data.splits import split_corpus

    lines = [f"line {number}" for number in range(200)]
    path = tmp_path / "lines.txt"
    path.write_text("\n".join([*lines, "LINE  7", "x"]))
    corpus = split_corpus(
        [Source(str(path), documents="lines")],
        Cleaning(min_characters=3),
        Deduplication(),
        val_fraction=0.2,
        test_fraction=0.1,
    )
    assert [document.text for _, document in corpus.documents] == lines
    for split in ("train", "validation", "test"):
        expected = [
            line
            for line in lines
            if assign_split(line, val_fraction=0.2, test_fraction=0.1) == split
        ]
        assert corpus.texts(split) == expected
        assert expected
