"""Cleaning of documents: Unicode form, control characters, minimum length, repetition."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from lit_llm.data.files import Document
from lit_llm.errors import UserError

# Category Cc but for tab and line feed.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LINE_END = re.compile(r"\r\n?")
_NGRAM_SIZES = (2, 3, 4)


@dataclass(frozen=True)
class Cleaning:
    """How documents are cleaned, in the order of the options.

    Args:
        strip_control_characters: Remove control characters other than tab and line feed; carriage
            returns become line feeds.
        unicode: Unicode normal form: ``none`` leaves the text as it is, ``NFC`` composes accents,
            ``NFKC`` also replaces compatibility characters (full-width letters, ligatures).
        min_characters: Drop documents of fewer characters, white space at both ends not counted.
        max_repetition: Drop documents with a larger share of repeated lines, or of text inside
            their most frequent sequence of 2, 3 or 4 words (0.2 to 0.3 is usual); none keeps all.

    Raises:
        UserError: For a value that makes no sense.
    """

    strip_control_characters: bool = True
    unicode: Literal["none", "NFC", "NFKC"] = "NFC"
    min_characters: int = 0
    max_repetition: float | None = None

    def __post_init__(self) -> None:
        if self.min_characters < 0:
            raise UserError(f"cleaning: min_characters {self.min_characters} must not be negative.")
        if self.max_repetition is not None and not 0 < self.max_repetition <= 1:
            raise UserError(f"cleaning: max_repetition {self.max_repetition} must lie in (0, 1].")


@dataclass
class CleaningReport:
    """What cleaning saw, changed and removed.

    Attributes:
        documents: Documents seen.
        kept: Documents passed on.
        bytes: Bytes of UTF-8 seen.
        kept_bytes: Bytes of UTF-8 passed on.
        normalized: Documents whose Unicode form changed.
        control_characters: Control characters removed (carriage returns included).
        removed: Documents dropped, by reason: ``"empty"``, ``"short"``, ``"repetitive"``.
    """

    documents: int = 0
    kept: int = 0
    bytes: int = 0
    kept_bytes: int = 0
    normalized: int = 0
    control_characters: int = 0
    removed: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """One sentence for logs and cards."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.removed.items()))
        return (
            f"cleaning kept {self.kept:,} of {self.documents:,} documents "
            f"({self.kept_bytes:,} of {self.bytes:,} bytes; removed: {reasons or 'none'}); "
            f"{self.normalized:,} documents changed by Unicode normalisation, "
            f"{self.control_characters:,} control characters removed"
        )


def clean_documents(
    documents: Iterable[Document], cleaning: Cleaning, report: CleaningReport | None = None
) -> Iterator[Document]:
    """Clean documents one by one, in their order.

    Args:
        documents: Any number of documents; they are read as the result is.
        cleaning: What to do.
        report: Counts what is done, complete once the result is exhausted.

    Yields:
        The documents that remain, with their clean text.
    """
    report = CleaningReport() if report is None else report
    for document in documents:
        report.documents += 1
        report.bytes += len(document.text.encode())
        text = document.text
        if cleaning.strip_control_characters:
            text = _strip_control_characters(text)
            report.control_characters += len(document.text) - len(text)
        if cleaning.unicode != "none":
            normal = unicodedata.normalize(cleaning.unicode, text)
            report.normalized += normal != text
            text = normal
        if reason := _reason_to_drop(text, cleaning):
            report.removed[reason] += 1
            continue
        report.kept += 1
        report.kept_bytes += len(text.encode())
        yield document._replace(text=text)


def _reason_to_drop(text: str, cleaning: Cleaning) -> str | None:
    length = len(text.strip())
    if length == 0:
        return "empty"
    if length < cleaning.min_characters:
        return "short"
    if cleaning.max_repetition is not None and repetition(text) > cleaning.max_repetition:
        return "repetitive"
    return None


def repetition(text: str) -> float:
    """How repetitive a text is, from 0 to 1: the largest of four shares.

    The share of lines that occur before (blank lines not counted), and for n = 2, 3, 4 the share of
    the words' characters inside the most frequent n-gram of words, when it occurs more than once.

    After the filters of Rae et al. 2021, Gopher (https://arxiv.org/abs/2112.11446), appendix A.1.1.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    words = text.split()
    if not words:
        return 0.0
    shares = [1 - len(set(lines)) / len(lines)]
    characters = sum(map(len, words))
    for size in _NGRAM_SIZES:
        ngrams = Counter(zip(*(words[start:] for start in range(size)), strict=False))
        if ngrams:
            # Of equally frequent ones the longest, so that the order of words does not matter.
            count = max(ngrams.values())
            length = max(sum(map(len, ngram)) for ngram, n in ngrams.items() if n == count)
            shares.append(min(1.0, count * length / characters) if count > 1 else 0.0)
    return max(shares)


def normalized_key(text: str) -> str:
    """Text reduced to what makes two texts "the same": NFKC, lower case, single spaces.

    Deduplication and splits compare this; it is the same before and after cleaning, whatever the
    options.
    """
    text = _strip_control_characters(text)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.lower().split())


def _strip_control_characters(text: str) -> str:
    return _CONTROL.sub("", _LINE_END.sub("\n", text))
