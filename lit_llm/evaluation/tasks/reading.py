"""Reads a task's files as rows and hands them to the harness, without the network."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llm.data.files import COMPRESSIONS, decoded_lines, reading
from lit_llm.data.record_formats import Record, field_names, json_type, read_record_file
from lit_llm.errors import UserError

if TYPE_CHECKING:
    from datasets import DatasetDict

Row = dict[str, Any]
Fields = Mapping[str, type | tuple[type, ...]]


def find_files(data_dir: str | Path | None, name: str) -> list[Path]:
    """Files of a name or pattern inside a folder, compressed or not, by name.

    Args:
        data_dir: The folder; ``None`` holds nothing.
        name: Such as ``gsm8k/test.jsonl`` or ``bbh/*.jsonl``; ``.gz`` or ``.zst`` may be added to
            the file's name, or be missing from it.
    """
    if data_dir is None:
        return []
    plain = name
    for ending in COMPRESSIONS:
        plain = plain.removesuffix(ending)
    folder = Path(data_dir).expanduser()
    for ending in ("", *COMPRESSIONS):
        if found := sorted(path for path in folder.glob(plain + ending) if path.is_file()):
            return found
    return []


def read_rows(data_dir: str, name: str, fields: Fields) -> list[Record]:
    """Records of a task's files, in the order of the files, each with the fields it needs.

    Args:
        data_dir: Folder with the tasks' files.
        name: File name or pattern in it.
        fields: Fields that are read, and their types.

    Raises:
        UserError: A file is missing, empty or damaged, or a record has not the fields.
    """
    paths = find_files(data_dir, name)
    if not paths:
        raise UserError(f"{data_dir}: has no file {name}; --data_dir names the tasks' folder")
    records = []
    for path in paths:
        table = not {".csv", ".tsv"}.isdisjoint(path.suffixes)
        own = list(_read_table(path) if table else read_record_file(path))
        if not own:
            raise UserError(f"{path}: is empty; a task needs at least one record")
        for record in own:
            _check(record, fields)
        records += own
    return records


def _check(record: Record, fields: Fields) -> None:
    for field, kind in fields.items():
        if field not in record.data:
            known = field_names(record.data)
            raise UserError(f"{record.origin}: has no field {field!r}; its fields are: {known}")
        value = record.data[field]
        if not isinstance(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            wanted = " or ".join(json_type(own()) for own in kinds)
            raise UserError(f"{record.origin}: field {field!r} is {json_type(value)}, not {wanted}")
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{record.origin}: field {field!r} holds half of a surrogate pair, which is not "
                "Unicode text"
            ) from error


def _read_table(path: Path) -> Iterable[Record]:
    """A .csv or .tsv file as published: a column may lack a name, which is refused elsewhere."""
    tabs = ".tsv" in path.suffixes
    with reading(path):
        rows = csv.DictReader(
            (line for _, line in decoded_lines(path)),
            delimiter="\t" if tabs else ",",
            quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        )
        for row in rows:
            yield Record(dict(row), f"{path}:{rows.line_num}")


def as_dataset(**splits: list[Row]) -> DatasetDict:
    """Rows in memory as the harness reads them; one split an argument, none empty."""
    from datasets import Dataset, DatasetDict

    return DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()})
