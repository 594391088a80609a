"""Splits by document, from the hash of its text alone."""

import hashlib
from typing import Literal

from lit_llm.data.cleaning import normalized_key
from lit_llm.errors import UserError

Split = Literal["train", "validation", "test"]

_HASH_BYTES = 8


def assign_split(
    text: str, *, val_fraction: float = 0.05, test_fraction: float = 0.05, seed: int = 0
) -> Split:
    """Split that a document belongs to.

    Only the text decides, reduced to lower case, single spaces and one Unicode form: adding data
    moves no document, the order of documents and the cleaning options do not matter, and equal
    texts never fall into different splits. A larger ``val_fraction`` moves documents only from
    training to validation.

    Args:
        text: Text of the document.
        val_fraction: Expected share of documents in validation.
        test_fraction: Expected share of documents in test.
        seed: Another seed gives another split.

    Raises:
        UserError: When a fraction is negative or nothing is left for training.
    """
    check_fractions(val_fraction, test_fraction)
    data = f"{seed}\n{normalized_key(text)}".encode()
    digest = hashlib.blake2b(data, digest_size=_HASH_BYTES).digest()
    position = int.from_bytes(digest, "big") / 2 ** (8 * _HASH_BYTES)
    if position < test_fraction:
        return "test"
    return "validation" if position < test_fraction + val_fraction else "train"


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Check the fractions of a split.

    Raises:
        UserError: When a fraction is negative or nothing is left for training.
    """
    if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
        raise UserError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} must not be negative "
            "and must leave something for training (together below 1)."
        )
