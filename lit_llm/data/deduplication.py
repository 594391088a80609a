"""Deduplication of documents: equal texts by hash, similar texts by MinHash."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from lit_llm.data.cleaning import normalized_key
from lit_llm.data.files import Document
from lit_llm.errors import UserError

_EXAMPLES = 5
_EXCERPT = 80


@dataclass(frozen=True)
class Deduplication:
    """Which documents count as the same; the first one seen is kept.

    Args:
        exact: Drop a document that equals an earlier one but for case, white space and Unicode
            form.
        near: Drop a document that is similar to an earlier one that was kept (MinHash).
        threshold: Share of common word n-grams (Jaccard similarity) from which two documents are
            similar; the estimate from ``num_perm`` hashes errs by a few hundredths.
        num_perm: Number of hashes of a MinHash signature; more is more precise and slower.
        ngram: Words in an n-gram; a document of fewer words is one n-gram.
        seed: Seed of the hashes.

    Raises:
        UserError: For a value that makes no sense.
    """

    exact: bool = True
    near: bool = False
    threshold: float = 0.8
    num_perm: int = 128
    ngram: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise UserError(f"deduplication: threshold {self.threshold} must lie in (0, 1].")
        if self.num_perm < 1 or self.ngram < 1:
            raise UserError(
                f"deduplication: num_perm {self.num_perm} and ngram {self.ngram} "
                "must be at least 1."
            )


@dataclass(frozen=True)
class Duplicate:
    """A document that was removed and the earlier one it repeats.

    Attributes:
        kind: ``"exact"`` or ``"near"``.
        removed: Origin of the removed document.
        kept: Origin of the document it repeats.
        excerpt: Beginning of the removed text.
    """

    kind: str
    removed: str
    kept: str
    excerpt: str


@dataclass
class DeduplicationReport:
    """What deduplication saw and removed.

    Attributes:
        documents: Documents seen.
        kept: Documents passed on.
        exact: Documents removed as equal to an earlier one.
        near: Documents removed as similar to an earlier one.
        removed_bytes: Bytes of UTF-8 removed.
        examples: The first few removed documents of each kind.
    """

    documents: int = 0
    kept: int = 0
    exact: int = 0
    near: int = 0
    removed_bytes: int = 0
    examples: list[Duplicate] = field(default_factory=list)

    def __str__(self) -> str:
        """One sentence for logs and cards."""
        return (
            f"deduplication kept {self.kept:,} of {self.documents:,} documents "
            f"(removed {self.removed_bytes:,} bytes: {self.exact:,} equal, "
            f"{self.near:,} similar documents)"
        )


def deduplicate_documents(
    documents: Iterable[Document],
    deduplication: Deduplication,
    report: DeduplicationReport | None = None,
) -> Iterator[Document]:
    """Pass on the first of equal (or similar) documents, in their order.

    Deterministic for a seed. MinHash with banding, Broder 1997 and Leskovec et al., Mining of
    Massive Datasets, chapter 3 (http://www.mmds.org); bands are chosen so that a pair at the
    threshold is compared with a probability of at least 0.9.

    Args:
        documents: Any number of documents; they are read as the result is.
        deduplication: What counts as the same.
        report: Counts what is done, complete once the result is exhausted.

    Yields:
        The documents that remain, unchanged.
    """
    report = DeduplicationReport() if report is None else report
    equal = _EqualTexts() if deduplication.exact else None
    similar = _SimilarTexts(deduplication) if deduplication.near else None
    for document in documents:
        report.documents += 1
        key = normalized_key(document.text)
        kind, kept = "exact", equal.find(key) if equal else None
        if kept is None and similar:
            kind, kept = "near", similar.find_or_add(key, document.origin)
        # A similar text is remembered as equal too: its copies are then copies of what was kept.
        if equal:
            equal.add(key, kept or document.origin)
        if kept is None:
            report.kept += 1
            yield document
            continue
        setattr(report, kind, getattr(report, kind) + 1)
        report.removed_bytes += len(document.text.encode())
        if sum(example.kind == kind for example in report.examples) < _EXAMPLES:
            excerpt = " ".join(document.text.split())[:_EXCERPT]
            report.examples.append(Duplicate(kind, document.origin, kept, excerpt))


class _EqualTexts:
    """Origins of the texts seen, by hash."""

    def __init__(self) -> None:
        self._origins: dict[bytes, str] = {}

    def find(self, key: str) -> str | None:
        return self._origins.get(self._hash(key))

    def add(self, key: str, origin: str) -> None:
        self._origins.setdefault(self._hash(key), origin)

    @staticmethod
    def _hash(key: str) -> bytes:
        return hashlib.blake2b(key.encode(), digest_size=16).digest()


class _SimilarTexts:
    """MinHash signatures of the texts kept."""

    def __init__(self, options: Deduplication) -> None:
        import rensa

        self._options = options
        self._minhash = rensa.RMinHash
        bands = number_of_bands(options.threshold, options.num_perm)
        self._index = rensa.RMinHashDeduplicator(
            threshold=options.threshold,
            num_perm=options.num_perm,
            use_lsh=True,
            num_bands=bands,
            seed=options.seed,
        )
        self._origins: list[str] = []

    def find_or_add(self, key: str, origin: str) -> str | None:
        words = key.split(" ")
        size = min(self._options.ngram, len(words))
        ngrams = [" ".join(words[i : i + size]) for i in range(len(words) - size + 1)]
        minhash = self._minhash(self._options.num_perm, self._options.seed)
        minhash.update(ngrams)
        if self._index.add(str(len(self._origins)), minhash):
            self._origins.append(origin)
            return None
        # The oldest, whatever the order in which the index tells them.
        return self._origins[min(map(int, self._index.get_duplicates(minhash)))]


def number_of_bands(threshold: float, num_perm: int, probability: float = 0.9) -> int:
    """Fewest bands of equal size that compare a pair at the threshold with that probability.

    With b bands of r rows the probability is ``1 - (1 - threshold**r)**b``.
    """
    for bands in range(1, num_perm + 1):
        rows, rest = divmod(num_perm, bands)
        if rest == 0 and 1 - (1 - threshold**rows) ** bands >= probability:
            return bands
    return num_perm
