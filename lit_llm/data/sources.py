"""Sources of text: what the user names, turned into a stream of documents."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, overload

import yaml

from lit_llm.data.files import COMPRESSIONS, Document, file_format, is_glob, list_files
from lit_llm.data.hub import hub_commit, read_hub
from lit_llm.data.record_formats import Record, text_of
from lit_llm.data.text_formats import TEXT_FORMATS, DocumentUnit, read_text_file
from lit_llm.errors import UserError

__all__ = [
    "PYTHON_DOCS",
    "PYTHON_PARAMETERS",
    "DataSource",
    "Document",
    "Source",
    "as_sources",
    "content_fingerprint",
    "documents_sha256",
    "read_documents",
    "read_hub_source",
    "source_fingerprint",
    "source_kind",
    "source_labels",
]

PYTHON_DOCS = "python-docs"
PYTHON_PARAMETERS = "python-parameters"

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Names that say nothing about what a file holds: the folder's name is added.
_PLAIN_STEMS = {"train", "training", "valid", "validation", "val", "test", "data", "input", "text"}


@dataclass(frozen=True)
class DataSource:
    """What every kind of source has in common; the kinds say what they read.

    Args:
        path: ``python-docs``, a local file, folder or glob, or the name of a data set on the
            Hugging Face Hub.
        weight: Share of the training drawn from this source, relative to the other weights.
        name: Name in logs and reports; none derives one from the path.
        subset: Configuration of a data set on the Hub.
        split: Split of a data set on the Hub.
        revision: Branch, tag or commit of a data set on the Hub.
        streaming: Read a data set of the Hub while downloading, without a copy on disk.
    """

    path: str
    weight: float | None = None
    name: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = True

    # Of the kind, not of one source: what it reads, from which files, its limits, and the names of
    # what needs no file.
    content: ClassVar[str] = "data"
    formats: ClassVar[tuple[str, ...]] = TEXT_FORMATS
    limits: ClassVar[tuple[str, ...]] = ()
    embedded: ClassVar[tuple[str, ...]] = (PYTHON_DOCS,)

    @property
    def is_embedded(self) -> bool:
        """Whether it comes with the program, with no file and no network."""
        return self.path in self.embedded

    @property
    def label(self) -> str:
        """The name, or one from the path: file name without endings, folder name, Hub name."""
        if self.name:
            return self.name
        if self.is_embedded:
            return self.path
        parts = [
            part for part in Path(self.path).parts if not is_glob(part) and part.strip("/\\.~")
        ]
        if not parts:
            return "files"
        known = file_format(parts[-1], self.formats)
        stem = self._without_endings(parts[-1]) if known else parts[-1]
        return "-".join([*parts[-2:-1], stem]) if stem.lower() in _PLAIN_STEMS else stem

    def _without_endings(self, name: str) -> str:
        for ending in COMPRESSIONS + self.formats:
            name = name[: -len(ending)] if name.lower().endswith(ending) else name
        return name

    # Not in __post_init__: where a source is one of several types allowed, jsonargparse would bury
    # the sentence.
    def check(self) -> None:
        """Check what can be checked without reading.

        Raises:
            UserError: When a value makes no sense.
        """
        if not self.path:
            raise UserError(
                "a source needs a path: 'python-docs', a file, folder or glob, or a Hub name."
            )
        if self.weight is not None and not (self.weight > 0 and math.isfinite(self.weight)):
            raise UserError(
                f"source {self.path}: weight {self.weight} must be above 0; "
                "leave a source out to give it no weight."
            )
        for option in self.limits:
            value = getattr(self, option)
            if value is not None and value < 1:
                raise UserError(f"source {self.path}: {option} {value} must be at least 1.")


@dataclass(frozen=True)
class Source(DataSource):
    """One source of text.

    Args:
        path: ``python-docs`` (the documentation that comes with this Python), a local file, folder
            or glob (.txt, .md, .jsonl, .parquet, each also with .gz or .zst), or the name of a data
            set on the Hugging Face Hub.
        weight: Share of the training tokens drawn from this source, relative to the other weights;
            none means in proportion to its tokens.
        name: Name in logs and reports; none derives one from the path.
        subset: Configuration of a data set on the Hub.
        split: Split of a data set on the Hub.
        revision: Branch, tag or commit of a data set on the Hub; a commit makes runs repeatable,
            and a corpus that was prepared once usable without the network.
        streaming: Read a data set of the Hub while downloading, without a copy on disk.
        field: Key or column that holds the text, for .jsonl, .parquet and the Hub.
        documents: How a .txt or .md file becomes documents: ``file`` (one), ``paragraphs`` (cut at
            blank lines), ``lines``, or ``auto``: a file up to 100 kB is one document, a larger one
            is cut at blank lines into documents of about 10 kB.
        max_documents: Read at most that many documents.
        max_bytes: Stop before the document that would make the text longer than that many bytes of
            UTF-8.
    """

    field: str = "text"
    documents: DocumentUnit = "auto"
    max_documents: int | None = None
    max_bytes: int | None = None

    content = "text"
    limits = ("max_documents", "max_bytes")


AnySource = TypeVar("AnySource", bound=DataSource)


@overload
def as_sources(
    sources: str | Source | dict[str, Any] | Iterable[str | Source | dict[str, Any]],
) -> list[Source]: ...


@overload
def as_sources(
    sources: str | AnySource | dict[str, Any] | Iterable[str | AnySource | dict[str, Any]],
    kind: type[AnySource],
) -> list[AnySource]: ...


def as_sources(sources: Any, kind: type[Any] = Source) -> list[Any]:
    """Sources from a configuration: a path, a source, its fields, or a list of these.

    Args:
        sources: What the configuration says.
        kind: The kind of source that is wanted.

    Raises:
        UserError: When the list is empty, a field does not exist, or a value makes no sense.
    """
    items = [sources] if isinstance(sources, str | DataSource | dict) else list(sources)
    if not items:
        raise UserError(
            f"no source of {kind.content} is given; 'python-docs' needs no file and no network."
        )
    found = [_as_source(item, kind) for given in items for item in _parsed(given)]
    for source in found:
        source.check()
    return found


def _parsed(item: Any) -> list[Any]:
    """What a list or mapping holds that reached us as it was typed, since a value did not fit."""
    if not isinstance(item, str) or not item.lstrip().startswith(("[{", "{")):
        return [item]
    try:
        value = yaml.safe_load(item)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict | list):
        raise UserError(f"source {item!r} is not understood; it is no YAML.")
    return value if isinstance(value, list) else [value]


def _as_source(item: Any, kind: type[AnySource]) -> AnySource:
    if isinstance(item, kind):
        return item
    names = ", ".join(field.name for field in fields(kind))
    if isinstance(item, str):
        return kind(item)
    if isinstance(item, dict):
        known = {field.name for field in fields(kind)}
        if unknown := [name for name in item if name not in known]:
            raise UserError(f"a source has no field {unknown[0]!r}; the fields are: {names}.")
        if "path" in item:
            return kind(**item)
    raise UserError(
        f"source {item!r} is not understood; a path is needed, and the fields are: {names}."
    )


def source_labels(sources: Iterable[DataSource]) -> list[str]:
    """Labels of several sources, made unique: a repeated one gets ``-2``, ``-3`` and so on.

    Raises:
        UserError: When two sources are given the same name.
    """
    sources = list(sources)
    names = Counter(source.name for source in sources if source.name)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise UserError(f"two sources are named {repeated[0]!r}; give each a name of its own.")
    taken, labels = set(names), []
    for source in sources:
        label, number = source.label, 1
        while not source.name and label in taken:
            number += 1
            label = f"{source.label}-{number}"
        taken.add(label)
        labels.append(label)
    return labels


def source_kind(source: DataSource) -> str:
    """Where a source lies: the name of what is embedded (``python-docs``), ``hub`` or ``local``.

    Raises:
        UserError: When a value makes no sense, there or anywhere.
    """
    source.check()
    path = source.path
    if source.is_embedded:
        return path
    local = (
        Path(path).expanduser().exists()
        or is_glob(path)
        or path.startswith(("./", "../", "/", "~", ".\\", "..\\"))
        or path.lower().endswith(source.formats + COMPRESSIONS)
        or not _HUB_NAME.fullmatch(path)
        # "data/texts" is a name the Hub might know, but not beside a folder "data".
        or ("/" in path and Path(path).parent.is_dir())
    )
    if local and (source.subset or source.revision):
        raise UserError(
            f"{path}: subset and revision belong to a data set on the Hub, "
            "but this is a local path."
        )
    return "local" if local else "hub"


def read_documents(source: Source) -> Iterator[Document]:
    """Read the documents of a source, in an order that is always the same.

    Raises:
        UserError: In one sentence with the file and line, for whatever cannot be read, and when
            there is not one document.
    """
    count = length = 0
    for document in _read_all(source):
        size = len(document.text.encode())
        if source.max_bytes is not None and length + size > source.max_bytes:
            if count == 0:
                raise UserError(
                    f"{document.origin}: the first document has {size} bytes, "
                    f"above max_bytes {source.max_bytes}."
                )
            return
        yield document
        count += 1
        length += size
        if count == source.max_documents:
            return
    if count == 0:
        raise UserError(f"{source.path}: the corpus is empty: there is no text in it.")


def _read_all(source: Source) -> Iterator[Document]:
    kind = source_kind(source)
    if kind == "python-docs":
        from lit_llm.data.python_docs import collect_documents

        yield from collect_documents()
    elif kind == "hub":
        for data, origin in read_hub_source(source):
            text = text_of(data, source.field, origin)
            if text and not text.isspace():
                yield Document(text, origin)
    else:
        for _, file in list_files(source.path, source.formats):
            yield from read_text_file(file, field=source.field, documents=source.documents)


def read_hub_source(source: DataSource) -> Iterator[Record]:
    """Read the records of a source that lies on the Hub.

    Raises:
        UserError: When the Hub does not answer or does not know the data set, subset or split.
    """
    return read_hub(
        source.path,
        subset=source.subset,
        split=source.split,
        revision=source.revision,
        streaming=source.streaming,
    )


def documents_sha256(documents: Iterable[Document]) -> str:
    """SHA-256 of the texts of documents in their order, each with its length before it."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.text.encode()
        digest.update(b"%d\n" % len(data) + data)
    return digest.hexdigest()


