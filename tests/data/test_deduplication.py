"""Deduplication: what is removed, what is kept, and that it is repeatable."""

import random
import subprocess
import sys

import pytest

from lit_llm.data.deduplication import (
    Deduplication,
    DeduplicationReport,
    deduplicate_documents,
    number_of_bands,
)
from lit_llm.data.files import Document
from lit_llm.errors import UserError


def run(texts: list[str], **options) -> tuple[list[str], DeduplicationReport]:
    report = DeduplicationReport()
    documents = [Document(text, f"f:{line}") for line, text in enumerate(texts, start=1)]
    kept = list(deduplicate_documents(documents, Deduplication(**options), report))
    return [document.text for document in kept], report


def words(rng: random.Random, count: int) -> list[str]:
    return [f"w{rng.randrange(10**6)}" for _ in range(count)]


def test_exact_ignores_case_space_and_unicode_form_and_keeps_the_first():
    texts = ["Café one", "two", "CAFE\u0301\n ONE ", "Two!", "two", "cafe one"]
    kept, report = run(texts)
    assert kept == ["Café one", "two", "Two!", "cafe one"]
    assert (report.documents, report.kept, report.exact, report.near) == (6, 4, 2, 0)
    assert report.removed_bytes == len("CAFE\u0301\n ONE ".encode()) + 3
    assert [(d.kind, d.removed, d.kept, d.excerpt) for d in report.examples] == [
        ("exact", "f:3", "f:1", "CAFE\u0301 ONE"),
        ("exact", "f:5", "f:2", "two"),
    ]


def test_switched_off():
    texts = ["a", "a", "b"]
    assert run(texts, exact=False)[0] == texts


def test_near_removes_a_slightly_changed_copy_only():
    rng = random.Random(0)
    first, other = words(rng, 200), words(rng, 200)
    changed = [*first[:100], "new", *first[101:]]  # 5 of 196 n-grams differ: similarity 0.95
    half = first[:100] + other[100:]  # similarity about 0.32
    texts = [" ".join(text) for text in (first, other, changed, half)]
    kept, report = run(texts, near=True)
    assert kept == [texts[0], texts[1], texts[3]]
    assert (report.exact, report.near) == (0, 1)
    assert [(d.kind, d.removed, d.kept) for d in report.examples] == [("near", "f:3", "f:1")]
    assert run(texts, near=True, threshold=0.99)[0] == texts


def test_near_finds_pairs_above_the_threshold_and_spares_those_below():
    # 60 pairs each; with 128 hashes the estimate of a similarity near 0.8 has a deviation of 0.035.
    rng = random.Random(1)
    found = {0.65: 0, 0.95: 0}
    for similarity in found:
        for _ in range(60):
            common = round(300 * similarity / (1 + similarity) * 2)
            first, second = words(rng, common), words(rng, 300 - common)
            pair = [" ".join(first + second), " ".join(first + words(rng, 300 - common))]
            found[similarity] += run(pair, near=True, ngram=1)[1].near
    assert found[0.65] == 0
    assert found[0.95] == 60


def test_near_alone_also_removes_equal_texts_and_short_ones():
    kept, report = run(["one two", "ONE  TWO", "one three"], exact=False, near=True)
    assert kept == ["one two", "one three"]
    assert report.near == 1


def test_a_copy_of_a_removed_text_repeats_what_was_kept():
    rng = random.Random(2)
    first = words(rng, 200)
    changed = " ".join([*first[:100], "new", *first[101:]])
    report = run([" ".join(first), changed, changed], near=True)[1]
    assert [(d.kind, d.removed, d.kept) for d in report.examples] == [
        ("near", "f:2", "f:1"),
        ("exact", "f:3", "f:1"),
    ]


def test_only_a_few_examples_are_kept():
    assert len(run(["a"] * 100)[1].examples) == 5


def test_the_same_in_every_process():
    code = """
import random
from lit_llm.data.deduplication import *
from lit_llm.data.files import Document
rng = random.Random(3)
texts = []
for i in range(300):
    words = rng.choice(texts).split() if texts and i % 2 else [str(rng.random()) for _ in range(60)]
    words[rng.randrange(60)] = "x"
    texts.append(" ".join(words))
documents = [Document(text, str(i)) for i, text in enumerate(texts)]
report = DeduplicationReport()
options = Deduplication(near=True, threshold=0.8, seed=SEED)
print([d.origin for d in deduplicate_documents(documents, options, report)], report)
"""
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code.replace("SEED", seed)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "001"
    ]
    assert outputs[0] == outputs[1]
    assert "0 similar" not in outputs[0]
    assert outputs[0] != outputs[2]


@pytest.mark.parametrize(
    ("threshold", "num_perm", "bands"),
    [
        (0.8, 128, 16),  # 8 bands find 0.2 of the pairs at the threshold, 16 find 0.947
        (0.5, 128, 64),  # 32 bands find 0.873
        (1.0, 128, 1),
        (0.2, 8, 8),  # even 8 bands of one row find only 0.83: as many as there are
    ],
)
def test_number_of_bands(threshold, num_perm, bands):
    assert number_of_bands(threshold, num_perm) == bands


def test_report_is_a_sentence():
    assert str(run(["a", "a", "b"])[1]) == (
        "deduplication kept 2 of 3 documents (removed 1 bytes: 1 equal, 0 similar documents)"
    )


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"num_perm": 0}, {"ngram": 0}])
def test_bad_options(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Deduplication(**options)
