"""From one record to a preference: the formats that comparisons of answers come in.

Those that TRL's RewardTrainer and DPOTrainer read
(https://huggingface.co/docs/trl/dataset_formats), and those of the usual public data sets. A reader
gets the fields of a record that are not null, those that its format needs among them, and its
origin; a field of a wrong type is a ``UserError`` that names the origin. What is well formed but
compares nothing, such as answers to different questions, becomes a preference without pairs: real
data hold a few of these, and whoever reads them can count them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, repeat, takewhile
from typing import Any

from lit_llm.data.messages import (
    MESSAGE_FIELDS,
    alpaca_question,
    asked,
    messages_of,
    root_group,
    template_values,
    with_system,
)
from lit_llm.data.preference_texts import split_texts, without_prompt
from lit_llm.data.record_formats import json_type, text_of
from lit_llm.errors import UserError

# Fields that only preferences have.
COMPARED_FIELDS = (("chosen", "rejected"), ("response_j", "response_k"))
ANSWER_FIELDS = ("answers", "responses", "completions")
_PAIR_FIELDS = ("chosen", "rejected")

Messages = list[dict[str, Any]]
Answer = Messages | str

# A difference that begins here is one of the prompts.
_ASKING = {"user", "system", "developer"}


@dataclass(frozen=True)
class Preference:
    """A prompt with two or more answers, and which is better than which.

    Attributes:
        prompt: Messages for the chat template, or plain text, which may be empty.
        answers: Each of the kind of the prompt: the messages that go on from it, of which the last
            is an assistant's, or text.
        pairs: Indices into ``answers``, each ``(better, worse)``. Empty when the record compares
            nothing that can be trained on; prompt and answers are then for people only.
        margins: For each pair how much better the answer is (Touvron et al., 2023, "Llama 2",
            https://arxiv.org/abs/2307.09288, section 3.2.2); None when the data do not tell.
        origin: Where it stands, for people: ``"file:line"``.
        group: Preferences of one group never cross splits: the first question.
        tools: Descriptions of the tools, for the template.
        template_options: More values for the template, such as ``enable_thinking``.
        kinds: For each pair a name under which its accuracy is also told, or None.
    """

    prompt: Answer
    answers: tuple[Answer, ...]
    pairs: tuple[tuple[int, int], ...]
    margins: tuple[float, ...] | None
    origin: str
    group: str
    tools: list[Any] | None = None
    template_options: dict[str, Any] | None = None
    kinds: tuple[str, ...] | None = None


def ranked_pairs(ranks: Sequence[float]) -> tuple[tuple[int, int], ...]:
    """All pairs (better, worse) of what is ranked; the smaller rank is better, equal ones no pair.

    Args:
        ranks: In ascending order.
    """
    numbers = combinations(range(len(ranks)), 2)
    return tuple((better, worse) for better, worse in numbers if ranks[better] < ranks[worse])


def read_preference(data: dict[str, Any], origin: str) -> list[Preference]:
    """Chosen and rejected, with a prompt or with one that both begin with.

    Texts are joined as they are. As soon as one field holds messages, all become messages; a prompt
    that is text is then the user's message before the answers, unless they have one.
    """
    prompt = _answer(data, "prompt", origin) if "prompt" in data else None
    return [_pair(prompt, data, origin)]


def read_chat_preference(data: dict[str, Any], origin: str) -> list[Preference]:
    """Prompt, chosen and rejected; texts become turns of a user and of the assistant."""
    prompt = _answer(data, "prompt", origin)
    if not isinstance(prompt, str):
        return [_pair(prompt, data, origin)]
    answers = [_answer(data, field, origin) for field in _PAIR_FIELDS]
    texts = [answer for answer in answers if isinstance(answer, str)]
    if len(texts) == len(answers) and (rest := without_prompt(prompt, texts)) != texts:
        # The white space between stood for the border of two turns.
        answers = [text.lstrip() for text in rest]
    question = asked(data, origin, prompt)
    return [compared(question, answers, data, origin, margins=margin_of(data, origin))]


def read_preference_sharegpt(data: dict[str, Any], origin: str) -> list[Preference]:
    """A conversation, and its next message or messages as they were chosen and rejected."""
    field = next(field for field in MESSAGE_FIELDS if field in data)
    return [_pair(with_system(messages_of(data, field, origin), data, origin), data, origin)]


def read_alpaca_preference(data: dict[str, Any], origin: str) -> list[Preference]:
    """An instruction with maybe an input, a system message and a history; chosen and rejected."""
    return [_pair(alpaca_question(data, origin), data, origin)]


def read_stack_exchange(data: dict[str, Any], origin: str) -> list[Preference]:
    """A question and two answers, of which ``response_j`` is the better one."""
    prompt = asked(data, origin, text_of(data, "question", origin))
    answers = [_answer(data, field, origin) for field in ("response_j", "response_k")]
    return [compared(prompt, answers, data, origin, margins=margin_of(data, origin))]


def read_ranked(data: dict[str, Any], origin: str) -> list[Preference]:
    """A prompt and a list of answers, best first or with ``ranks`` or ``scores``.

    Answers are texts, messages or, as in UltraFeedback, objects with ``response`` and
    ``overall_score``. Those whose rank or score is null are left out. Differences of scores are on
    a scale of their own and become no margins. A prompt that is text is joined with answers that
    are text as it is; an ``instruction`` is the turn of a user.
    """
    field = next(field for field in ANSWER_FIELDS if field in data)
    items = data[field]
    if not isinstance(items, list):
        raise UserError(f"{origin}: field {field!r} is {json_type(items)}, not a list of answers.")
    places = [f"{origin}: answer {number}" for number in range(1, len(items) + 1)]
    ranks, scores = _numbers(data, "ranks", items, origin), _numbers(data, "scores", items, origin)
    if scores is None and any(isinstance(item, dict) and "overall_score" in item for item in items):
        rated = [item if isinstance(item, dict) else {} for item in items]
        scores = list(map(_number, rated, repeat("overall_score"), places))
    if ranks is not None:
        scores = None  # of both the ranks are what was asked of people
    elif scores is not None:
        ranks = [None if score is None else -score for score in scores]
    else:
        ranks = list(range(len(items)))
    known = sorted((rank, number) for number, rank in enumerate(ranks) if rank is not None)
    pairs = ranked_pairs([rank for rank, _ in known])
    answers = [_listed(items[number], field, places[number]) for _, number in known]
    prompt = _answer(data, "prompt", origin) if "prompt" in data else alpaca_question(data, origin)
    return [compared(prompt, answers, data, origin, pairs=pairs)]


def compared(
    prompt: Answer | None,
    answers: Sequence[Answer],
    data: dict[str, Any],
    origin: str,
    *,
    pairs: tuple[tuple[int, int], ...] = ((0, 1),),
    margins: tuple[float, ...] | None = None,
) -> Preference:
    """A preference among answers to a prompt.

    Args:
        prompt: What they answer; None when it is what all of them begin with.
        answers: The answers, the best one first.
        data: The record, which may say more: tools, values for the template, a kind.
        origin: Where it stands.
        pairs: Indices of answers, (better, worse).
        margins: For each pair how much better it is.
    """
    name = _kind(data)
    kinds = (name,) * len(pairs) if name and pairs else None
    if isinstance(prompt, str | None) and all(isinstance(answer, str) for answer in answers):
        if isinstance(data.get("system"), str) and data["system"].strip():
            raise UserError(
                f"{origin}: field 'system' is no part of plain texts, which go without the chat "
                "template; give the source format: chat_preference (answers in a list: rename: "
                "{prompt: instruction}), or rename the field to something else."
            )
        texts = [str(answer) for answer in answers]
        if prompt is None:
            prompt, texts = split_texts(texts)
        else:
            texts = without_prompt(prompt, texts)
        group = prompt if prompt.strip() or not texts else texts[0]
        return Preference(prompt, tuple(texts), pairs, margins, origin, group, kinds=kinds)

    tools, options = template_values(data, origin)
    told = [with_system(_conversation(prompt, answer), data, origin) for answer in answers]
    split = _split_conversations(told)
    if split is None:
        return Preference([], tuple(told), (), None, origin, group="")
    shared, rest = split
    group = root_group(shared)
    return Preference(
        shared, tuple(rest), pairs, margins, origin, group, tools, options, kinds=kinds
    )


def _pair(prompt: Answer | None, data: dict[str, Any], origin: str) -> Preference:
    answers = [_answer(data, field, origin) for field in _PAIR_FIELDS]
    return compared(prompt, answers, data, origin, margins=margin_of(data, origin))


def _answer(data: dict[str, Any], field: str, origin: str) -> Answer:
    """Text, or messages from a list of them or a single one."""
    value = data[field]
    if isinstance(value, dict):
        return messages_of({field: [value]}, field, origin)
    if isinstance(value, list):
        return messages_of(data, field, origin) if value else []
    return text_of(data, field, origin)


def _listed(item: Any, field: str, place: str) -> Answer:
    if isinstance(item, dict) and "response" in item:
        return text_of(item, "response", place)
    return _answer({field: item}, field, place)


def _conversation(prompt: Answer | None, answer: Answer) -> Messages:
    """A prompt and an answer, of which one at least is messages or the prompt unknown."""
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if isinstance(prompt, str):
        opening = list(takewhile(lambda message: message["role"] != "assistant", answer))
        if any(message["role"] == "user" for message in opening) or not prompt.strip():
            return answer
        return [*opening, {"role": "user", "content": prompt}, *answer[len(opening) :]]
    if not prompt or answer[: len(prompt)] == prompt:
        return answer
    return [*prompt, *answer]


def _split_conversations(told: Sequence[Messages]) -> tuple[Messages, list[Messages]] | None:
    """What conversations share, and how each goes on, from an assistant's message to another.

    None when they do not compare answers: they differ first in what somebody else says, no user
    asks anything before, or one does not end with an assistant's message.
    """
    border = None
    for index, turn in enumerate(zip(*told, strict=False)):
        roles = {message["role"] for message in turn}
        if roles == {"assistant"}:
            border = index
        if any(message != turn[0] for message in turn):
            if roles & _ASKING:
                return None
            break
    if border is None or not all(answer[-1]["role"] == "assistant" for answer in told):
        return None
    shared = told[0][:border]
    if not any(message["role"] == "user" for message in shared):
        return None
    return shared, [answer[border:] for answer in told]


def _kind(data: dict[str, Any]) -> str | None:
    names = (data.get(field) for field in ("kind", "category"))
    return next((name for name in names if isinstance(name, str) and name.strip()), None)


def margin_of(data: dict[str, Any], origin: str) -> tuple[float, ...] | None:
    """The field ``margin``; ``score_chosen`` less ``score_rejected`` is on a scale of its own."""
    margin = _number(data, "margin", origin)
    return None if margin is None else (margin,)


def _numbers(
    data: dict[str, Any], field: str, items: list[Any], origin: str
) -> list[float | None] | None:
    """The number of each item, or None when the record has no such field."""
    values = data.get(field)
    if values is None:
        return None
    if not isinstance(values, list):
        raise UserError(f"{origin}: field {field!r} is {json_type(values)}, not a list of numbers.")
    if len(values) != len(items):
        raise UserError(
            f"{origin}: field {field!r} has {len(values)} values for {len(items)} answers."
        )
    return [_number({field: value}, field, origin) for value in values]


def _number(data: dict[str, Any], field: str, origin: str) -> float | None:
    """A number of a record; None where it is missing: null, NaN (pandas) or "" (.csv)."""
    value = data.get(field)
    if value is None or value == "":
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number) and not isinstance(value, float):
        raise UserError(f"{origin}: field {field!r} is {json_type(value)}, not a number.")
    if math.isinf(number):
        raise UserError(f"{origin}: field {field!r} is {value}, not a finite number.")
    return None if math.isnan(number) else number
