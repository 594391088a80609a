"""Conversations tokenised once: split, cut to length, counted, kept in memory-mapped files.

A cache is a folder named by a hash of everything that decides its content, see ``cached_folder``.
"""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llm.data.chat_template import (
    TokenizedChat,
    tokenize_chat,
    tokenize_completion,
)
from lit_llm.data.cleaning import normalized_key
from lit_llm.data.conversations import (
    Completion,
    Conversation,
    Sample,
    Tokens,
    read_samples,
    source_format,
)
from lit_llm.data.corpus import SPLITS
from lit_llm.data.folder_cache import cached_folder
from lit_llm.data.packing import IGNORED
from lit_llm.data.records import RecordSource, record_fingerprint
from lit_llm.data.sample_table import SampleTable, SampleWriter
from lit_llm.data.splits import Split, assign_split
from lit_llm.data.token_cache import tokenizer_hash
from lit_llm.data.truncation import TrainOn, fit, split_text, train_labels
from lit_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2


@dataclasses.dataclass(frozen=True)
class InstructionSettings:
    """What, beside the tokenizer and its chat template, decides the content of a cache.

    Attributes:
        sources: Sources that are split into training, validation and test.
        val_sources: Sources that are validation as a whole; they are read first, so a conversation
            of theirs is not trained on.
        seq_len: Longest sample, in tokens.
        train_on: Which tokens are targets.
        val_fraction: Share of the groups of ``sources`` held out for validation.
        test_fraction: Share of the groups of ``sources`` held out for the test.
    """

    sources: Sequence[RecordSource]
    val_sources: Sequence[RecordSource] = ()
    seq_len: int = 512
    train_on: TrainOn = "assistant"
    val_fraction: float = 0.05
    test_fraction: float = 0.05

    @property
    def all_sources(self) -> list[RecordSource]:
        """Sources as a cache numbers them: ``val_sources`` after ``sources``."""
        return [*self.sources, *self.val_sources]


@dataclasses.dataclass
class Counts:
    """What became of the conversations of one source.

    Attributes:
        read: Conversations read.
        held_out: Left out: they begin as one of a source that is validation as a whole.
        duplicates: Left out: they repeat one that was read before, in whatever source.
        unanswered: Left out: nothing in them is to be trained on.
        too_long: Left out: an answer alone is longer than the context.
        turns_cut: Their last turns were cut.
        prompt_cut: The beginning of their prompt was cut.
        unended: Their last trained turn does not end with a stop token.
        control_text: A message holds the text of a special token, which becomes that token.
        splits: For each split its samples, tokens and trained tokens.
    """

    read: int = 0
    held_out: int = 0
    duplicates: int = 0
    unanswered: int = 0
    too_long: int = 0
    turns_cut: int = 0
    prompt_cut: int = 0
    unended: int = 0
    control_text: int = 0
    splits: dict[str, dict[str, int]] = dataclasses.field(
        default_factory=lambda: {name: {"samples": 0, "tokens": 0, "trained": 0} for name in SPLITS}
    )

    def __str__(self) -> str:
        """One line: what was left out or cut, and why."""
        told = {
            "repeated": self.duplicates,
            "with the beginning of a held-out one": self.held_out,
            "without anything to train on": self.unanswered,
            "with an answer longer than seq_len": self.too_long,
        }
        cut = {
            "lost their last turns": self.turns_cut,
            "lost the beginning of their prompt": self.prompt_cut,
            "hold the text of a special token": self.control_text,
            "do not end with a stop token": self.unended,
        }
        parts = [f"{number:,} {what} left out" for what, number in told.items() if number]
        parts += [f"{number:,} {what}" for what, number in cut.items() if number]
        return f"{self.read:,} samples read" + "".join(f", {part}" for part in parts)


