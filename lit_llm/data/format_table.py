"""Which format the records of a source have, and whether they fit it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, TypeVar

from lit_llm.data.record_formats import Record, field_names
from lit_llm.data.records import RecordSource, read_records
from lit_llm.errors import UserError

Sample = TypeVar("Sample")


@dataclass(frozen=True)
class Format(Generic[Sample]):
    """One format of records.

    Attributes:
        needs: Of each group of fields one must be there.
        read: Makes samples of records that have them; null fields are left out.
        description: What it holds and what becomes of it, in one line.
    """

    needs: tuple[tuple[str, ...], ...]
    read: Callable[[Iterable[Record]], Iterator[Sample]]
    description: str


def each(
    read: Callable[[dict[str, Any], str], list[Sample]],
) -> Callable[[Iterable[Record]], Iterator[Sample]]:
    """A reader of records from a reader of one record: its fields and its origin."""
    return lambda records: chain.from_iterable(read(data, origin) for data, origin in records)


class FormatTable(Generic[Sample]):
    """The formats that one kind of training reads.

    Args:
        formats: The formats by name.
        choose: Of the formats whose fields a record has (and the record) the one to take it for.
        lack: What is wrong with a record that no format fits, as the predicate of a sentence.
        others: What is said of a format that is not in the table, as a clause.
    """

    def __init__(
        self,
        formats: dict[str, Format[Sample]],
        *,
        choose: Callable[[list[str], dict[str, Any]], str],
        lack: Callable[[dict[str, Any]], str],
        others: str,
    ) -> None:
        self._formats = formats
        self._choose = choose
        self._lack = lack
        self._others = others

    def __contains__(self, name: str) -> bool:
        """Whether there is a format of that name."""
        return name in self._formats

    def describe(self, name: str) -> str:
        """What a format holds and what becomes of it, in one line for the log."""
        return self._formats[name].description

    def fitting(self, data: dict[str, Any]) -> str | None:
        """The format that a record is taken for, if there is one."""
        data = _without_nulls(data)
        names = [name for name in self._formats if not self._missing(name, data)]
        return self._choose(names, data) if names else None

    def detect(self, record: Record) -> str:
        """Tell the format of a record from its fields.

        Raises:
            UserError: When they belong to no format, with those that are known.
        """
        name = self.fitting(record.data)
        if name is None:
            raise self._unfit(record, self._lack(_without_nulls(record.data)))
        return name

    def source_format(self, source: RecordSource) -> str:
        """The format that a source is read with: the one given, or that of its first record.

        Raises:
            UserError: When the source cannot be read, or its format is not in the table.
        """
        name = self._given(source)
        return self.detect(next(read_records(source))) if name is None else name

    def read(self, source: RecordSource) -> Iterator[Sample]:
        """Read the samples of a source, in an order that is always the same.

        Raises:
            UserError: For whatever cannot be read and for a record that does not fit the format.
        """
        name, records = self._given(source), read_records(source)
        if name is None:
            first = next(records)
            name = self.detect(first)
            records = chain([first], records)
        yield from self._formats[name].read(self._fitting_records(records, name))

    def _given(self, source: RecordSource) -> str | None:
        source.check()
        if source.format not in ("auto", *self._formats):
            raise UserError(
                f"source {source.path}: the format {source.format} does not fit here: "
                f"{self._others}; use auto, {', '.join(self._formats)}."
            )
        return None if source.format == "auto" else source.format

    def _fitting_records(self, records: Iterable[Record], name: str) -> Iterator[Record]:
        """Records without fields that are null, each with what the format needs."""
        for record in records:
            data = _without_nulls(record.data)
            if missing := self._missing(name, data):
                null = f"field {missing!r} is null"
                lack = null if missing in record.data else f"has no field {missing!r}"
                raise self._unfit(record, f"{lack}, which the format {name} needs")
            if pictures := [field for field in ("image", "images") if data.get(field)]:
                raise UserError(
                    f"{record.origin}: field {pictures[0]!r} says that images belong to the text; "
                    "only text can be trained on. If it holds something else, rename it."
                )
            yield Record(data, record.origin)

    def _missing(self, name: str, data: dict[str, Any]) -> str | None:
        groups = self._formats[name].needs
        lacking = (fields for fields in groups if not any(map(data.__contains__, fields)))
        return next((fields[0] for fields in lacking), None)

    def _unfit(self, record: Record, lack: str) -> UserError:
        known = (
            f"{name} ({', '.join(' or '.join(fields) for fields in entry.needs)})"
            for name, entry in self._formats.items()
        )
        return UserError(
            f"{record.origin}: {lack}; its fields are: {field_names(record.data)}. "
            f"The formats and the fields they need: {', '.join(known)}. "
            "With rename, fields of other names are taken for these."
        )


def _without_nulls(data: dict[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in data.items() if value is not None}
