"""Samples of supervised fine-tuning: what a source of records becomes, whatever its format."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from lit_llm.data.chat_formats import (
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
from lit_llm.data.format_table import Format, FormatTable, each
from lit_llm.data.messages import MESSAGE_FIELDS, is_sharegpt
from lit_llm.data.openassistant import read_threads
from lit_llm.data.preference_formats import COMPARED_FIELDS
from lit_llm.data.record_formats import Record
from lit_llm.data.records import RecordSource, read_records
from lit_llm.data.sources import PYTHON_DOCS

__all__ = [
    "FORMATS",
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

_PREFERENCES = "recipes/reward.py and recipes/dpo.py train on preferences"


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


_FORMATS: dict[str, Format[Sample]] = {
    "messages": Format(
        (MESSAGE_FIELDS,),
        each(read_messages),
        "messages (role and content), through the chat template",
    ),
    "prompt_completion": Format(
        (("prompt",), ("completion",)),
        each(read_prompt_completion),
        "prompt and completion: texts joined as they are without the chat template, "
        "messages through it; the completion is trained on",
    ),
    "chat_prompt_completion": Format(
        (("prompt",), ("completion",)),
        each(read_chat_prompt_completion),
        "prompt and completion as the turns of a user and an assistant, through the chat template",
    ),
    "alpaca": Format(
        (("instruction",), ("output",)),
        each(read_alpaca),
        "Alpaca (instruction, input, output), through the chat template",
    ),
    "sharegpt": Format(
        (MESSAGE_FIELDS,),
        each(read_sharegpt),
        "ShareGPT conversations (from and value), through the chat template",
    ),
    "openassistant": Format(
        (("message_tree_id",), ("prompt", "message_id")),
        read_threads,
        "OpenAssistant trees, threads through the best-ranked answers, through the chat template",
    ),
    "text": Format(
        (("text",),),
        each(read_text),
        "plain texts, trained on as a whole without the chat template",
    ),
    "tokens": Format(
        (("input_ids",),),
        each(read_tokens),
        "token ids, trained on where the labels or masks say so",
    ),
}


def _choose(names: list[str], data: dict[str, Any]) -> str:
    # Of all that a record has, what says most about how it is to be trained on.
    order = ("tokens", "prompt_completion", "messages", "openassistant", "alpaca", "text")
    name = next(name for name in order if name in names)
    if name == "messages":
        field = next(field for field in MESSAGE_FIELDS if field in data)
        return "sharegpt" if is_sharegpt(data[field]) else "messages"
    return name


def _lack(data: dict[str, Any]) -> str:
    if any(data.keys() >= set(fields) for fields in COMPARED_FIELDS):
        return f"holds a preference; {_PREFERENCES}"
    return "has the fields of no format that is known"


FORMATS = FormatTable(_FORMATS, choose=_choose, lack=_lack, others=_PREFERENCES)


def describe_format(name: str) -> str:
    """What a format holds and what becomes of it, in one line for the log."""
    return FORMATS.describe(name)


def detect_format(record: Record) -> str:
    """Tell the format of a record from its fields.

    Raises:
        UserError: When they belong to no format, with those that are known.
    """
    return FORMATS.detect(record)


def source_format(source: RecordSource) -> str:
    """The format that a source is read with: the one it is given, or that of its first record.

    Raises:
        UserError: When the source cannot be read, or has a format that is not known.
    """
    return "messages" if source.path == PYTHON_DOCS else FORMATS.source_format(source)


def read_samples(source: RecordSource) -> Iterator[Sample]:
    """Read the samples of a source, in an order that is always the same.

    Raises:
        UserError: In one sentence with the file and line, for whatever cannot be read and for a
            record that does not fit the format.
    """
    if source.path == PYTHON_DOCS:
        for data, origin in read_records(source):
            yield Conversation(origin=origin, **data)
    else:
        yield from FORMATS.read(source)
