"""What a language model must beat on the same held-out text: a unigram model and gzip."""

import gzip
import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor


def unigram_bits_per_byte(
    train_counts: Tensor, heldout_counts: Tensor, heldout_bytes: int
) -> float:
    """Bits per byte of a unigram model over tokens, with add-one smoothing.

    Args:
        train_counts: How often each id occurs in the training text, (V,).
        heldout_counts: How often each id occurs in the held-out text, (V,).
        heldout_bytes: Bytes of the held-out text.

    Returns:
        -sum_v n_v log2 p_v / bytes, with p_v = (c_v + 1) / (sum c + V).
    """
    smoothed = train_counts.double() + 1
    bits = -(heldout_counts.double() * (smoothed / smoothed.sum()).log2()).sum()
    return float(bits) / heldout_bytes


def gzip_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits per byte that ``gzip -9`` needs for the texts, joined by line breaks.

    It may adapt to the held-out text as it goes, which the model may not; it knows nothing before.
    """
    data = "\n".join(texts).encode()
    return 8 * len(gzip.compress(data, 9, mtime=0)) / len(data) if data else math.nan


def reference_measures(datamodule: Any, split: str = "test") -> dict[str, dict[str, float]]:
    """Measure both references on a data module's held-out text.

    Args:
        datamodule: A data module with ``token_counts``, ``token_bytes`` and ``heldout_texts``.
        split: The held-out split.

    Returns:
        Rows of the results table: name to measures.
    """
    heldout = datamodule.token_counts(split)
    num_bytes = int((heldout * datamodule.token_bytes).sum())
    tokens = int(heldout.sum())
    if num_bytes == 0 or tokens == 0:
        return {}
    unigram = unigram_bits_per_byte(datamodule.token_counts("train"), heldout, num_bytes)
    return {
        "unigram": {
            "bits_per_byte": unigram,
            "perplexity": 2 ** (unigram * num_bytes / tokens),
        },
        "gzip": {"bits_per_byte": gzip_bits_per_byte(datamodule.heldout_texts(split))},
    }
