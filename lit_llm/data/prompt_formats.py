"""Prompts: what a source becomes when only its questions are wanted, whatever its format.

Prompts come alone, or as what is asked in the data of fine-tuning and of preferences. The group of
a prompt is the one it has there, so all stages hold out the same ones.
"""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lit_llm.data.conversations import FORMATS as SAMPLE_FORMATS
from lit_llm.data.conversations import (
    Completion,
    Conversation,
    Sample,
    describe_format,
    read_samples,
)
from lit_llm.data.format_table import Format, FormatTable, each
from lit_llm.data.messages import (
    alpaca_question,
    asked,
    messages_of,
    root_group,
    template_values,
    with_system,
)
from lit_llm.data.preference_formats import Preference
from lit_llm.data.preference_tokens import best_answer, message_text
from lit_llm.data.preferences import FORMATS as PREFERENCE_FORMATS
from lit_llm.data.preferences import (
    describe_preference_format,
    preference_fingerprint,
    read_preferences,
)
from lit_llm.data.record_formats import Record, text_of
from lit_llm.data.records import RecordSource, read_records, record_fingerprint
from lit_llm.data.sources import PYTHON_DOCS
from lit_llm.errors import UserError

_QUESTION_FIELDS = ("prompt", "question", "instruction")
_REFERENCE_FIELDS = ("reference", "answer", "completion", "output")
_TEXT_FIELDS = ("prompt", "text")
_WORD = re.compile(r"\S+")
# What the description of a format says of training: here nothing of the data is trained on.
_TRAINED = re.compile(r"[,;][^,;]*trained on.*")


@dataclass(frozen=True)
class PromptRecord:
    """A prompt as it is read.

    Attributes:
        prompt: Messages for the chat template, plain text, or tokens; empty where nothing is asked.
        reference: The answer of the data, if it has one.
        origin: Where it stands, for people: ``"file:line"``.
        group: Prompts of one group never cross splits.
        tools: Descriptions of the tools, for the template.
        template_options: More values for the template.
        answer_format: Regular expression that a well-formed answer matches as a whole.
        continued: Plain text that is there to be continued, not a question without a template.
    """

    prompt: list[dict[str, Any]] | str | tuple[int, ...]
    reference: str | None
    origin: str
    group: str
    tools: list[Any] | None = None
    template_options: dict[str, Any] | None = None
    answer_format: str | None = None
    continued: bool = False


# ----- prompts that come alone ------------------------------------------------------------------


def read_prompt(data: dict[str, Any], origin: str) -> list[PromptRecord]:
    """A question as the turn of a user, or messages up to the answer; maybe with a reference."""
    field = next(field for field in _QUESTION_FIELDS if field in data)
    if not isinstance(data[field], str):
        found = messages_of({field: _listed(data[field])}, field, origin)
        messages, answer = split_answer(with_system(found, data, origin))
    elif field == "instruction":
        messages, answer = alpaca_question(data, origin), None
    else:
        messages, answer = asked(data, origin, text_of(data, field, origin)), None
    tools, options = template_values(data, origin)
    reference = _reference(data, origin) or answer
    group = root_group(messages) if messages else ""
    return [PromptRecord(messages, reference, origin, group, tools, options)]


def read_plain_prompt(data: dict[str, Any], origin: str) -> list[PromptRecord]:
    """A text that is continued as it is, without the chat template."""
    field = next(field for field in _TEXT_FIELDS if field in data)
    text = text_of(data, field, origin)
    return [PromptRecord(text, _reference(data, origin), origin, group=text, continued=True)]


def _reference(data: dict[str, Any], origin: str) -> str | None:
    """The answer of a record: a text, a number or messages."""
    field = next((field for field in _REFERENCE_FIELDS if field in data), None)
    if field is None:
        return None
    value = data[field]
    if isinstance(value, list | dict):
        return message_text(messages_of({field: _listed(value)}, field, origin)) or None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return text_of(data, field, origin) or None


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


def _lack(data: dict[str, Any]) -> str:
    return "holds no prompt, and is no sample of fine-tuning or preferences to take one from"


FORMATS = FormatTable(
    {
        "prompt": Format(
            (_QUESTION_FIELDS,),
            each(read_prompt),
            "prompts as the turns of a user, or messages, through the chat template",
        ),
        "plain_prompt": Format(
            (_TEXT_FIELDS,),
            each(read_plain_prompt),
            "texts, or their first words, continued without the chat template",
        ),
    },
    choose=lambda names, data: names[0],
    lack=_lack,
    others="formats of fine-tuning and of preferences fit too",
)


# ----- prompts of other data --------------------------------------------------------------------


