"""Prompts tokenised once: split, cut to length, counted, kept in memory-mapped files.

A row is a prompt. Beside its tokens are its text (``prompt``) or its ``messages`` with what the
chat template needs, ``answer_format``, and ``reference`` where the data has an answer.
"""

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
    short_hash,
)
from lit_llm.data.chat_template import plain_prompt_ids, prompt_ids
from lit_llm.data.prompt_formats import (
    PromptRecord,
    prompt_fingerprint,
    prompt_format,
    read_prompts,
)
from lit_llm.data.records import RecordSource
from lit_llm.data.splits import Split
from lit_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
_MANY = 0.1  # share of what was cut that is worth a warning


@dataclasses.dataclass(frozen=True)
class PromptSettings(ChatSettings):
    """What, beside the tokenizer and its chat template, decides the content of a cache.

    Attributes:
        first_words: So many first words of a text are the prompt; 0 takes none from texts.
    """

    first_words: int = 0


@dataclasses.dataclass
class PromptCounts(ChatCounts):
    """What became of the prompts of one source.

    Attributes:
        unasked: Left out: nothing is asked in them.
        plain: Questions in a split that are plain text, without the chat template.
        spaced: Plain prompts in a split that end with white space.
    """

    units: ClassVar[tuple[str, ...]] = ("samples", "tokens", "references")

    unasked: int = 0
    plain: int = 0
    spaced: int = 0

    def __str__(self) -> str:
        """One line: what was left out or cut, and why."""
        left_out = {
            "repeated": self.duplicates,
            "with the beginning of one in another split": self.held_out,
            "without a question": self.unasked,
        }
        changed = {
            "lost their beginning": self.prompt_cut,
            "go without the chat template": self.plain,
            "hold the text of a special token": self.control_text,
        }
        return counts_line(f"{self.read:,} prompts read", left_out, changed)

    def split_line(self, split: str) -> str:
        """What a split holds, in words."""
        own = self.splits[split]
        return (
            f"{own['samples']:,} prompts, {own['tokens']:,} tokens, "
            f"{own['references']:,} with a reference answer"
        )

    def why_empty(self, seq_len: int) -> str:
        """One sentence on why nothing is left for training, and what to do."""
        if self.unasked and self.unasked >= self.read - self.duplicates:
            return (
                f"not one of {self.read} records asks for anything; is the question in another "
                "field (rename it to prompt), or does no message have the role 'user'?"
            )
        return (
            f"nothing of {self.read} prompts is left for training ({self}); give more data or "
            "smaller held-out fractions."
        )

    def warnings(self) -> Iterator[str]:
        """What is to be looked at before the data is trusted, each in one sentence."""
        yield from super().warnings()
        kept = sum(own["samples"] for own in self.splits.values())
        if self.prompt_cut > _MANY * kept:
            yield (
                f"{self.prompt_cut:,} of {kept:,} prompts lost their beginning; "
                "raise data.prompt_len if it matters"
            )
        if self.plain:
            yield (
                f"{self.plain:,} prompts are plain text and go without the chat template; for a "
                "chat model set format: prompt"
            )
        if self.spaced:
            yield (
                f"{self.spaced:,} plain prompts end with white space, which most tokenizers put "
                "before the next word; a model may go on worse from there"
            )


def open_prompts(
    cache_dir: str | Path,
    settings: PromptSettings,
    tokenizer: "PreTrainedTokenizerBase",
    stop_token_ids: Sequence[int],
) -> ChatCache[PromptCounts]:
    """Open the cache of tokenised prompts; build it first where it is not there.

    Args:
        cache_dir: Folder of all caches, made as needed.
        settings: Sources and how they are prepared.
        tokenizer: Fast tokenizer with a chat template.
        stop_token_ids: Tokens that end an answer.

    Raises:
        UserError: When a source cannot be read or does not fit the chat template, or ``cache_dir``
            cannot be written.
    """
    return _PromptBuilder(settings, tokenizer, stop_token_ids).open(cache_dir)


class _PromptBuilder(ChatCacheBuilder[PromptRecord, PromptCounts]):
    counts_type = PromptCounts
    format = FORMAT
    settings: PromptSettings

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._written: set[bytes] = set()

    def identity(self) -> dict[str, Any]:
        return {"kind": "prompts", "first_words": self.settings.first_words}

    def source_format(self, source: RecordSource) -> str:
        return prompt_format(source, self.settings.first_words)

    def fingerprint(self, source: RecordSource) -> str:
        return prompt_fingerprint(source)

    def read(self, source: RecordSource) -> Iterator[PromptRecord]:
        return read_prompts(source, self.settings.first_words)

    def content(self, sample: PromptRecord) -> str:
        return json.dumps([sample.prompt, sample.tools, sample.template_options], sort_keys=True)

    def texts(self, sample: PromptRecord) -> list[str]:
        if isinstance(sample.prompt, list):
            return list(map(_said, sample.prompt))
        return [sample.prompt] if isinstance(sample.prompt, str) else []

    def rows(self, sample: PromptRecord, split: Split, counts: PromptCounts) -> Iterator[Row]:
        ids = self._tokenized(sample) if _asks(sample) else []
        if not ids:
            counts.unasked += 1
            return
        limit, bos = self.settings.seq_len, int(ids[0] == self.tokenizer.bos_token_id)
        is_long = len(ids) > limit
        if is_long:
            ids = ids[:bos] + ids[bos - limit :]
        # Once they are cut, prompts may be the same that were not before.
        hashed = short_hash(json.dumps(ids))
        if hashed in self._written:
            counts.duplicates += 1
            return
        self._written.add(hashed)
        counts.prompt_cut += is_long
        plain = isinstance(sample.prompt, str)
        counts.plain += plain and not sample.continued
        counts.spaced += plain and str(sample.prompt)[-1].isspace()
        about = self._about(sample)
        yield Row(ids, [False] * len(ids), about, {"references": int("reference" in about)})

    def _tokenized(self, sample: PromptRecord) -> list[int]:
        try:
            if isinstance(sample.prompt, str):
                return plain_prompt_ids(self.tokenizer, sample.prompt)
            if isinstance(sample.prompt, tuple):
                return list(sample.prompt)
            return prompt_ids(self.tokenizer, sample.prompt, sample.tools, sample.template_options)
        except UserError as error:
            raise UserError(f"{sample.origin}: {error}") from error

    def _about(self, sample: PromptRecord) -> dict[str, Any]:
        reference = {} if sample.reference is None else {"reference": sample.reference}
        told = {"answer_format": sample.answer_format, **reference}
        if isinstance(sample.prompt, str):
            return {"prompt": sample.prompt, **told}
        if isinstance(sample.prompt, tuple):
            text = self.tokenizer.decode(list(sample.prompt), skip_special_tokens=True)
            return {"prompt": str(text), **told}
        return {
            "messages": sample.prompt,
            "tools": sample.tools,
            "template_options": sample.template_options,
            **told,
        }


def _asks(sample: PromptRecord) -> bool:
    if isinstance(sample.prompt, list):
        return any(
            message["role"] == "user" and _said(message).strip() for message in sample.prompt
        )
    return bool(sample.prompt.strip() if isinstance(sample.prompt, str) else sample.prompt)


def _said(message: dict[str, Any]) -> str:
    return str(message.get("content") or "")