class InstructionCache:
    """A cache that is on disk and whole.

    Args:
        folder: Its folder.

    Raises:
        FileNotFoundError: When there is none.
        ValueError: When it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.counts = [Counts(**source["counts"]) for source in self.meta["sources"]]
        self._tables = {
            (number, name): SampleTable(folder / f"{number}-{name}.arrow")
            for number in range(len(self.counts))
            for name in SPLITS
        }
        for (number, name), table in self._tables.items():
            if len(table) != self.counts[number].splits[name]["samples"]:
                raise ValueError(f"{table.path} is damaged")

    @property
    def key(self) -> str:
        """The hash that names the cache."""
        return self.folder.name

    def table(self, source: int, name: Split) -> SampleTable:
        """The samples of one split of one source.

        Args:
            source: Number of the source, ``val_sources`` counted after ``sources``.
            name: ``"train"``, ``"validation"`` or ``"test"``.
        """
        return self._tables[source, name]


def open_instructions(
    cache_dir: str | Path,
    settings: InstructionSettings,
    tokenizer: "PreTrainedTokenizerBase",
    stop_token_ids: Sequence[int],
) -> InstructionCache:
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
    content = {
        "format": FORMAT,
        "tokenizer": tokenizer_hash(tokenizer),
        "bos": tokenizer.bos_token_id,
        "template": tokenizer.chat_template,
        "sources": [record_fingerprint(source) for source in settings.sources],
        "val_sources": [record_fingerprint(source) for source in settings.val_sources],
        "seq_len": settings.seq_len,
        "train_on": settings.train_on,
        "fractions": [settings.val_fraction, settings.test_fraction],
    }
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
    return cached_folder(
        Path(cache_dir).expanduser() / key,
        InstructionCache,
        lambda draft: _build(draft, settings, tokenizer, set(stop_token_ids)),
    )


def _build(
    folder: Path,
    settings: InstructionSettings,
    tokenizer: "PreTrainedTokenizerBase",
    stops: set[int],
) -> None:
    """Write all files of a cache, the description last."""
    sources = settings.all_sources
    counts = [Counts() for _ in sources]
    seen: set[bytes] = set()
    held_out: set[str] = set()
    controls = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    digest = hashlib.sha256()
    with ExitStack() as files:
        writers = {
            (number, name): files.enter_context(SampleWriter(folder / f"{number}-{name}.arrow"))
            for number in range(len(sources))
            for name in SPLITS
        }
        # Validation first: of equal conversations the first is kept.
        border = len(settings.sources)
        for number in [*range(border, len(sources)), *range(border)]:
            own = counts[number]
            for sample in read_samples(sources[number]):
                own.read += 1
                content = _content(sample)
                hashed = hashlib.blake2b(content.encode(), digest_size=16).digest()
                if hashed in seen:
                    own.duplicates += 1
                    continue
                seen.add(hashed)
                own.control_text += _holds(sample, controls)
                group = normalized_key(sample.group)
                split: Split = "validation"
                if number >= border:
                    held_out.add(group)
                elif group in held_out:
                    own.held_out += 1
                    continue
                else:
                    split = assign_split(
                        sample.group,
                        val_fraction=settings.val_fraction,
                        test_fraction=settings.test_fraction,
                    )
                about = _question(sample) if split != "train" else None
                for ids, trained in _tokenized(sample, settings, tokenizer, own):
                    last = max(index for index, flag in enumerate(trained) if flag)
                    # Tokens and the pieces of a text end as they were given.
                    own.unended += isinstance(sample, Conversation) and ids[last] not in stops
                    writers[number, split].write(ids, trained, about)
                    for name, value in zip(
                        own.splits[split], (1, len(ids), sum(trained)), strict=True
                    ):
                        own.splits[split][name] += value
                    digest.update(hashed)
    meta = {
        "format": FORMAT,
        "python": platform.python_version(),
        "sha256": digest.hexdigest(),
        "sources": [
            {
                "path": source.path,
                "format": source_format(source),
                "counts": dataclasses.asdict(own),
            }
            for source, own in zip(sources, counts, strict=True)
        ],
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


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


def _holds(sample: Sample, controls: list[str]) -> bool:
    """Whether a text holds what the tokenizer turns into a special token."""
    if isinstance(sample, Conversation):
        texts = [str(message.get("content") or "") for message in sample.messages]
    elif isinstance(sample, Completion):
        texts = [sample.prompt, sample.completion]
    else:
        return False
    return any(token in text for text in texts for token in controls)


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
