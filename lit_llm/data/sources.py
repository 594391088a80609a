"""Sources of text: what the user names, turned into a stream of documents."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llm.data.files import (
    COMPRESSIONS,
    FORMATS,
    Document,
    DocumentUnit,
    file_format,
    is_glob,
    list_files,
    read_file,
)
from lit_llm.data.hub import hub_commit, read_hub
from lit_llm.errors import UserError

__all__ = [
    "PYTHON_DOCS",
    "Document",
    "Source",
    "as_sources",
    "documents_sha256",
    "read_documents",
    "source_fingerprint",
    "source_labels",
]

PYTHON_DOCS = "python-docs"

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Names that say nothing about what a file holds: the folder's name is added.
_PLAIN_STEMS = {"train", "training", "valid", "validation", "val", "test", "data", "input", "text"}


@dataclass(frozen=True)
class Source:
    """One source of text.

    Args:
        path: ``python-docs`` (the documentation that comes with this Python), a local file, folder
            or glob (.txt, .md, .jsonl, .parquet, each also with .gz or .zst), or the name of a data
            set on the Hugging Face Hub.
        weight: Share of the training tokens drawn from this source, relative to the other weights;
            none means in proportion to its tokens.
        name: Name in logs and reports; none derives one from the path.
        field: Key or column that holds the text, for .jsonl, .parquet and the Hub.
        documents: How a .txt or .md file becomes documents: ``file`` (one), ``paragraphs`` (cut at
            blank lines), ``lines``, or ``auto``: a file up to 100 kB is one document, a larger one
            is cut at blank lines into documents of about 10 kB.
        subset: Configuration of a data set on the Hub.
        split: Split of a data set on the Hub.
        revision: Branch, tag or commit of a data set on the Hub; a commit makes runs repeatable,
            and a corpus that was prepared once usable without the network.
        streaming: Read a data set of the Hub while downloading, without a copy on disk.
        max_documents: Read at most that many documents.
        max_bytes: Stop before the document that would make the text longer than that many bytes of
            UTF-8.
    """

    path: str
    weight: float | None = None
    name: str | None = None
    field: str = "text"
    documents: DocumentUnit = "auto"
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = True
    max_documents: int | None = None
    max_bytes: int | None = None

    @property
    def label(self) -> str:
        """The name, or one from the path: file name without endings, folder name, Hub name."""
        if self.name:
            return self.name
        if self.path == PYTHON_DOCS:
            return PYTHON_DOCS
        parts = [
            part for part in Path(self.path).parts if not is_glob(part) and part.strip("/\\.~")
        ]
        if not parts:
            return "files"
        stem = _without_endings(parts[-1]) if file_format(parts[-1]) else parts[-1]
        return "-".join([*parts[-2:-1], stem]) if stem.lower() in _PLAIN_STEMS else stem


def as_sources(
    sources: "str | Source | dict[str, Any] | Iterable[str | Source | dict[str, Any]]",
) -> list[Source]:
    """Sources from a configuration: a path, a ``Source``, its fields, or a list of these.

    Raises:
        UserError: When the list is empty, a field does not exist, or a value makes no sense.
    """
    items = [sources] if isinstance(sources, str | Source | dict) else list(sources)
    if not items:
        raise UserError("no source of text is given; 'python-docs' needs no file and no network.")
    return [_checked(_as_source(item)) for item in items]


def _as_source(item: str | Source | dict[str, Any]) -> Source:
    if isinstance(item, Source):
        return item
    try:
        # A list or mapping that does not parse as one reaches us as it was typed.
        if isinstance(item, str) and not item.lstrip().startswith(("[{", "{")):
            return Source(item)
        if isinstance(item, dict):
            return Source(**item)
    except TypeError:
        pass
    fields = ", ".join(Source.__dataclass_fields__)
    raise UserError(
        f"source {item!r} is not understood; a path is needed, and the fields are: {fields}."
    )


# Not in __post_init__: where a source is one of several types allowed, jsonargparse would bury the
# sentence.
def _checked(source: Source) -> Source:
    if not source.path:
        raise UserError(
            "a source needs a path: 'python-docs', a file, folder or glob, or a Hub name."
        )
    if source.weight is not None and not (source.weight > 0 and math.isfinite(source.weight)):
        raise UserError(
            f"source {source.path}: weight {source.weight} must be above 0; "
            "leave a source out to give it no weight."
        )
    for option in ("max_documents", "max_bytes"):
        value = getattr(source, option)
        if value is not None and value < 1:
            raise UserError(f"source {source.path}: {option} {value} must be at least 1.")
    return source


def source_labels(sources: Iterable[Source]) -> list[str]:
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
    kind = _kind(source)
    if kind == "python-docs":
        from lit_llm.data.python_docs import collect_documents

        yield from collect_documents()
    elif kind == "hub":
        yield from read_hub(
            source.path,
            field=source.field,
            subset=source.subset,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
    else:
        for _, file in list_files(source.path):
            yield from read_file(file, field=source.field, documents=source.documents)


def _kind(source: Source) -> str:
    path = _checked(source).path
    if path == PYTHON_DOCS:
        return "python-docs"
    local = (
        Path(path).expanduser().exists()
        or is_glob(path)
        or path.startswith(("./", "../", "/", "~", ".\\", "..\\"))
        or path.lower().endswith(FORMATS + COMPRESSIONS)
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


def _without_endings(name: str) -> str:
    for ending in COMPRESSIONS + FORMATS:
        name = name[: -len(ending)] if name.lower().endswith(ending) else name
    return name


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
    kind = _kind(source)
    limits = {"max_documents": source.max_documents, "max_bytes": source.max_bytes}
    content: dict[str, Any] = {"kind": kind, **limits}
    if kind == "python-docs":
        content["sha256"] = documents_sha256(_read_all(source))
    elif kind == "hub":
        hub = ("path", "field", "subset", "split", "revision")
        content.update({option: getattr(source, option) for option in hub})
        content["commit"] = hub_commit(source.path, source.revision)
    else:
        content.update(field=source.field, documents=source.documents)
        content["files"] = [[name, _file_sha256(file)] for name, file in list_files(source.path)]
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
