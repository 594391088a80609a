"""Tokenised samples of chats kept on disk: what every kind of them has in common.

A cache is a folder named by a hash of everything that decides its content, see ``cached_folder``:
``meta.json`` and a table for each source and split. Samples are read once, in an order that is
always the same, each is kept once, and those that begin with the same question never fall into two
splits.
"""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

from lit_llm.data.cleaning import normalized_key
from lit_llm.data.corpus import SPLITS
from lit_llm.data.folder_cache import cached_folder
from lit_llm.data.records import RecordSource, record_fingerprint
from lit_llm.data.sample_table import SampleTable, SampleWriter
from lit_llm.data.splits import Split, assign_split
from lit_llm.data.token_cache import tokenizer_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """What, beside the tokenizer and its chat template, decides the content of a cache.

    Attributes:
        sources: Sources that are split into training, validation and test.
        val_sources: Sources that are validation as a whole; they are read first, so what begins as
            a sample of theirs is not trained on.
        seq_len: Longest sequence, in tokens.
        val_fraction: Share of the groups of ``sources`` held out for validation.
        test_fraction: Share of the groups of ``sources`` held out for the test.
    """

    sources: Sequence[RecordSource]
    val_sources: Sequence[RecordSource] = ()
    seq_len: int = 512
    val_fraction: float = 0.05
    test_fraction: float = 0.05

    @property
    def all_sources(self) -> list[RecordSource]:
        """Sources as a cache numbers them: those held out as a whole after ``sources``."""
        return [*self.sources, *self.val_sources]

    @property
    def reading_order(self) -> list[tuple[int, Split | None]]:
        """Numbers of all sources in the order they are read, and the split of those that are whole.

        Of equal samples, and of two splits that begin alike, the first is kept.
        """
        border = len(self.sources)
        whole: list[tuple[int, Split | None]] = [
            (border + number, "validation") for number in range(len(self.val_sources))
        ]
        return [*whole, *((number, None) for number in range(border))]


@dataclasses.dataclass
class ChatCounts:
    """What became of the samples of one source.

    Attributes:
        read: Samples read.
        held_out: Left out: they begin as one of another split, of a source that was read before.
        duplicates: Left out: they repeat one that was read before, in whatever source.
        too_long: Left out: an answer alone is longer than the context.
        prompt_cut: The beginning of their prompt was cut.
        unended: Their last trained turn does not end with a stop token.
        control_text: A message holds the text of a special token, which becomes that token.
        splits: For each split its ``units``.
    """

    units: ClassVar[tuple[str, ...]] = ("samples", "tokens")

    read: int = 0
    held_out: int = 0
    duplicates: int = 0
    too_long: int = 0
    prompt_cut: int = 0
    unended: int = 0
    control_text: int = 0
    splits: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in SPLITS:
            self.splits.setdefault(name, dict.fromkeys(self.units, 0))

    def split_line(self, split: str) -> str:
        """What a split holds, in words."""
        raise NotImplementedError

    def why_empty(self, seq_len: int) -> str:
        """One sentence on why nothing is left for training, and what to do."""
        raise NotImplementedError

    def warnings(self) -> Iterator[str]:
        """What is to be looked at before the data is trusted, each in one sentence."""
        if self.control_text:
            yield (
                f"{self.control_text} samples hold the text of a special token, which the "
                "tokenizer turns into that token; look at them if you did not write them"
            )


def counts_line(read: str, left_out: dict[str, int], changed: dict[str, int]) -> str:
    """One line for logs and reports: what was read, left out, and kept but is to be known."""
    parts = [f"{number:,} {what} left out" for what, number in left_out.items() if number]
    parts += [f"{number:,} {what}" for what, number in changed.items() if number]
    return read + "".join(f", {part}" for part in parts)


AnyCounts = TypeVar("AnyCounts", bound=ChatCounts)


class ChatCache(Generic[AnyCounts]):
    """A cache that is on disk and whole.

    Args:
        folder: Its folder.
        counts_type: What its counts are.

    Raises:
        FileNotFoundError: When there is none.
        ValueError: When it is damaged.
    """

    def __init__(self, folder: Path, counts_type: type[AnyCounts]) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.counts = [counts_type(**source["counts"]) for source in self.meta["sources"]]
        self._tables = {
            (number, name): SampleTable(folder / f"{number}-{name}.arrow")
            for number in range(len(self.counts))
            for name in SPLITS
        }
        for (number, name), table in self._tables.items():
            if len(table) != self.counts[number].splits[name]["samples"]:
                raise ValueError(f"{table.path} is damaged")

    @property
    def key(self) -> str:
        """The hash that names the cache."""
        return self.folder.name

    def table(self, source: int, name: Split) -> SampleTable:
        """The samples of one split of one source.

        Args:
            source: Number of the source, those held out as a whole counted after ``sources``.
            name: ``"train"``, ``"validation"`` or ``"test"``.
        """
        return self._tables[source, name]


class Grouped(Protocol):
    """A sample as it is read."""

    @property
    def group(self) -> str:
        """Samples of one group never cross splits."""


AnySample = TypeVar("AnySample", bound=Grouped)


