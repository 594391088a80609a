"""Sums over tokens against numbers worked out by hand."""

import gzip
import math

import pytest
import torch

from lit_llm.evaluation.references import gzip_bits_per_byte, unigram_bits_per_byte
from lit_llm.evaluation.token_metrics import TokenMetrics


def test_totals_are_not_means_of_batch_means() -> None:
    metrics = TokenMetrics(["en", "es"])
    metrics.update(
        nll=torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]]),
        correct=torch.tensor([[True, False, True], [True, True, True]]),
        mask=torch.tensor([[True, True, False], [True, False, False]]),
        source=torch.tensor([0, 1]),
        num_bytes=torch.tensor([[2, 3, 50], [5, 50, 50]]),
    )
    metrics.update(
        nll=torch.tensor([[0.5, 0.5]]),
        correct=torch.tensor([[False, False]]),
        mask=torch.tensor([[True, True]]),
        source=torch.tensor([1]),
        num_bytes=torch.tensor([[1, 1]]),
    )
    found = metrics.compute()
    assert found["loss"] == pytest.approx(8 / 5)
    assert found["perplexity"] == pytest.approx(math.exp(8 / 5))
    assert found["token_accuracy"] == pytest.approx(2 / 5)
    assert found["bits_per_byte"] == pytest.approx(8 / math.log(2) / 12)
    assert found["perplexity/en"] == pytest.approx(math.exp(1.5))
    assert found["perplexity/es"] == pytest.approx(math.exp(5 / 3))


def test_ignored_infinities_do_not_leak() -> None:
    metrics = TokenMetrics()
    metrics.update(
        nll=torch.tensor([[1.0, 0.0]]),
        correct=torch.tensor([[True, True]]),
        mask=torch.tensor([[True, False]]),
    )
    assert metrics.compute()["loss"] == 1.0
    assert "bits_per_byte" not in metrics.compute()


def test_nothing_seen_says_nothing() -> None:
    assert TokenMetrics().compute() == {}


def test_unigram_by_hand() -> None:
    # counts 1, 0, 5 with one added: 2/9, 1/9, 6/9
    bits = -(2 * math.log2(6 / 9) + math.log2(1 / 9))
    measured = unigram_bits_per_byte(torch.tensor([1, 0, 5]), torch.tensor([0, 1, 2]), 7)
    assert measured == pytest.approx(bits / 7)


def test_gzip_counts_compressed_bytes() -> None:
    texts = ["añb" * 50, "c" * 30]
    raw = ("añb" * 50 + "\n" + "c" * 30).encode()
    assert len(raw) == 231
    assert gzip_bits_per_byte(texts) == 8 * len(gzip.compress(raw, 9, mtime=0)) / 231
    assert math.isnan(gzip_bits_per_byte([]))
