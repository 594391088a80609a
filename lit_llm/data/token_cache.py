"""Documents tokenised once, kept in memory-mapped files.

A cache is a folder ``<cache_dir>/<key>/``. The key is a hash of everything that decides its
content: the sources' fingerprints, the tokenizer, cleaning, deduplication, splits and the format.
So a folder is right or it is not there: it is written under another name and renamed when it is
whole.

Legend: N tokens of a split of a source.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lit_llm.data.cleaning import CleaningReport, clean_documents
from lit_llm.data.corpus import SPLITS, CorpusSettings
from lit_llm.data.deduplication import (
    DeduplicationReport,
    Duplicate,
    deduplicate_documents,
)
from lit_llm.data.folder_cache import cached_folder
from lit_llm.data.sources import Document, read_documents, source_fingerprint
from lit_llm.data.splits import Split, assign_split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1

# Texts that are handed to the tokenizer at once: enough for its threads, little for the memory.
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 4_000_000


class TokenSplit:
    """The tokens of one split of one source, mapped into memory when they are first read.

    Args:
        prefix: Path of the files without their suffixes.
        counts: The split's entry in ``meta.json``.
        dtype: Type of the stored tokens.
    """

    def __init__(self, prefix: Path, counts: dict[str, Any], dtype: str) -> None:
        self.prefix = prefix
        self.counts = counts
        self.dtype = dtype

    @functools.cached_property
    def tokens(self) -> NDArray[Any]:
        """(N,) token ids of all documents, each closed by EOS."""
        return _map(self.prefix.with_suffix(".tokens"), self.dtype, self.counts["tokens"])

    @functools.cached_property
    def starts(self) -> NDArray[np.int64]:
        """(documents,) positions of the documents' first tokens."""
        return _map(self.prefix.with_suffix(".starts"), "int64", self.counts["documents"])

    def texts(self) -> Iterator[str]:
        """The documents as they were tokenised; kept for held-out splits only."""
        with self.prefix.with_suffix(".texts").open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as the data behind it; a worker maps the files anew.
        return {name: getattr(self, name) for name in ("prefix", "counts", "dtype")}


