"""Local files: found by a path, a folder or a glob, and read as a stream of bytes or lines.

Everything is read as a stream of bytes and decoded line by line, so that a mistake in a file can be
told with its line or byte offset, and a file larger than the memory can be read.
"""

import contextlib
import glob as globbing
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from lit_llm.errors import UserError

COMPRESSIONS = (".gz", ".zst")


class Document(NamedTuple):
    """One text and the place it was read from.

    Attributes:
        text: The text; never empty, never only white space.
        origin: Where it stands, for people: ``"file:line"``, ``"dataset:row"`` or
            ``"python-docs:module"``.
    """

    text: str
    origin: str


def file_format(path: str | Path, formats: tuple[str, ...]) -> str | None:
    """Format of a file by its name: one of ``formats``, or None when it is none of them."""
    name = str(path).lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return next((suffix for suffix in formats if name.endswith(suffix)), None)


def is_glob(path: str) -> bool:
    """Whether a path holds wildcards (``*``, ``?``, ``[``)."""
    return globbing.has_magic(path)


def list_files(path: str, formats: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Readable files behind a file name, a folder (recursive) or a glob, by relative name.

    Hidden files and folders (leading dot) inside a folder are left out, and so are links to
    folders.

    Args:
        path: The file, folder or glob.
        formats: Endings of the files that can be read, compressed or not.

    Returns:
        Pairs of the name relative to the given folder (or to the part of the glob before its first
        wildcard) with ``/`` as separator, and the path to open.

    Raises:
        UserError: When nothing is there, or nothing of a readable format.
    """
    supported = f"{', '.join(formats)}, each also with {' or '.join(COMPRESSIONS)}"
    local = Path(path).expanduser()
    if local.is_file():
        if file_format(local, formats) is None:
            raise UserError(f"{path}: cannot tell the format of this file; use {supported}.")
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
    readable = [
        (file.relative_to(root).as_posix(), file) for file in found if file_format(file, formats)
    ]
    if not readable:
        raise UserError(f"{path}: holds no file of a format that can be read ({supported}).")
    return sorted(readable)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what can go wrong while bytes of a file are read into one sentence.

    Raises:
        UserError: When the file cannot be opened or read, or is not compressed as its name says.
    """
    try:
        yield
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


def decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1) with their end, split at line feeds only, CRLF turned into LF.

    Raises:
        UserError: With line and offset, for bytes that are not UTF-8.
    """
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