def source_fingerprint(source: Source) -> str:
    """SHA-256 of what determines the documents of a source, the same wherever the files lie.

    Local files: their names relative to the source, their bytes as stored and the settings. The
    Hub: name, subset, split, revision, and the commit when the Hub tells it. ``python-docs``: the
        collected text.
    ``name`` and ``weight`` change no document and do not count.

    Raises:
        UserError: When there is no such file, or a file cannot be read.
    """
    kind = source_kind(source)
    settings: dict[str, Any] = {
        "max_documents": source.max_documents,
        "max_bytes": source.max_bytes,
    }
    if kind == "python-docs":
        settings["sha256"] = documents_sha256(_read_all(source))
    else:
        settings["field"] = source.field
    if kind == "local":
        settings["documents"] = source.documents
    return content_fingerprint(source, settings)


def content_fingerprint(source: DataSource, settings: dict[str, Any]) -> str:
    """SHA-256 of where a source lies, what is there, and the settings it is read with.

    Args:
        source: The source.
        settings: What else decides what is read (JSON values); for ``python-docs`` its content too.

    Raises:
        UserError: When there is no such file, or a file cannot be read.
    """
    content: dict[str, Any] = {"kind": source_kind(source), **settings}
    if content["kind"] == "hub":
        hub = ("path", "subset", "split", "revision")
        content.update({option: getattr(source, option) for option in hub})
        content["commit"] = hub_commit(source.path, source.revision)
    elif content["kind"] == "local":
        files = list_files(source.path, source.formats)
        content["files"] = [[name, _file_sha256(file)] for name, file in files]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_sha256(file: Path) -> str:
    try:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}).") from error