class TokenCache:
    """A cache that is on disk and whole.

    Args:
        folder: Its folder.

    Raises:
        FileNotFoundError: When there is none.
        ValueError: When it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        for number, source in enumerate(self.meta["sources"]):
            for name, counts in source["splits"].items():
                prefix = folder / f"{number}-{name}"
                width = np.dtype(self.meta["dtype"]).itemsize
                expected = {
                    prefix.with_suffix(".tokens"): counts["tokens"] * width,
                    prefix.with_suffix(".starts"): counts["documents"] * 8,
                }
                for path, size in expected.items():
                    if path.stat().st_size != size:
                        raise ValueError(f"{path} is damaged")

    @property
    def key(self) -> str:
        """The hash that names the cache."""
        return self.folder.name

    def split(self, source: int, name: Split) -> TokenSplit:
        """One split of one source.

        Args:
            source: Number of the source, ``val_sources`` counted after ``sources``.
            name: ``"train"``, ``"validation"`` or ``"test"``.
        """
        counts = self.meta["sources"][source]["splits"][name]
        return TokenSplit(self.folder / f"{source}-{name}", counts, self.meta["dtype"])

    def cleaning_report(self, source: int) -> CleaningReport:
        """What cleaning did to a source."""
        fields = self.meta["sources"][source]["cleaning"]
        return CleaningReport(**{**fields, "removed": Counter(fields["removed"])})

    def deduplication_report(self) -> DeduplicationReport:
        """What deduplication removed, over all sources."""
        fields = self.meta["deduplication"]
        return DeduplicationReport(
            **{**fields, "examples": [Duplicate(**example) for example in fields["examples"]]}
        )


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """V, the largest id + 1; ``len(tokenizer)`` is less where ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 of what turns text into ids, wherever the tokenizer was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content.pop("truncation")  # set by calls, not by the tokenizer's content
        content.pop("padding")
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    content = {"tokenizer": content, "eos": tokenizer.eos_token_id}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def cache_key(settings: CorpusSettings, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The hash that names the cache of a corpus.

    Raises:
        UserError: When a source cannot be read.
    """
    content = {
        "format": FORMAT,
        "tokenizer": tokenizer_hash(tokenizer),
        "sources": [source_fingerprint(source) for source in settings.sources],
        "val_sources": [source_fingerprint(source) for source in settings.val_sources],
        "cleaning": dataclasses.asdict(settings.cleaning),
        "deduplication": dataclasses.asdict(settings.deduplication),
        "fractions": [settings.val_fraction, settings.test_fraction],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def open_cache(
    cache_dir: str | Path, settings: CorpusSettings, tokenizer: "PreTrainedTokenizerBase"
) -> TokenCache:
    """Open the cache of a corpus; build it first where it is not there.

    Any number of processes may call this at once: one builds, the others wait and open the same.
    The lock ends with the process that holds it, so one that was killed blocks nobody.

    Args:
        cache_dir: Folder of all caches, made as needed.
        settings: Sources and how they are prepared.
        tokenizer: Fast tokenizer with an EOS token.

    Raises:
        UserError: When a source cannot be read or ``cache_dir`` cannot be written.
    """
    folder = Path(cache_dir).expanduser() / cache_key(settings, tokenizer)
    return cached_folder(folder, TokenCache, lambda draft: _build(draft, settings, tokenizer))


def _build(folder: Path, settings: CorpusSettings, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Write all files of a cache, the description last."""
    sources = settings.all_sources
    dtype = "uint16" if vocabulary_size(tokenizer) < 2**16 else "uint32"
    cleaning = [CleaningReport() for _ in sources]
    deduplication = DeduplicationReport()
    digest = hashlib.sha256()
    with contextlib.ExitStack() as files:
        writers = {
            (number, name): files.enter_context(_SplitWriter(folder / f"{number}-{name}", dtype))
            for number in range(len(sources))
            for name in SPLITS
        }
        kept = deduplicate_documents(
            _clean_all(settings, cleaning), settings.deduplication, deduplication
        )
        for batch in _batches(kept):
            texts = [document.text for document in batch]
            for document, ids in zip(batch, _encode(tokenizer, texts), strict=True):
                if not ids:
                    continue
                number = document.source
                split: Split = "validation"
                if number < len(settings.sources):
                    split = assign_split(
                        document.text,
                        val_fraction=settings.val_fraction,
                        test_fraction=settings.test_fraction,
                    )
                digest.update(_framed(document.text))
                ids.append(tokenizer.eos_token_id)
                writers[number, split].write(document.text, ids, keep_text=split != "train")
    meta = {
        "format": FORMAT,
        "python": platform.python_version(),
        "tokenizer": tokenizer_hash(tokenizer),
        "dtype": dtype,
        "sha256": digest.hexdigest(),
        "deduplication": dataclasses.asdict(deduplication),
        "sources": [
            {
                "path": source.path,
                "cleaning": {**vars(report), "removed": dict(report.removed)},
                "splits": {name: writers[number, name].counts() for name in SPLITS},
            }
            for number, (source, report) in enumerate(zip(sources, cleaning, strict=True))
        ],
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


class _Tagged(Document):
    """A document that knows the number of its source."""

    source: int = 0


def _clean_all(settings: CorpusSettings, reports: list[CleaningReport]) -> Iterator[_Tagged]:
    # Validation first: of equal documents the first is kept.
    numbered = list(enumerate(settings.all_sources))
    border = len(settings.sources)
    for number, source in numbered[border:] + numbered[:border]:
        documents = read_documents(source)
        for document in clean_documents(documents, settings.cleaning, reports[number]):
            tagged = _Tagged(*document)
            tagged.source = number
            yield tagged


def _batches(documents: Iterable[Document]) -> Iterator[list[_Tagged]]:
    batch: list[_Tagged] = []
    characters = 0
    for document in documents:
        assert isinstance(document, _Tagged)  # deduplication passes documents on as they are
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or characters > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    # split_special_tokens: "<|endoftext|>" in a text is text, and must not end the document.
    encoding = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about texts longer than the model's context: they are packed
    )
    return encoding["input_ids"]


class _SplitWriter:
    """Streams the documents of one split of one source to its files."""

    def __init__(self, prefix: Path, dtype: str) -> None:
        self._prefix = prefix
        self._dtype = dtype
        self._files: dict[str, IO[bytes]] = {}
        self._digest = hashlib.sha256()
        self.documents = self.bytes = self.tokens = 0

    def __enter__(self) -> "_SplitWriter":
        paths = (
            self._prefix.with_suffix(".tokens"),
            self._prefix.with_suffix(".starts"),
            self._prefix.with_suffix(".texts"),
        )
        self._tokens, self._starts, self._texts = (path.open("wb") for path in paths)
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._tokens, self._starts, self._texts):
            file.flush()
            os.fsync(file.fileno())  # before the rename that makes them visible
            file.close()

    def write(self, text: str, ids: list[int], *, keep_text: bool) -> None:
        """Add one document, its EOS included."""
        framed = _framed(text)
        self._digest.update(framed)
        self._starts.write(np.int64(self.tokens).tobytes())
        self._tokens.write(np.array(ids, dtype=self._dtype).tobytes())
        if keep_text:
            self._texts.write(json.dumps(text).encode() + b"\n")
        self.documents += 1
        self.bytes += len(text.encode())
        self.tokens += len(ids)

    def counts(self) -> dict[str, Any]:
        """The split's entry in the description."""
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "sha256": self._digest.hexdigest(),
        }


def _framed(text: str) -> bytes:
    data = text.encode()
    return b"%d\n" % len(data) + data


def _map(path: Path, dtype: str, length: int) -> NDArray[Any]:
    if length == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(length,))
