"""Documents from local files: .txt, .md, .jsonl and .parquet, plain or with .gz or .zst.

Everything is read as a stream of bytes and decoded line by line, so that a mistake in a file can be
told with its line or byte offset, and a file larger than the memory can be read.
"""

import glob as globbing
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from lit_llm.errors import UserError

FORMATS = (".txt", ".md", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")
SUPPORTED = f"{', '.join(FORMATS)}, each also with {' or '.join(COMPRESSIONS)}"

SMALL_FILE = 100_000
CUT_SIZE = 10_000

DocumentUnit = Literal["auto", "file", "paragraphs", "lines"]


class Document(NamedTuple):
    """One text and the place it was read from.

    Attributes:
        text: The text; never empty, never only white space.
        origin: Where it stands, for people: ``"file:line"``, ``"dataset:row"`` or
            ``"python-docs:module"``.
    """

    text: str
    origin: str


def file_format(path: str | Path) -> str | None:
    """Format of a file by its name: one of ``FORMATS``, or None when it is not one we read."""
    name = str(path).lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def is_glob(path: str) -> bool:
    """Whether a path holds wildcards (``*``, ``?``, ``[``)."""
    return globbing.has_magic(path)


def list_files(path: str) -> list[tuple[str, Path]]:
    """Readable files behind a file name, a folder (recursive) or a glob, by relative name.

    Hidden files and folders (leading dot) inside a folder are left out, and so are links to
    folders.

    Returns:
        Pairs of the name relative to the given folder (or to the part of the glob before its first
        wildcard) with ``/`` as separator, and the path to open.

    Raises:
        UserError: When nothing is there, or nothing of a readable format.
    """
    local = Path(path).expanduser()
    if local.is_file():
        if file_format(local) is None:
            raise UserError(f"{path}: cannot tell the format of this file; use {SUPPORTED}.")
        return [(local.name, local)]
    if local.is_dir():
        root, found = local, _walk(local)
    elif is_glob(path):
        root = _glob_root(local)
        found = [Path(name) for name in globbing.glob(str(local), recursive=True)]
        found = [file for file in found if file.is_file()]
        if not found:
            raise UserError(f"{path}: no file matches this pattern.")
    else:
        raise UserError(f"{path}: no such file or folder.")
    readable = [(file.relative_to(root).as_posix(), file) for file in found if file_format(file)]
    if not readable:
        raise UserError(f"{path}: holds no file of a format that can be read ({SUPPORTED}).")
    return sorted(readable)


def read_file(path: Path, *, field: str, documents: DocumentUnit) -> Iterator[Document]:
    """Read one file as documents, in its order; texts of only white space are left out.

    Args:
        path: A file with a name that ``file_format`` knows.
        field: Column or key that holds the text (.jsonl, .parquet).
        documents: How a .txt or .md file becomes documents, see ``Source``.

    Raises:
        UserError: With the file and the line (or row, or byte offset), when something cannot be
            read.
    """
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    try:
        if reader := readers.get(file_format(path) or ""):
            found = reader(path, field)
        else:
            found = _read_text(path, documents)
        yield from (document for document in found if document.text and not document.text.isspace())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path}: the compressed file is cut short or damaged ({error})."
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be read ({reason}).") from error


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed according to its name."""
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(path))
    if path.name.lower().endswith(".zst"):
        return io.BufferedReader(_Chunks(_decompress_zstd(path)), buffer_size=1 << 20)
    return path.open("rb")


class _Chunks(io.RawIOBase):
    """A readable raw stream over an iterator of bytes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _decompress_zstd(path: Path) -> Iterator[bytes]:
    # The stream reader of zstandard ends silently where a file is cut short; eof of a
    # decompressobj tells whether the last frame was whole.
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            while data:
                frame = frame or decompressor.decompressobj()
                try:
                    yield frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise EOFError(str(error)) from error
                data = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
    if frame is not None:
        raise EOFError("the last zstd frame is not complete")