class Row(NamedTuple):
    """A sample as it is written.

    Attributes:
        input_ids: Its tokens.
        trained: Which of them are targets.
        about: What is kept beside the tokens, as plain data.
        numbers: What it adds to its split, beside one sample and its tokens.
    """

    input_ids: list[int]
    trained: list[bool]
    about: dict[str, Any] | None
    numbers: dict[str, int]


class ChatCacheBuilder(Generic[AnySample, AnyCounts]):
    """Opens the cache of one kind of samples; builds it first where it is not there.

    A subclass says how a sample is read and becomes rows.

    Args:
        settings: Sources and how they are prepared.
        tokenizer: Fast tokenizer with a chat template.
        stop_token_ids: Tokens that end an answer.
    """

    counts_type: type[AnyCounts]
    format: int

    def __init__(
        self,
        settings: ChatSettings,
        tokenizer: "PreTrainedTokenizerBase",
        stop_token_ids: Sequence[int],
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.stops = set(stop_token_ids)

    # ----- what a subclass says -----------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What decides the content beside what all kinds have, as plain data."""
        raise NotImplementedError

    def source_format(self, source: RecordSource) -> str:
        """The format that a source is read with."""
        raise NotImplementedError

    def fingerprint(self, source: RecordSource) -> str:
        """What determines the samples of a source."""
        return record_fingerprint(source)

    def read(self, source: RecordSource) -> Iterator[AnySample]:
        """The samples of a source, in an order that is always the same."""
        raise NotImplementedError

    def content(self, sample: AnySample) -> str:
        """What makes two samples the same."""
        raise NotImplementedError

    def texts(self, sample: AnySample) -> list[str]:
        """The texts of a sample, in which a special token should not be."""
        raise NotImplementedError

    def rows(self, sample: AnySample, split: Split, counts: AnyCounts) -> Iterator[Row]:
        """What is written of a sample; what is cut or left out is counted."""
        raise NotImplementedError

    # ----- what follows from it -----------------------------------------------------------------

    def key(self) -> str:
        """The hash of everything that decides the content; it names the cache."""
        settings = self.settings
        content = {
            "format": self.format,
            "tokenizer": tokenizer_hash(self.tokenizer),
            "bos": self.tokenizer.bos_token_id,
            "template": self.tokenizer.chat_template,
            "sources": [self.fingerprint(source) for source in settings.sources],
            "val_sources": [self.fingerprint(source) for source in settings.val_sources],
            "seq_len": settings.seq_len,
            "fractions": [settings.val_fraction, settings.test_fraction],
            **self.identity(),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def open(self, cache_dir: str | Path) -> ChatCache[AnyCounts]:
        """Open the cache; build it first where it is not there.

        Args:
            cache_dir: Folder of all caches, made as needed.

        Raises:
            UserError: When a source cannot be read or does not fit the chat template, or
                ``cache_dir`` cannot be written.
        """
        return cached_folder(
            Path(cache_dir).expanduser() / self.key(),
            lambda folder: ChatCache(folder, self.counts_type),
            self._build,
        )

    def _build(self, folder: Path) -> None:
        """Write all files of a cache, the description last."""
        sources = self.settings.all_sources
        counts = [self.counts_type() for _ in sources]
        controls = [str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        digest = hashlib.sha256()
        with ExitStack() as files:
            writers = {
                (number, name): files.enter_context(SampleWriter(folder / f"{number}-{name}.arrow"))
                for number in range(len(sources))
                for name in SPLITS
            }
            for number, sample, hashed, split in self._kept(counts, controls):
                own = counts[number]
                for row in self.rows(sample, split, own):
                    writers[number, split].write(row.input_ids, row.trained, row.about)
                    added = {"samples": 1, "tokens": len(row.input_ids)}
                    for name, value in (added | row.numbers).items():
                        own.splits[split][name] += value
                    digest.update(hashed)
        meta = {
            "format": self.format,
            "python": platform.python_version(),
            "sha256": digest.hexdigest(),
            "sources": [
                {
                    "path": source.path,
                    "format": self.source_format(source),
                    "counts": dataclasses.asdict(own),
                }
                for source, own in zip(sources, counts, strict=True)
            ],
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")

    def _kept(
        self, counts: list[AnyCounts], controls: list[str]
    ) -> Iterator[tuple[int, AnySample, bytes, Split]]:
        """The samples that are neither repeated nor held out, each with its source and split."""
        settings, sources = self.settings, self.settings.all_sources
        order = settings.reading_order
        seen: set[bytes] = set()
        places: dict[str, Split] = {}
        for step, (number, whole) in enumerate(order):
            own = counts[number]
            # Where only the hash decides, groups need not be remembered.
            remembered = whole or any(split for _, split in order[step:])
            for sample in self.read(sources[number]):
                own.read += 1
                hashed = short_hash(self.content(sample))
                if hashed in seen:
                    own.duplicates += 1
                    continue
                seen.add(hashed)
                texts = self.texts(sample)
                own.control_text += any(token in text for text in texts for token in controls)
                split = whole or assign_split(
                    sample.group,
                    val_fraction=settings.val_fraction,
                    test_fraction=settings.test_fraction,
                )
                group = normalized_key(sample.group)
                if places.get(group, split) != split:
                    own.held_out += 1
                    continue
                if remembered:
                    places[group] = split
                yield number, sample, hashed, split


def short_hash(text: str) -> bytes:
    """16 bytes that two texts share only if they are the same."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
