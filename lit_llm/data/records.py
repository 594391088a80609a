"""Sources of records: what the user names, turned into a stream of records with named fields."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal, get_args

from lit_llm.data.files import list_files
from lit_llm.data.record_formats import RECORD_FORMATS, Record, field_names, read_record_file
from lit_llm.data.sources import (
    PYTHON_DOCS,
    PYTHON_PARAMETERS,
    DataSource,
    content_fingerprint,
    read_hub_source,
    source_kind,
)
from lit_llm.errors import UserError

__all__ = ["Record", "RecordFormat", "RecordSource", "read_records", "record_fingerprint"]

RecordFormat = Literal[
    "auto",
    "messages",
    "prompt_completion",
    "chat_prompt_completion",
    "alpaca",
    "sharegpt",
    "openassistant",
    "text",
    "tokens",
    "preference",
    "chat_preference",
    "hh",
    "preference_sharegpt",
    "alpaca_preference",
    "stack_exchange",
    "ranked",
    "prompt",
    "plain_prompt",
]


@dataclass(frozen=True)
class RecordSource(DataSource):
    """One source of records.

    Args:
        path: ``python-docs`` (questions and answers, or preferences, made from the documentation
            that comes with this Python), ``python-parameters`` (preferences of another kind, made
            from the same functions), a local file, folder or glob (.jsonl, .json, .parquet, .csv,
            each also with .gz or .zst), or the name of a data set on the Hugging Face Hub.
        weight: Share of the training rows drawn from this source, relative to the other weights;
            none means in proportion to their number. With packing a row is full, so the share is
            one of tokens; without it a row is one sample.
        name: Name in logs and reports; none derives one from the path.
        subset: Configuration of a data set on the Hub.
        split: Split of a data set on the Hub.
        revision: Branch, tag or commit of a data set on the Hub; a commit makes runs repeatable,
            and data that was prepared once usable without the network.
        streaming: Read a data set of the Hub while downloading, without a copy on disk.
        format: What a record holds. ``auto`` tells it from the fields of the first record. For
            fine-tuning: ``messages`` (role and content), ``prompt_completion`` (texts that are
            joined as they are, or lists of messages), ``chat_prompt_completion`` (two texts that
            become a user's and an assistant's turn), ``alpaca`` (instruction, input, output),
            ``sharegpt`` (from and value), ``openassistant`` (trees, or messages with their
            parents), ``text`` (plain text, trained on as a whole), ``tokens`` (input_ids with
            labels or masks). For reward models and DPO: ``preference`` (chosen and rejected, maybe
            prompt: texts that are joined as they are, or lists of messages), ``chat_preference``
            (prompt, chosen and rejected as turns of a user and an assistant), ``hh`` (chosen and
            rejected transcripts of Human and Assistant), ``preference_sharegpt`` (conversations
            with chosen and rejected messages), ``alpaca_preference`` (instruction, input, chosen,
            rejected), ``stack_exchange`` (question, response_j, which is better, and response_k),
            ``ranked`` (prompt, or instruction for the chat template, with a list of answers, best
            first or with ranks or scores), ``openassistant`` (the ranked answers of its trees). For
            PPO the prompts of all of these, and ``prompt`` (prompt, question or instruction as the
            turn of a user, or messages; maybe with a reference, answer, completion or output),
            ``plain_prompt`` (prompt or text, which is continued without the chat template).
        rename: Names of fields in the data to the names that the format expects, such as
            ``{question: instruction, answer: output}``. Of preferences a field ``kind``, or else
            ``category``, names groups whose accuracy is told apart: ``{source: kind}`` takes the
            source of a record for it.
        max_records: Read at most that many records.
    """

    format: RecordFormat = "auto"
    rename: dict[str, str] | None = None
    max_records: int | None = None

    content: ClassVar[str] = "records"
    formats: ClassVar[tuple[str, ...]] = RECORD_FORMATS
    limits: ClassVar[tuple[str, ...]] = ("max_records",)
    embedded: ClassVar[tuple[str, ...]] = (PYTHON_DOCS, PYTHON_PARAMETERS)

    def check(self) -> None:
        """Check what can be checked without reading.

        Raises:
            UserError: When a value makes no sense.
        """
        super().check()
        known = get_args(RecordFormat)
        if self.format not in known:
            raise UserError(
                f"source {self.path}: format {self.format!r} is unknown; use {', '.join(known)}."
            )
        wanted = list((self.rename or {}).values())
        if twice := [name for name in wanted if wanted.count(name) > 1]:
            raise UserError(f"source {self.path}: rename names two fields {twice[0]!r}.")
        if self.is_embedded and (self.format != "auto" or self.rename):
            raise UserError(f"source {self.path} has one format: leave out format and rename.")


def read_records(source: RecordSource) -> Iterator[Record]:
    """Read the records of a source, renamed, in an order that is always the same.

    A record of ``python-docs`` holds the fields of a ``Conversation``. What is embedded as
    preferences is no records, see ``preferences.read_preferences``.

    Raises:
        UserError: In one sentence with the file and line, for whatever cannot be read, when a field
            to rename is in no record, and when there is not one record.
    """
    rename = source.rename or {}
    missing, last = set(rename), None
    for last in islice(_read_all(source), source.max_records):
        missing -= last.data.keys()
        yield _renamed(last, rename) if rename else last
    if last is None:
        raise UserError(f"{source.path}: there is no record in it.")
    if missing:
        raise UserError(
            f"{source.path}: rename knows a field {min(missing)!r} that is in no record; "
            f"the fields of the last one are: {field_names(last.data)}."
        )


def _read_all(source: RecordSource) -> Iterator[Record]:
    kind = source_kind(source)
    if kind == PYTHON_PARAMETERS:
        raise UserError(
            f"source {kind} holds preferences, which recipes/reward.py and recipes/dpo.py train on."
        )
    if kind == PYTHON_DOCS:
        from lit_llm.data.python_questions import collect_conversations

        for conversation in collect_conversations():
            data = dataclasses.asdict(conversation)
            yield Record(data, data.pop("origin"))
    elif kind == "hub":
        yield from read_hub_source(source)
    else:
        for _, file in list_files(source.path, source.formats):
            yield from read_record_file(file)


def _renamed(record: Record, rename: dict[str, str]) -> Record:
    names = [rename.get(name, name) for name in record.data]
    if clash := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"{record.origin}: rename would give two fields the name {clash[0]!r}; "
            "rename the other one too."
        )
    return Record(dict(zip(names, record.data.values(), strict=True)), record.origin)


def record_fingerprint(
    source: RecordSource, embedded: Iterable[dict[str, Any]] | None = None
) -> str:
    """SHA-256 of what determines the records of a source and how they are understood.

    The same wherever the files lie, see ``source_fingerprint``.

    Args:
        source: The source.
        embedded: What is made of a source that is embedded, in JSON values; none means its records.

    Raises:
        UserError: When there is no such file, or a file cannot be read.
    """
    settings: dict[str, Any] = {
        "format": source.format,
        "rename": source.rename,
        "max_records": source.max_records,
    }
    if source.is_embedded:
        digest = hashlib.sha256()
        if embedded is None:
            embedded = (data for data, _ in _read_all(source))
        for data in embedded:
            digest.update(json.dumps(data, sort_keys=True).encode() + b"\n")
        settings["sha256"] = digest.hexdigest()
    return content_fingerprint(source, settings)
