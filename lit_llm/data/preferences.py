"""Preferences: what a source of comparisons becomes, whatever its format."""

import dataclasses
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

from lit_llm.data.conversations import FORMATS as SAMPLE_FORMATS
from lit_llm.data.format_table import Format, FormatTable, each
from lit_llm.data.messages import MESSAGE_FIELDS
from lit_llm.data.openassistant import read_comparisons
from lit_llm.data.preference_formats import (
    ANSWER_FIELDS,
    Preference,
    read_alpaca_preference,
    read_chat_preference,
    read_preference,
    read_preference_sharegpt,
    read_ranked,
    read_stack_exchange,
)
from lit_llm.data.preference_texts import check_question
from lit_llm.data.record_formats import Record
from lit_llm.data.records import RecordSource, record_fingerprint
from lit_llm.data.sources import PYTHON_DOCS
from lit_llm.data.transcripts import is_transcript, read_hh

__all__ = [
    "Preference",
    "describe_preference_format",
    "detect_preference_format",
    "preference_fingerprint",
    "preference_format",
    "read_preferences",
]


def _read_texts_or_messages(records: Iterable[Record]) -> Iterator[Preference]:
    """Records of the format ``preference``; the first one tells whether their prompt is read."""
    records = iter(records)
    for first in islice(records, 1):
        check_question(first.data, first.origin)
        yield from each(read_preference)(chain([first], records))


_COMPARED = (("chosen",), ("rejected",))
_FORMATS: dict[str, Format[Preference]] = {
    "preference": Format(
        _COMPARED,
        _read_texts_or_messages,
        "chosen and rejected, with a prompt or a shared beginning: texts joined as they are "
        "without the chat template, messages through it",
    ),
    "chat_preference": Format(
        (("prompt",), *_COMPARED),
        each(read_chat_preference),
        "prompt, chosen and rejected as the turns of a user and an assistant, through the chat "
        "template",
    ),
    "hh": Format(
        _COMPARED,
        each(read_hh),
        "chosen and rejected transcripts of a human and an assistant, through the chat template",
    ),
    "preference_sharegpt": Format(
        (MESSAGE_FIELDS, *_COMPARED),
        each(read_preference_sharegpt),
        "a conversation and its next message, chosen and rejected, through the chat template",
    ),
    "alpaca_preference": Format(
        (("instruction",), *_COMPARED),
        each(read_alpaca_preference),
        "Alpaca (instruction, input) with chosen and rejected, through the chat template",
    ),
    "stack_exchange": Format(
        (("question",), ("response_j",), ("response_k",)),
        each(read_stack_exchange),
        "a question, a better and a worse response, through the chat template",
    ),
    "ranked": Format(
        (("prompt", "instruction"), ANSWER_FIELDS),
        each(read_ranked),
        "a prompt and several answers, best first or with ranks or scores: texts joined as they "
        "are without the chat template, messages and instructions through it",
    ),
    "openassistant": Format(
        (("message_tree_id",), ("prompt", "message_id")),
        read_comparisons,
        "OpenAssistant trees, the ranked answers to each message, through the chat template",
    ),
}


def _choose(names: list[str], data: dict[str, Any]) -> str:
    order = ("openassistant", "stack_exchange", "preference", "ranked")
    name = next(name for name in order if name in names)
    if name != "preference":
        return name
    if is_transcript(data.get("prompt")) or is_transcript(data["chosen"]):
        return "hh"
    # Beside answers that are whole conversations other fields often repeat a part of them.
    if "prompt" in data or _is_conversation(data["chosen"]):
        return name
    asked = (other for other in ("preference_sharegpt", "alpaca_preference") if other in names)
    return next(asked, name)


def _is_conversation(messages: Any) -> bool:
    """Whether these are messages of which the assistant's is not the first."""
    first = messages[0] if isinstance(messages, list) and messages else None
    asking = ("system", "developer", "user", "human")
    return isinstance(first, dict) and first.get("role", first.get("from")) in asking


_SINGLE = ("completion", "response", "answer", "output", *MESSAGE_FIELDS)


def _lack(data: dict[str, Any]) -> str:
    sample = SAMPLE_FORMATS.fitting(data)
    like = f"; it is of the format {sample}, which recipes/sft.py trains on" if sample else ""
    labelled = "label" in data and any(field in data for field in _SINGLE)
    cure = (
        "; single answers with a label are not read: pair a good and a bad answer to a prompt as "
        "chosen and rejected"
    )
    return f"holds no comparison of answers{like}{cure if labelled else ''}"


FORMATS = FormatTable(
    _FORMATS, choose=_choose, lack=_lack, others="recipes/sft.py trains on other samples"
)


def describe_preference_format(name: str) -> str:
    """What a format holds and what becomes of it, in one line for the log."""
    return FORMATS.describe(name)


def detect_preference_format(record: Record) -> str:
    """Tell the format of a record from its fields.

    Raises:
        UserError: When they hold no comparison, with the formats that are known.
    """
    return FORMATS.detect(record)


def preference_format(source: RecordSource) -> str:
    """The format that a source is read with: the one it is given, or that of its first record.

    Raises:
        UserError: When the source cannot be read, or holds no preferences.
    """
    return "preference" if source.is_embedded else FORMATS.source_format(source)


def read_preferences(source: RecordSource) -> Iterator[Preference]:
    """Read the preferences of a source, in an order that is always the same.

    Some have no pairs (``Preference.pairs``): nothing in them can be trained on.

    Raises:
        UserError: In one sentence with the file and line, for whatever cannot be read and for a
            record that does not fit the format.
    """
    if source.is_embedded:
        yield from _embedded(source)
    else:
        yield from FORMATS.read(source)


def preference_fingerprint(source: RecordSource) -> str:
    """SHA-256 of what determines the preferences of a source, see ``record_fingerprint``.

    Raises:
        UserError: When there is no such file, or a file cannot be read.
    """
    if source.is_embedded:
        return record_fingerprint(source, map(dataclasses.asdict, _embedded(source)))
    return record_fingerprint(source)


def _embedded(source: RecordSource) -> Iterator[Preference]:
    from lit_llm.data import python_preferences

    source.check()
    if source.path == PYTHON_DOCS:
        found = python_preferences.collect_preferences()
    else:
        found = python_preferences.collect_parameter_preferences()
    yield from islice(found, source.max_records)