def _walk(folder: Path) -> list[Path]:
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return found


def _glob_root(pattern: Path) -> Path:
    parts = pattern.parts
    first = next(index for index, part in enumerate(parts) if is_glob(part))
    return Path(*parts[:first])


def _decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1) with their end, split at line feeds only, CRLF turned into LF."""
    offset = 0
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}:{number}: byte 0x{line[error.start]:02x} "
                    f"at offset {offset + error.start} is not UTF-8; convert the file to UTF-8."
                ) from error
            offset += len(line)
            text = text.removeprefix("\ufeff") if number == 1 else text
            yield number, f"{text[:-2]}\n" if text.endswith("\r\n") else text


def _read_text(path: Path, documents: DocumentUnit) -> Iterator[Document]:
    if documents == "lines":
        for number, line in _decoded_lines(path):
            yield Document(line.rstrip("\n"), f"{path}:{number}")
        return
    sizes = {"paragraphs": 0, "auto": CUT_SIZE, "file": None}
    size = sizes[documents]
    if documents == "auto" and _is_small(path):
        size = None
    yield from _cut_at_blank_lines(path, size)


def _is_small(path: Path) -> bool:
    with open_bytes(path) as file:
        left = SMALL_FILE + 1
        while left > 0 and (block := file.read(left)):
            left -= len(block)
    return left > 0


def _cut_at_blank_lines(path: Path, size: int | None) -> Iterator[Document]:
    """Greedy from the start, so that text added at the end moves no earlier cut.

    A document ends at the first blank line once it has ``size`` bytes, and where no blank line
    comes at the first line end after twice that size (not for paragraphs, size 0). None: never cut.
    """
    lines: list[str] = []
    length, start = 0, 1
    for number, line in _decoded_lines(path):
        blank = not line.strip()
        if not lines:
            if blank and size is not None:
                continue
            start = number
        lines.append(line)
        length += len(line.encode())
        if size is not None and ((blank and length > size) or (size and length > 2 * size)):
            yield Document("".join(lines).rstrip("\n"), f"{path}:{start}")
            lines, length = [], 0
    yield Document("".join(lines).rstrip("\n"), f"{path}:{start}")


def _read_jsonl(path: Path, field: str) -> Iterator[Document]:
    for number, line in _decoded_lines(path):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        try:
            record = json.loads(line.rstrip("\n"))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{origin}: is not JSON ({error}); .jsonl wants one object a line."
            ) from error
        if not isinstance(record, dict):
            raise UserError(
                f"{origin}: is JSON but not an object like {{{json.dumps(field)}: ...}}."
            )
        yield Document(text_of(record, field, origin), origin)


def text_of(record: dict[str, Any], field: str, origin: str) -> str:
    """Text of a record.

    Raises:
        UserError: When the field is missing (naming those that exist), no string, or no Unicode
            text.
    """
    if field not in record:
        names = ", ".join(repr(name) for name in record) or "none"
        raise UserError(f"{origin}: has no field {field!r}; its fields are: {names}.")
    text = record[field]
    if not isinstance(text, str):
        raise UserError(f"{origin}: field {field!r} is {_json_type(text)}, not a string.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{origin}: field {field!r} holds half of a surrogate pair at character {error.start}, "
            "which is not Unicode text."
        ) from error
    return text


def _json_type(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), f"of type {type(value).__name__}")


def _read_parquet(path: Path, field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    compressed = path.name.lower().endswith(COMPRESSIONS)
    try:
        # Parquet is read from its end, so a compressed one has to be unpacked in memory.
        with open_bytes(path) as file:
            table = pyarrow.parquet.ParquetFile(
                pyarrow.py_buffer(file.read()) if compressed else file
            )
            names = table.schema_arrow.names
            if field not in names:
                text_of(dict.fromkeys(names), field, str(path))
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    origin = f"{path}:{row}"
                    yield Document(text_of({field: value.as_py()}, field, origin), origin)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: is not a readable parquet file ({reason}).") from error
