"""Preferences tokenised once: split, cut to length, counted, kept in memory-mapped files.

A row is a prompt with its K answers. Its tokens are the K sequences of prompt and answer, one after
the other; beside them are ``lengths`` (K numbers of tokens), ``pairs`` (numbers of the better and
the worse answer) and, where the data has them, ``margins`` and ``kinds``, one a pair.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llm.data.chat_cache import (
    ChatCache,
    ChatCacheBuilder,
    ChatSettings,
    Row,
    short_hash,
)
from lit_llm.data.chat_template import TokenizedChat
from lit_llm.data.cleaning import normalized_key
from lit_llm.data.preference_counts import PreferenceCounts
from lit_llm.data.preference_formats import Answer
from lit_llm.data.preference_tokens import answer_mask, best_answer, fit_answers, tokenize_answer
from lit_llm.data.preferences import (
    Preference,
    preference_fingerprint,
    preference_format,
    read_preferences,
)
from lit_llm.data.records import RecordSource
from lit_llm.data.splits import Split
from lit_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2
_NO_TEXT = ("role", "name", "weight")


@dataclasses.dataclass(frozen=True)
class PreferenceSettings(ChatSettings):
    """What, beside the tokenizer and its chat template, decides the content of a cache.

    Attributes:
        ood_sources: Sources that are test as a whole, told apart from the test of the others. They
            are read last: of theirs is left out what begins as a sample of training or validation.
    """

    ood_sources: Sequence[RecordSource] = ()

    @property
    def all_sources(self) -> list[RecordSource]:
        """Sources as a cache numbers them: those held out as a whole after ``sources``."""
        return [*super().all_sources, *self.ood_sources]

    @property
    def reading_order(self) -> list[tuple[int, Split | None]]:
        """Numbers of all sources in the order they are read, and the split of those that are whole.

        The second test yields to the training: it may well ask about the same things, as
        ``python-parameters`` does, and nothing would be left to train on.
        """
        first = super().reading_order
        last = range(len(first), len(first) + len(self.ood_sources))
        return [*first, *((number, "test") for number in last)]


def open_preferences(
    cache_dir: str | Path,
    settings: PreferenceSettings,
    tokenizer: "PreTrainedTokenizerBase",
    stop_token_ids: Sequence[int],
) -> ChatCache[PreferenceCounts]:
    """Open the cache of tokenised preferences; build it first where it is not there.

    Args:
        cache_dir: Folder of all caches, made as needed.
        settings: Sources and how they are prepared.
        tokenizer: Fast tokenizer with a chat template.
        stop_token_ids: Tokens that end an answer.

    Raises:
        UserError: When a source cannot be read or does not fit the chat template, or ``cache_dir``
            cannot be written.
    """
    return _PreferenceBuilder(settings, tokenizer, stop_token_ids).open(cache_dir)


def trained_key(
    cache: ChatCache[PreferenceCounts],
    settings: PreferenceSettings,
    tokenizer: "PreTrainedTokenizerBase",
    stop_token_ids: Sequence[int],
) -> str:
    """The hash of what is trained on: the key of the cache if there were no second test.

    Args:
        cache: The cache of these settings.
        settings: Sources and how they are prepared.
        tokenizer: As in ``open_preferences``.
        stop_token_ids: As in ``open_preferences``.
    """
    if not settings.ood_sources:
        return cache.key
    alone = dataclasses.replace(settings, ood_sources=())
    return _PreferenceBuilder(alone, tokenizer, stop_token_ids).key()


class _PreferenceBuilder(ChatCacheBuilder[Preference, PreferenceCounts]):
    counts_type = PreferenceCounts
    format = FORMAT
    settings: PreferenceSettings

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._compared: set[bytes] = set()

    def identity(self) -> dict[str, Any]:
        ood = [self.fingerprint(source) for source in self.settings.ood_sources]
        return {"kind": "preferences", "ood_sources": ood}

    def source_format(self, source: RecordSource) -> str:
        return preference_format(source)

    def fingerprint(self, source: RecordSource) -> str:
        return preference_fingerprint(source)

    def read(self, source: RecordSource) -> Iterator[Preference]:
        return read_preferences(source)

    def content(self, sample: Preference) -> str:
        return json.dumps([_asked(sample), sample.answers, sample.pairs], sort_keys=True)

    def texts(self, sample: Preference) -> list[str]:
        told = [sample.prompt, *sample.answers]
        messages = [[part] if isinstance(part, str) else map(_said, part) for part in told]
        return list(chain.from_iterable(messages))

    def rows(self, sample: Preference, split: Split, counts: PreferenceCounts) -> Iterator[Row]:
        counts.unusable += not sample.pairs
        chosen = list(self._told_apart(sample, counts))
        if not chosen:
            return
        chats, chosen = self._tokenized(sample, chosen, counts)
        fitted, cut = fit_answers(
            chats,
            [sample.pairs[number] for number in chosen],
            self.settings.seq_len,
            bos_token_id=self.tokenizer.bos_token_id,
        )
        fitting = [number for number in chosen if fitted.keys() >= set(sample.pairs[number])]
        counts.unfit += len(chosen) - len(fitting)
        counts.too_long += bool(chosen) and not fitting
        if not fitting:
            return
        counts.prompt_cut += cut > 0
        own = list(fitted.values())
        counts.unended += not isinstance(sample.prompt, str) and any(
            chat.input_ids[-1] not in self.stops for chat in own
        )
        counts.plain += isinstance(sample.prompt, str)
        counts.unasked += isinstance(sample.prompt, str) and not sample.prompt.strip()
        about = _about(sample, fitted, fitting)
        counts.with_margin += len(about.get("margins", ()))
        counts.negative_margin += sum(margin < 0 for margin in about.get("margins", ()))
        if split != "train":
            about |= _question(sample, about["pairs"], list(fitted))
        yield Row(
            list(chain.from_iterable(chat.input_ids for chat in own)),
            list(chain.from_iterable(map(answer_mask, own))),
            about,
            {"pairs": len(fitting)},
        )

    def _told_apart(self, sample: Preference, counts: PreferenceCounts) -> Iterator[int]:
        """Numbers of the pairs that say something, and nothing else than what was said before."""
        asked = _asked(sample)
        keys = [_key(answer) for answer in sample.answers]
        for number, (better, worse) in enumerate(sample.pairs):
            counts.pairs += 1
            if not (keys[better] and keys[worse]):
                counts.empty += 1
                continue
            if keys[better] == keys[worse]:
                counts.identical += 1
                continue
            said = [
                short_hash(json.dumps([asked, *answers], sort_keys=True))
                for answers in ((keys[better], keys[worse]), (keys[worse], keys[better]))
            ]
            if said[0] in self._compared:
                counts.repeated += 1
            elif said[1] in self._compared:
                counts.contradictory += 1
            else:
                self._compared.add(said[0])
                yield number

    def _tokenized(
        self, sample: Preference, chosen: list[int], counts: PreferenceCounts
    ) -> tuple[dict[int, TokenizedChat], list[int]]:
        """The answers of the pairs, and the pairs whose answers are not empty as tokens either."""
        used = sorted({answer for number in chosen for answer in sample.pairs[number]})
        try:
            made = {k: tokenize_answer(self.tokenizer, sample, k, self.stops) for k in used}
        except UserError as error:
            raise UserError(f"{sample.origin}: {error}") from error
        chats = {number: chat for number, chat in made.items() if chat is not None}
        full = [number for number in chosen if chats.keys() >= set(sample.pairs[number])]
        counts.empty += len(chosen) - len(full)
        return chats, full


def _about(
    sample: Preference, chats: dict[int, TokenizedChat], chosen: list[int]
) -> dict[str, Any]:
    place = {number: index for index, number in enumerate(chats)}
    about: dict[str, Any] = {
        "lengths": [len(chat.input_ids) for chat in chats.values()],
        "pairs": [[place[answer] for answer in sample.pairs[number]] for number in chosen],
        "group": _group_number(sample.group),
    }
    for name in ("margins", "kinds"):
        if (values := getattr(sample, name)) is not None:
            about[name] = [values[number] for number in chosen]
    return about


def _group_number(group: str) -> int:
    """A number that preferences of one group share; small enough for a float64."""
    digest = hashlib.blake2b(normalized_key(group).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")


def _question(sample: Preference, pairs: list[list[int]], numbers: list[int]) -> dict[str, Any]:
    """What it takes to ask for an answer anew; nothing where there is no prompt or no answer."""
    reference = best_answer([sample.answers[number] for number in numbers], pairs)
    if not sample.prompt or not reference:
        return {}
    if isinstance(sample.prompt, str):
        return {"prompt": sample.prompt, "reference": reference}
    return {
        "messages": sample.prompt,
        "reference": reference,
        "tools": sample.tools,
        "template_options": sample.template_options,
        "answer_format": None,
    }


def _asked(sample: Preference) -> list[Any]:
    """What makes two prompts the same."""
    return [sample.prompt, sample.tools, sample.template_options]


def _key(answer: Answer) -> str:
    """What makes two answers the same; "" for one that says nothing."""
    if isinstance(answer, str):
        return answer.strip()
    told = [{**message, "content": _said(message).strip()} for message in answer]
    own = [message for message in told if message["role"] == "assistant"]
    says = any(value for message in own for name, value in message.items() if name not in _NO_TEXT)
    return json.dumps(told, sort_keys=True) if says else ""


def _said(message: dict[str, Any]) -> str:
    return str(message.get("content") or "")
