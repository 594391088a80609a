"""What a corpus is made of, and what is told about it: the report of a run, the log, the card."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lit_llm.data.card import CorpusCard, SplitCount
from lit_llm.data.cleaning import Cleaning
from lit_llm.data.deduplication import Deduplication
from lit_llm.data.sources import Source
from lit_llm.data.splits import Split

if TYPE_CHECKING:
    from lit_llm.data.token_cache import TokenCache

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class CorpusSettings:
    """What, beside the tokenizer, decides the content of a cache.

    Attributes:
        sources: Sources that are split into training, validation and test.
        val_sources: Sources that are validation as a whole. They come first in deduplication, so a
            text of theirs is not trained on.
        cleaning: How documents are cleaned.
        deduplication: Which documents count as the same, over all sources.
        val_fraction: Share of the documents of ``sources`` held out for validation.
        test_fraction: Share of the documents of ``sources`` held out for the test.
    """

    sources: Sequence[Source]
    val_sources: Sequence[Source] = ()
    cleaning: Cleaning = dataclasses.field(default_factory=Cleaning)
    deduplication: Deduplication = dataclasses.field(default_factory=Deduplication)
    val_fraction: float = 0.05
    test_fraction: float = 0.05

    @property
    def all_sources(self) -> list[Source]:
        """Sources as a cache numbers them: ``val_sources`` after ``sources``."""
        return [*self.sources, *self.val_sources]


def corpus_report(
    cache: "TokenCache", settings: CorpusSettings, labels: Sequence[str]
) -> dict[str, Any]:
    """What a corpus holds and what was removed from it, as plain data.

    Args:
        cache: Its tokens.
        settings: How it was made.
        labels: Names of all sources.

    Returns:
        ``sha256`` of all documents, ``key`` of the cache, ``python`` (version that made it),
        ``sources``: for each label its ``path``, ``weight``, ``cleaning`` (one sentence) and
            ``splits`` with their documents, bytes, tokens and sha256; ``deduplication`` (one
            sentence).
    """
    sources = {}
    for number, (label, source) in enumerate(zip(labels, settings.all_sources, strict=True)):
        sources[label] = {
            "path": source.path,
            "weight": source.weight,
            "cleaning": str(cache.cleaning_report(number)),
            "splits": cache.meta["sources"][number]["splits"],
        }
    return {
        "sha256": cache.meta["sha256"],
        "key": cache.key,
        "python": cache.meta["python"],
        "sources": sources,
        "deduplication": str(cache.deduplication_report()),
    }


def corpus_summary(cache: "TokenCache", labels: Sequence[str]) -> Iterator[str]:
    """Lines for the log: the size of every split, and what was removed if anything was.

    Args:
        cache: The tokens of the corpus.
        labels: Names of all sources.
    """
    for number, label in enumerate(labels):
        report = cache.cleaning_report(number)
        if report.kept < report.documents or report.normalized or report.control_characters:
            yield f"{label}: {report}"
        for split, counts in cache.meta["sources"][number]["splits"].items():
            if counts["documents"]:
                yield (
                    f"{label}, {split}: {counts['documents']:,} documents, "
                    f"{counts['bytes']:,} bytes, {counts['tokens']:,} tokens"
                )
    deduplication = cache.deduplication_report()
    if deduplication.kept < deduplication.documents:
        yield str(deduplication)


def corpus_card(
    cache: "TokenCache", settings: CorpusSettings, *, name: str, description: str = ""
) -> CorpusCard:
    """The card of a corpus, all sources together.

    Args:
        cache: Its tokens.
        settings: How it was made.
        name: Title of the card.
        description: Text below the title, markdown.
    """
    sources = cache.meta["sources"]
    splits: dict[str, SplitCount] = {}
    for split in SPLITS:
        counts = [source["splits"][split] for source in sources]
        units = ("documents", "bytes", "tokens")
        splits[split] = SplitCount(**{unit: sum(c[unit] for c in counts) for unit in units})
    return CorpusCard(
        name=name,
        description=description,
        sources=[source.path for source in settings.all_sources],
        documents=sum(count.documents for count in splits.values()),
        bytes=sum(count.bytes for count in splits.values()),
        tokens=sum(count.tokens or 0 for count in splits.values()),
        sha256=cache.meta["sha256"],
        splits=splits,
        cleaning=cache.cleaning_report(0) if len(sources) == 1 else None,
        deduplication=cache.deduplication_report(),
    )
