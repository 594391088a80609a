"""Conversations tokenised once: split, cut to length, counted, kept in memory-mapped files."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lit_llm.data.chat_cache import (
    ChatCache,
    ChatCacheBuilder,
    ChatCounts,
    ChatSettings,
    Row,
    counts_line,
)
from lit_llm.data.chat_template import (
    TokenizedChat,
    tokenize_chat,
    tokenize_completion,
)
from lit_llm.data.conversations import (
    Completion,
    Conversation,
    Sample,
    Tokens,
    read_samples,
    source_format,
)
from lit_llm.data.packing import IGNORED
from lit_llm.data.records import RecordSource
from lit_llm.data.splits import Split
from lit_llm.data.truncation import TrainOn, fit, split_text, train_labels
from lit_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2


@dataclasses.dataclass(frozen=True)
class InstructionSettings(ChatSettings):
    """What, beside the tokenizer and its chat template, decides the content of a cache.

    Attributes:
        train_on: Which tokens are targets.
    """

    train_on: TrainOn = "assistant"


@dataclasses.dataclass
class Counts(ChatCounts):
    """What became of the conversations of one source.

    Attributes:
        unanswered: Left out: nothing in them is to be trained on.
        turns_cut: Their last turns were cut.
    """

    units: ClassVar[tuple[str, ...]] = ("samples", "tokens", "trained")

    unanswered: int = 0
    turns_cut: int = 0

    def __str__(self) -> str:
        """One line: what was left out or cut, and why."""
        left_out = {
            "repeated": self.duplicates,
            "with the beginning of a held-out one": self.held_out,
            "without anything to train on": self.unanswered,
            "with an answer longer than seq_len": self.too_long,
        }
        changed = {
            "lost their last turns": self.turns_cut,
            "lost the beginning of their prompt": self.prompt_cut,
            "hold the text of a special token": self.control_text,
            "do not end with a stop token": self.unended,
        }
        return counts_line(f"{self.read:,} samples read", left_out, changed)

    def split_line(self, split: str) -> str:
        """What a split holds, in words."""
        own = self.splits[split]
        return (
            f"{own['samples']:,} samples, {own['tokens']:,} tokens, "
            f"{own['trained']:,} of them trained on"
        )

    def why_empty(self, seq_len: int) -> str:
        """One sentence on why nothing is left for training, and what to do."""
        if self.too_long and self.too_long >= self.read - self.duplicates - self.unanswered:
            return (
                f"all {self.too_long} samples are too long: their answers alone fill more than "
                f"seq_len {seq_len}; raise data.seq_len."
            )
        if self.unanswered:
            return (
                f"not one of {self.read} samples holds anything to train on; the chat template "
                "marks no turn of an assistant, or no message has the role 'assistant'. Give a "
                "template with {% generation %} markers (data.chat_template), or set "
                "data.train_on to all."
            )
        return (
            f"nothing of {self.read} samples is left for training ({self}); give more data or "
            "smaller held-out fractions."
        )


def open_instructions(
    cache_dir: str | Path,
    settings: InstructionSettings,
    tokenizer: "PreTrainedTokenizerBase",
    stop_token_ids: Sequence[int],
) -> ChatCache[Counts]:
    """Open the cache of tokenised conversations; build it first where it is not there.

    Args:
        cache_dir: Folder of all caches, made as needed.
        settings: Sources and how they are prepared.
        tokenizer: Fast tokenizer with a chat template.
        stop_token_ids: Tokens that end an answer.

    Raises:
        UserError: When a source cannot be read or does not fit the chat template, or ``cache_dir``
            cannot be written.
    """
    return _InstructionBuilder(settings, tokenizer, stop_token_ids).open(cache_dir)


class _InstructionBuilder(ChatCacheBuilder[Sample, Counts]):
    counts_type = Counts
    format = FORMAT
    settings: InstructionSettings

    def identity(self) -> dict[str, Any]:
        return {"train_on": self.settings.train_on}

    def source_format(self, source: RecordSource) -> str:
        return source_format(source)

    def read(self, source: RecordSource) -> Iterator[Sample]:
        return read_samples(source)

    def content(self, sample: Sample) -> str:
        return _content(sample)

    def texts(self, sample: Sample) -> list[str]:
        return _texts(sample)

    def rows(self, sample: Sample, split: Split, counts: Counts) -> Iterator[Row]:
        about = _question(sample) if split != "train" else None
        for ids, trained in _tokenized(sample, self.settings, self.tokenizer, counts):
            last = max(index for index, flag in enumerate(trained) if flag)
            # Tokens and the pieces of a text end as they were given.
            counts.unended += isinstance(sample, Conversation) and ids[last] not in self.stops
            yield Row(ids, trained, about, {"trained": sum(trained)})


def _tokenized(
    sample: Sample,
    settings: InstructionSettings,
    tokenizer: "PreTrainedTokenizerBase",
    counts: Counts,
) -> Iterator[tuple[list[int], list[bool]]]:
    """The token ids of a sample and which are trained; several pieces of a long plain text."""
    if isinstance(sample, Tokens):
        turns = _runs(sample.trained)
        chat = TokenizedChat(sample.input_ids, turns, [True] * len(turns))
    else:
        try:
            if isinstance(sample, Completion):
                chat = tokenize_completion(tokenizer, sample.prompt, sample.completion)
            else:
                chat = tokenize_chat(
                    tokenizer, sample.messages, sample.tools, sample.template_options
                )
        except UserError as error:
            raise UserError(f"{sample.origin}: {error}") from error
    if isinstance(sample, Completion) and not sample.prompt:
        for ids in split_text(chat.input_ids, settings.seq_len):
            if len(ids) > 1:  # the first token is no target
                yield ids, [True] * len(ids)
        return
    fitted, outcome = fit(
        chat,
        settings.seq_len,
        bos_token_id=tokenizer.bos_token_id,
        last_only=settings.train_on == "last",
    )
    counts.turns_cut += outcome == "turns_cut"
    counts.prompt_cut += outcome == "prompt_cut"
    if fitted is None:
        counts.too_long += 1
        return
    trained = [label != IGNORED for label in train_labels(fitted, settings.train_on)]
    # The first token is no target: nothing stands before it.
    if not any(trained[1:]):
        counts.unanswered += 1
        return
    yield fitted.input_ids, trained


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    """Ranges [start, stop) of consecutive true flags."""
    borders = [
        index
        for index, (before, now) in enumerate(zip([False, *flags], [*flags, False], strict=True))
        if before != now
    ]
    return list(zip(borders[::2], borders[1::2], strict=True))


def _content(sample: Sample) -> str:
    """What makes two samples the same."""
    if isinstance(sample, Conversation):
        content = [sample.messages, sample.tools, sample.template_options]
        return json.dumps(content, ensure_ascii=False, sort_keys=True)
    if isinstance(sample, Completion):
        return json.dumps([sample.prompt, sample.completion], ensure_ascii=False)
    return json.dumps(sample.input_ids)


def _texts(sample: Sample) -> list[str]:
    if isinstance(sample, Conversation):
        return [str(message.get("content") or "") for message in sample.messages]
    return [sample.prompt, sample.completion] if isinstance(sample, Completion) else []


def _question(sample: Sample) -> dict[str, Any] | None:
    """What it takes to ask a sample's last question anew."""
    if isinstance(sample, Completion) and sample.prompt and sample.completion.strip():
        return {"prompt": sample.prompt, "reference": sample.completion}
    if not isinstance(sample, Conversation):
        return None
    last = len(sample.messages) - 1
    while last >= 0 and sample.messages[last]["role"] != "assistant":
        last -= 1
    if last < 1 or not sample.messages[last].get("content"):
        return None
    return {
        "messages": sample.messages[:last],
        "reference": sample.messages[last]["content"],
        "tools": sample.tools,
        "template_options": sample.template_options,
        "answer_format": sample.answer_format,
    }
