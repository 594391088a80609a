"""The card of a corpus: what is in it, in markdown."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lit_llm.data.cleaning import CleaningReport
from lit_llm.data.deduplication import DeduplicationReport


@dataclass
class SplitCount:
    """Size of one split.

    Attributes:
        documents: Number of documents.
        bytes: Bytes of UTF-8.
        tokens: Number of tokens, when known.
    """

    documents: int = 0
    bytes: int = 0
    tokens: int | None = None

    def add(self, text: str) -> None:
        """Count one document."""
        self.documents += 1
        self.bytes += len(text.encode())


@dataclass
class CorpusCard:
    """What a card says about a corpus.

    Attributes:
        name: Title.
        description: Text below the title, markdown.
        sources: Where it comes from.
        documents: Number of documents, after cleaning and deduplication.
        bytes: Their bytes of UTF-8.
        tokens: Their tokens, when known.
        tokenizer: Tokenizer that made them.
        sha256: Hash that identifies the content (``documents_sha256`` or the sources' fingerprint).
        splits: Size of each split.
        cleaning: What cleaning did.
        deduplication: What deduplication removed.
    """

    name: str
    documents: int
    bytes: int
    sha256: str
    description: str = ""
    sources: Sequence[str] = ()
    tokens: int | None = None
    tokenizer: str | None = None
    splits: dict[str, SplitCount] = field(default_factory=dict)
    cleaning: CleaningReport | None = None
    deduplication: DeduplicationReport | None = None


def write_card(path: str | Path, card: CorpusCard) -> Path:
    """Write a card as markdown, whole or not at all; folders are made as needed.

    Nothing in it depends on the time or the machine, so that equal corpora give equal cards.

    Returns:
        The path written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(card_text(card), encoding="utf-8")
    partial.replace(path)
    return path


def card_text(card: CorpusCard) -> str:
    """Markdown of a card."""
    sections = [f"# {card.name}"]
    if card.description:
        sections.append(card.description.strip())
    sections.append(_table(["", ""], _facts(card)))
    if card.splits:
        rows = [
            [name, f"{count.documents:,}", f"{count.bytes:,}", _count(count.tokens)]
            for name, count in card.splits.items()
        ]
        sections += ["## Splits", _table(["split", "documents", "bytes", "tokens"], rows)]
    if card.cleaning:
        sections += ["## Cleaning", f"{_sentence(str(card.cleaning))}"]
    if card.deduplication:
        sections += ["## Deduplication", f"{_sentence(str(card.deduplication))}"]
        if card.deduplication.examples:
            rows = [
                [example.kind, example.removed, example.kept, example.excerpt]
                for example in card.deduplication.examples
            ]
            sections.append(_table(["kind", "removed", "repeats", "begins"], rows))
    return "\n\n".join(sections) + "\n"


def _facts(card: CorpusCard) -> list[list[str]]:
    facts = [
        ["sources", ", ".join(f"`{source}`" for source in card.sources)],
        ["documents", f"{card.documents:,}"],
        ["bytes (UTF-8)", f"{card.bytes:,}"],
        ["tokens", _count(card.tokens)],
        ["tokenizer", f"`{card.tokenizer}`" if card.tokenizer else ""],
        ["sha256", f"`{card.sha256}`"],
        ["Python", f"{platform.python_implementation()} {platform.python_version()}"],
    ]
    return [fact for fact in facts if fact[1]]


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
