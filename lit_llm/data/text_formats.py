"""Documents from one local file: .txt, .md, .jsonl and .parquet, plain or with .gz or .zst."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lit_llm.data.files import Document, decoded_lines, file_format, open_bytes, reading
from lit_llm.data.record_formats import read_record_file, text_of

TEXT_FORMATS = (".txt", ".md", ".jsonl", ".parquet")

SMALL_FILE = 100_000
CUT_SIZE = 10_000

DocumentUnit = Literal["auto", "file", "paragraphs", "lines"]


def read_text_file(path: Path, *, field: str, documents: DocumentUnit) -> Iterator[Document]:
    """Read one file as documents, in its order; texts of only white space are left out.

    Args:
        path: A file with one of the ``TEXT_FORMATS``.
        field: Column or key that holds the text (.jsonl, .parquet).
        documents: How a .txt or .md file becomes documents, see ``Source``.

    Raises:
        UserError: With the file and the line (or row, or byte offset), when something cannot be
            read.
    """
    if file_format(path, TEXT_FORMATS) in (".jsonl", ".parquet"):
        records = read_record_file(path, field=field)
        found: Iterator[Document] = (
            Document(text_of(data, field, origin), origin) for data, origin in records
        )
    else:
        found = _read_lines(path, documents)
    with reading(path):
        yield from (document for document in found if document.text and not document.text.isspace())


def _read_lines(path: Path, documents: DocumentUnit) -> Iterator[Document]:
    if documents == "lines":
        for number, line in decoded_lines(path):
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
    for number, line in decoded_lines(path):
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
