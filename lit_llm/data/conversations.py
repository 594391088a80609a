"""Samples of supervised fine-tuning: what a source of records becomes, whatever its format."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from lit_llm.data.chat_formats import (
    MESSAGE_FIELDS,
    Completion,
    Conversation,
    Sample,
    Tokens,
    read_alpaca,
    read_chat_prompt_completion,
    read_messages,
    read_prompt_completion,
    read_sharegpt,
    read_text,
    read_tokens,
)
from lit_llm.data.openassistant import read_threads
from lit_llm.data.record_formats import Record, field_names
from lit_llm.data.records import RecordSource, read_records
from lit_llm.data.sources import PYTHON_DOCS
from lit_llm.errors import UserError

__all__ = [
    "Completion",
    "Conversation",
    "Question",
    "Sample",
    "Tokens",
    "describe_format",
    "detect_format",
    "read_samples",
    "source_format",
]


class Question(NamedTuple):
    """A question of the held-out data, as it is put to a model.

    Attributes:
        prompt_ids: The conversation up to the answer, with the generation prompt.
        prompt: The last message of the user, for people.
        reference: The answer in the data.
        answer_format: Regular expression that a well-formed answer matches as a whole.
    """

    prompt_ids: list[int]
    prompt: str
    reference: str
    answer_format: str | None


class _Format(NamedTuple):
    needs: tuple[tuple[str, ...], ...]  # of each group of fields one must be there
    read: Callable[[Iterable[Record]], Iterator[Sample]]
    description: str


def _each(
    read: Callable[[dict[str, Any], str], list[Sample]],
) -> Callable[[Iterable[Record]], Iterator[Sample]]:
    return lambda records: chain.from_iterable(read(data, origin) for data, origin in records)


_FORMATS = {
    "messages": _Format(
        (MESSAGE_FIELDS,),
        _each(read_messages),
        "messages (role and content), through the chat template",
    ),
    "prompt_completion": _Format(
        (("prompt",), ("completion",)),
        _each(read_prompt_completion),
        "prompt and completion: texts joined as they are without the chat template, "
        "messages through it; the completion is trained on",
    ),
    "chat_prompt_completion": _Format(
        (("prompt",), ("completion",)),
        _each(read_chat_prompt_completion),
        "prompt and completion as the turns of a user and an assistant, through the chat template",
    ),
    "alpaca": _Format(
        (("instruction",), ("output",)),
        _each(read_alpaca),
        "Alpaca (instruction, input, output), through the chat template",
    ),
    "sharegpt": _Format(
        (MESSAGE_FIELDS,),
        _each(read_sharegpt),
        "ShareGPT conversations (from and value), through the chat template",
    ),
    "openassistant": _Format(
        (("message_tree_id",), ("prompt", "message_id")),
        read_threads,
        "OpenAssistant trees, threads through the best-ranked answers, through the chat template",
    ),
    "text": _Format(
        (("text",),),
        _each(read_text),
        "plain texts, trained on as a whole without the chat template",
    ),
    "tokens": _Format(
        (("input_ids",),),
        _each(read_tokens),
        "token ids, trained on where the labels or masks say so",
    ),
}


def describe_format(name: str) -> str:
    """What a format holds and what becomes of it, in one line for the log."""
    return _FORMATS[name].description


def detect_format(record: Record) -> str:
    """Tell the format of a record from its fields.

    Raises:
        UserError: When they belong to no format, with those that are known.
    """
    data = _without_nulls(record)
    order = ["tokens", "prompt_completion", "messages", "openassistant", "alpaca", "text"]
    fitting = [name for name in order if not _missing(name, data)]
    if not fitting:
        raise _unfit(record, "has the fields of no format that is known")
    if fitting[0] == "messages":
        field = next(field for field in MESSAGE_FIELDS if field in data)
        messages = data[field]
        if isinstance(messages, list) and messages and isinstance(messages[0], dict):
            speaks = "from" in messages[0] and "role" not in messages[0]
            return "sharegpt" if speaks else "messages"
    return fitting[0]


def source_format(source: RecordSource) -> str:
    """The format that a source is read with: the one it is given, or that of its first record.

    Raises:
        UserError: When the source cannot be read, or has a format that is not known.
    """
    if source.path == PYTHON_DOCS:
        return "messages"
    return detect_format(next(read_records(source))) if source.format == "auto" else source.format


def read_samples(source: RecordSource) -> Iterator[Sample]:
    """Read the samples of a source, in an order that is always the same.

    Raises:
        UserError: In one sentence with the file and line, for whatever cannot be read and for a
            record that does not fit the format.
    """
    records = read_records(source)
    if source.path == PYTHON_DOCS:
        yield from (Conversation(origin=origin, **data) for data, origin in records)
        return
    first = next(records)
    name = detect_format(first) if source.format == "auto" else source.format
    yield from _FORMATS[name].read(_fitting(chain([first], records), name))


def _fitting(records: Iterable[Record], name: str) -> Iterator[Record]:
    """Records without fields that are null, each with what the format needs."""
    for record in records:
        data = _without_nulls(record)
        if missing := _missing(name, data):
            null = f"field {missing!r} is null"
            lack = null if missing in record.data else f"has no field {missing!r}"
            raise _unfit(record, f"{lack}, which the format {name} needs")
        if pictures := [field for field in ("image", "images") if data.get(field)]:
            raise UserError(
                f"{record.origin}: field {pictures[0]!r} says that images belong to the text; "
                "only text can be trained on. If it holds something else, rename it."
            )
        yield Record(data, record.origin)


def _without_nulls(record: Record) -> dict[str, Any]:
    return {field: value for field, value in record.data.items() if value is not None}


def _missing(name: str, data: dict[str, Any]) -> str | None:
    lacking = (fields for fields in _FORMATS[name].needs if not any(map(data.__contains__, fields)))
    return next((fields[0] for fields in lacking), None)


def _unfit(record: Record, lack: str) -> UserError:
    known = (
        f"{name} ({', '.join(' or '.join(fields) for fields in entry.needs)})"
        for name, entry in _FORMATS.items()
    )
    return UserError(
        f"{record.origin}: {lack}; its fields are: {field_names(record.data)}. "
        f"The formats and the fields they need: {', '.join(known)}. "
        "With rename, fields of other names are taken for these."
    )