def split_answer(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
    """A conversation up to its last answer, and that answer, where it ends with one."""
    border = len(messages)
    while border and messages[border - 1]["role"] == "assistant":
        border -= 1
    return messages[:border], message_text(messages[border:]) or None


def _of_sample(sample: Sample) -> PromptRecord:
    """What is asked in a sample of fine-tuning."""
    if isinstance(sample, Conversation):
        messages, answer = split_answer(sample.messages)
        return PromptRecord(
            messages,
            answer,
            sample.origin,
            sample.group,
            sample.tools,
            sample.template_options,
            sample.answer_format,
        )
    if isinstance(sample, Completion):
        return PromptRecord(
            sample.prompt, sample.completion.strip() or None, sample.origin, sample.group
        )
    border = len(sample.trained)  # of tokens those before the last ones that are trained on
    while border and not sample.trained[border - 1]:
        border -= 1
    while border and sample.trained[border - 1]:
        border -= 1
    return PromptRecord(tuple(sample.input_ids[:border]), None, sample.origin, sample.group)


def _of_preference(preference: Preference) -> PromptRecord:
    """What is asked in a comparison of answers."""
    best = best_answer(preference.answers, preference.pairs) if preference.pairs else ""
    return PromptRecord(
        preference.prompt,
        best.strip() or None,
        preference.origin,
        preference.group,
        preference.tools,
        preference.template_options,
    )


# ----- sources ----------------------------------------------------------------------------------


def describe_prompt_format(name: str) -> str:
    """What a format holds and what becomes of it, in one line for the log."""
    if name in FORMATS:
        return FORMATS.describe(name)
    described = (
        describe_format(name) if name in SAMPLE_FORMATS else describe_preference_format(name)
    )
    return f"the prompts of the format {name}: {_TRAINED.sub('', described)}"


def detect_prompt_format(record: Record) -> str:
    """Tell the format of a record from its fields.

    Raises:
        UserError: When they hold no prompt, with the formats that do.
    """
    name = PREFERENCE_FORMATS.fitting(record.data) or SAMPLE_FORMATS.fitting(record.data)
    # A question says more of what is to be answered than a text beside it.
    return FORMATS.detect(record) if name in (None, "text") else name


def prompt_format(source: RecordSource, first_words: int = 0) -> str:
    """The format that a source is read with: the one it is given, or that of its first record.

    Args:
        source: The source.
        first_words: So many first words of a text are the prompt; 0 takes none from texts.

    Raises:
        UserError: When the source cannot be read, or holds no prompts.
    """
    source.check()
    if source.is_embedded:
        return "messages" if source.path == PYTHON_DOCS else "preference"
    name: str = source.format
    if name == "auto":
        name = detect_prompt_format(next(read_records(source)))
    if name == "text" or (name == "plain_prompt" and source.format == "auto"):
        if not first_words:
            raise UserError(
                f"source {source.path}: holds texts, which ask for nothing; say how many of their "
                "first words are to be continued (--data.first_words 8), or give the source format "
                "plain_prompt to continue them whole."
            )
        name = "plain_prompt"
    return name


def read_prompts(source: RecordSource, first_words: int = 0) -> Iterator[PromptRecord]:
    """Read the prompts of a source, in an order that is always the same.

    Some ask for nothing: their prompt is empty.

    Args:
        source: The source.
        first_words: So many first words of a text are the prompt, the rest is the reference where
            the data has no other; 0 takes texts of the format ``plain_prompt`` whole.

    Raises:
        UserError: In one sentence with the file and line, for whatever cannot be read and for a
            record that does not fit the format.
    """
    name = prompt_format(source, first_words)
    if not source.is_embedded:
        source = dataclasses.replace(source, format=name)  # type: ignore[arg-type]
    if name in FORMATS:
        for record in FORMATS.read(source):
            cut = first_words and isinstance(record.prompt, str)
            yield _first_words(record, first_words) if cut else record
    elif name in SAMPLE_FORMATS:
        yield from map(_of_sample, read_samples(source))
    else:
        yield from map(_of_preference, read_preferences(source))


def prompt_fingerprint(source: RecordSource) -> str:
    """SHA-256 of what determines the prompts of a source, see ``record_fingerprint``.

    Raises:
        UserError: When there is no such file, or a file cannot be read.
    """
    if source.path == PYTHON_DOCS:
        return record_fingerprint(source)
    return preference_fingerprint(source)


def _first_words(record: PromptRecord, count: int) -> PromptRecord:
    text = str(record.prompt)
    ends = [word.end() for word in islice(_WORD.finditer(text), count)]
    border = ends[-1] if ends else 0
    return dataclasses.replace(
        record, prompt=text[:border], reference=record.reference or text[border:].strip() or None
    )
