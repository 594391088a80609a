"""Records from one local file: .jsonl, .json, .parquet and .csv, plain or with .gz or .zst."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lit_llm.data.files import COMPRESSIONS, decoded_lines, file_format, open_bytes, reading
from lit_llm.errors import UserError

RECORD_FORMATS = (".jsonl", ".json", ".parquet", ".csv")


class Record(NamedTuple):
    """One record and the place it was read from.

    Attributes:
        data: Its fields by name.
        origin: Where it stands, for people: ``"file:line"`` (.jsonl, .csv), ``"file:record"``
            (.json, .parquet, counted from 1) or ``"dataset:row"``.
    """

    data: dict[str, Any]
    origin: str


def read_record_file(path: Path, *, field: str | None = None) -> Iterator[Record]:
    """Read one file as records, in its order.

    Args:
        path: A file with one of the ``RECORD_FORMATS``.
        field: The one field that is asked for: other columns of a .parquet file are not read.

    Raises:
        UserError: With the file and the line (or record, or byte offset), when something cannot be
            read, and when a .parquet file has no such column.
    """
    with reading(path):
        match file_format(path, RECORD_FORMATS):
            case ".parquet":
                yield from _read_parquet(path, field)
            case ".csv":
                yield from _read_csv(path)
            case ".json":
                yield from _read_json(path)
            case _:
                yield from _read_jsonl(path, field)


def text_of(data: dict[str, Any], field: str, origin: str) -> str:
    """Text of a record.

    Raises:
        UserError: When the field is missing (naming those that exist), no string, or no Unicode
            text.
    """
    if field not in data:
        raise UserError(f"{origin}: has no field {field!r}; its fields are: {field_names(data)}.")
    text = data[field]
    if not isinstance(text, str):
        raise UserError(f"{origin}: field {field!r} is {json_type(text)}, not a string.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{origin}: field {field!r} holds half of a surrogate pair at character {error.start}, "
            "which is not Unicode text."
        ) from error
    return text


def field_names(data: dict[str, Any]) -> str:
    """The fields of a record, for a message."""
    return ", ".join(map(repr, data)) or "none"


def json_type(value: object) -> str:
    """What a value is in the language of JSON, with its article."""
    names = {
        str: "a string",
        dict: "an object",
        list: "a list",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), f"of type {type(value).__name__}")


def without_nulls(value: Any) -> Any:
    """A value without the null fields of the objects inside it.

    Arrow (.parquet, the Hub) gives all objects of a column the same fields and fills the ones that
    an object does not have with null; they are taken out again.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _read_jsonl(path: Path, field: str | None) -> Iterator[Record]:
    for number, line in decoded_lines(path):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        try:
            data = json.loads(line.rstrip("\n"))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{origin}: is not JSON ({error}); .jsonl wants one object a line."
            ) from error
        yield Record(_object(data, field or "field", origin), origin)


def _object(data: object, field: str, origin: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise UserError(f"{origin}: is JSON but not an object like {{{json.dumps(field)}: ...}}.")
    return data


def _read_json(path: Path) -> Iterator[Record]:
    text = "".join(line for _, line in decoded_lines(path))
    if not text.strip():
        return
    wanted = ".json wants a list of objects or one object; with an object a line it is a .jsonl"
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: is not JSON ({error.msg}); {wanted}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); {wanted}.") from error
    items = content if isinstance(content, list) else [content]
    for number, data in enumerate(items, start=1):
        origin = f"{path}:{number}"
        yield Record(_object(data, "field", origin), origin)


def _read_csv(path: Path) -> Iterator[Record]:
    # One limit for the whole process, 128 kB unless set: less than many a text.
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader((line for _, line in decoded_lines(path)), strict=True)
    names: list[str] = []
    line = 0
    try:
        for row in rows:
            origin, line = f"{path}:{line + 1}", rows.line_num
            if not row:
                continue
            if not names:
                names = row
                if len(set(names)) < len(names) or "" in names:
                    raise UserError(
                        f"{origin}: the first line of a .csv file names its columns, "
                        f"each by another name, but is: {', '.join(map(repr, names))}."
                    )
                continue
            if len(row) != len(names):
                raise UserError(
                    f"{origin}: has {len(row)} values for the {len(names)} columns "
                    f"of the first line: {', '.join(map(repr, names))}."
                )
            yield Record(dict(zip(names, row, strict=True)), origin)
    except csv.Error as error:
        raise UserError(f"{path}:{line + 1}: is not readable as .csv ({error}).") from error


def _read_parquet(path: Path, field: str | None) -> Iterator[Record]:
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
            if field is not None and field not in names:
                text_of(dict.fromkeys(names), field, str(path))
            columns = None if field is None else [field]
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for data in batch.to_pylist():
                    row += 1
                    filled = {name: without_nulls(value) for name, value in data.items()}
                    yield Record(filled, f"{path}:{row}")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: is not a readable parquet file ({reason}).") from error
