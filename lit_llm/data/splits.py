"""Splits by document, from the hash of its text alone."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

from lit_llm.data.cleaning import Cleaning, CleaningReport, clean_documents, normalized_key
from lit_llm.data.deduplication import Deduplication, DeduplicationReport, deduplicate_documents
from lit_llm.data.files import Document
from lit_llm.data.sources import Source, read_documents
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
    position = split_position(text, seed)
    if position < test_fraction:
        return "test"
    return "validation" if position < test_fraction + val_fraction else "train"


def split_position(text: str, seed: int = 0) -> float:
    """Where a document stands between 0 and 1: the test split has the lowest, then validation.

    Args:
        text: Text of the document.
        seed: Another seed gives another place.
    """
    data = f"{seed}\n{normalized_key(text)}".encode()
    digest = hashlib.blake2b(data, digest_size=_HASH_BYTES).digest()
    return int.from_bytes(digest, "big") / 2 ** (8 * _HASH_BYTES)


@dataclass
class SplitCorpus:
    """A corpus in memory, split by document.

    Attributes:
        documents: All documents in order, each with its split.
        cleaning: What cleaning did.
        deduplication: What deduplication removed.
    """

    documents: list[tuple[Split, Document]] = field(default_factory=list)
    cleaning: CleaningReport = field(default_factory=CleaningReport)
    deduplication: DeduplicationReport = field(default_factory=DeduplicationReport)

    def texts(self, split: Split) -> list[str]:
        """Texts of a split, in order."""
        return [document.text for own, document in self.documents if own == split]


def split_corpus(
    sources: Iterable[Source],
    cleaning: Cleaning,
    deduplication: Deduplication,
    *,
    val_fraction: float = 0.05,
    test_fraction: float = 0.05,
) -> SplitCorpus:
    """Read, clean, deduplicate and split sources that fit in memory.

    The documents fall into the splits that a data module with the same settings gives them.

    Args:
        sources: Where the text comes from.
        cleaning: How documents are cleaned.
        deduplication: Which documents count as the same.
        val_fraction: Expected share of documents in validation.
        test_fraction: Expected share of documents in test.

    Raises:
        UserError: A source cannot be read, or a fraction makes no sense.
    """
    corpus = SplitCorpus()
    raw = chain.from_iterable(map(read_documents, sources))
    clean = clean_documents(raw, cleaning, corpus.cleaning)
    for document in deduplicate_documents(clean, deduplication, corpus.deduplication):
        split = assign_split(document.text, val_fraction=val_fraction, test_fraction=test_fraction)
        corpus.documents.append((split, document))
    return corpus


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
