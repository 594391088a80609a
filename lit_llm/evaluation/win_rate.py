"""Whose answers are better: a win rate with its interval, and one at equal length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lit_llm.errors import UserError
from lit_llm.evaluation.judges import Judge, Pair, Verdict
from lit_llm.evaluation.results import Answer, Items, Measurement, measure

Conversation = list[dict[str, Any]]
Order = Literal["first-second", "second-first", "either", "equal"]


@dataclass(frozen=True)
class Judgement:
    """What a judge said of two answers in one order.

    Attributes:
        task: Name of the task.
        item: What names the item.
        order: Whose answer was shown first; "either" for a judge that does not know of an order,
            "equal" for answers of the same text, which no judge is asked about.
        verdict: 1 where the second model's answer is better, whichever was shown first, 0.5 for a
            tie, 0 where the first model's is.
        raw: What the judge gave: its reply, or its scores.
        readable: Whether the verdict could be read from it; otherwise it counts as a tie.
    """

    task: str
    item: str
    order: Order
    verdict: float
    raw: str = ""
    readable: bool = True


@dataclass(frozen=True)
class WinRate:
    """How often one model's answers are better than another's.

    Attributes:
        first: Name of the model that is compared with.
        second: Name of the model whose wins are counted.
        judge: What decided.
        measurement: Wins plus half of the ties of the second model over all pairs.
        length_controlled: The same if both answers were of one length.
        wins: Pairs in which the second model's answer is better.
        ties: Pairs in which neither is, or in which the judge contradicts itself.
        losses: Pairs in which the first model's answer is better.
        position_bias: Share of the judged pairs with another verdict when the answers change
            places; ``None`` for a judge that does not know of an order, or that was not asked.
        mean_words: Mean words of an answer, of the first and of the second model.
        judgements: Everything the judge said.
        unreadable: Judgements that no verdict could be read from.
        unmatched: Answers of either model that the other has none for.
    """

    first: str
    second: str
    judge: str
    measurement: Measurement
    length_controlled: Measurement
    wins: int
    ties: int
    losses: int
    position_bias: float | None
    mean_words: tuple[float, float]
    judgements: list[Judgement] = field(default_factory=list)
    unreadable: int = 0
    unmatched: int = 0


def compare_answers(
    first: Sequence[Answer],
    second: Sequence[Answer],
    judge: Judge,
    *,
    names: tuple[str, str] = ("first", "second"),
    asked: Mapping[str, Conversation | str] | None = None,
) -> WinRate:
    """Compare what two models wrote on the same items.

    A judge that sees an order is asked about each pair in both. Where its two verdicts are not the
    same the pair is a tie, so a judge that always takes the answer shown first gives 50 %, and a
    position bias of 1. Answers of the same text are a tie without asking.

    The win rate is (wins + ties / 2) / pairs, with the interval of
    :func:`lit_llm.evaluation.results.measure`. The length-controlled one (Dubois et al. 2024,
    https://arxiv.org/abs/2404.04475) fits logit P(second wins) = θ + φ tanh(Δ / std(Δ)) to the
    pairs, where Δ is how many characters longer the second answer is, and gives what is left at
    Δ = 0: sigmoid(θ). The paper's term for the difficulty of each prompt is left out, as it is
    learnt from many models. The interval is that of 200 resamples of the pairs. Where one model's
    answers are always the longer ones, nothing shows how it would do otherwise.

    Args:
        first: What the first model wrote; answers that were given to choose from are left out.
        second: What the second model wrote.
        judge: Who decides.
        names: The names of both models.
        asked: By item what was asked: a conversation, or a plain text that is continued. By default
            the prompt of the first model's answer, as a question of the user.

    Raises:
        UserError: There is no item that both answered, or the judge fails.
    """
    matched, unmatched = _matched(first, second)
    if not matched:
        raise UserError(
            f"win rate of {names[1]} against {names[0]}: they have no item in common that both "
            "wrote an answer to; give them the same prompts."
        )
    pairs = [_pair(mine, its, asked or {}) for mine, its in matched]
    judged = _judged(judge, matched, pairs)
    # A judge that contradicts itself has not decided.
    verdicts = [{judgement.verdict for judgement in own} for own in judged]
    outcomes = [said.pop() if len(said) == 1 else 0.5 for said in verdicts]
    # A reply that could not be read says nothing of the order.
    both = [own for own in judged if len(own) == 2 and all(one.readable for one in own)]
    tasks = [answer.task for answer, _ in matched]
    task = tasks[0] if len(set(tasks)) == 1 else "all"
    items = Items(
        [answer.item for answer, _ in matched],
        outcomes,
        [1.0] * len(pairs),
        tasks if len(set(tasks)) > 1 else [],
    )
    measurement = measure(task, "win_rate", items, chance=0.5)
    longer = np.array([len(pair.second) - len(pair.first) for pair in pairs], dtype=float)
    record = [judgement for own in judged for judgement in own]
    return WinRate(
        first=names[0],
        second=names[1],
        judge=judge.name,
        measurement=measurement,
        length_controlled=_length_controlled(measurement, np.array(outcomes), longer),
        wins=outcomes.count(1.0),
        ties=outcomes.count(0.5),
        losses=outcomes.count(0.0),
        position_bias=float(np.mean([a.verdict != b.verdict for a, b in both])) if both else None,
        mean_words=(
            float(np.mean([len(pair.first.split()) for pair in pairs])),
            float(np.mean([len(pair.second.split()) for pair in pairs])),
        ),
        judgements=record,
        unreadable=sum(not judgement.readable for judgement in record),
        unmatched=unmatched,
    )


def _matched(
    first: Sequence[Answer], second: Sequence[Answer]
) -> tuple[list[tuple[Answer, Answer]], int]:
    """Answers to the same items, and how many have no partner.

    An item that comes twice is matched with the second one of its kind.
    """

    def named(answers: Sequence[Answer]) -> dict[tuple[str, str, int], Answer]:
        times: Counter[tuple[str, str]] = Counter()
        found = {}
        for answer in answers:
            if answer.generated:
                key = (answer.task, answer.item)
                found[(*key, times[key])] = answer
                times[key] += 1
        return found

    mine, its = named(first), named(second)
    matched = [(mine[key], its[key]) for key in mine if key in its]
    return matched, len(mine) + len(its) - 2 * len(matched)


def _pair(first: Answer, second: Answer, asked: Mapping[str, Conversation | str]) -> Pair:
    told = asked.get(first.item)
    if told is None:
        told = [{"role": "user", "content": first.prompt}]
    messages = None if isinstance(told, str) else told
    if messages:
        said = [message for message in messages if message.get("role") == "user"] or messages
        prompt = str(said[-1].get("content") or "")
    else:
        prompt = str(told or first.prompt)
    # What is not known to have been cut off has ended.
    stopped = (first.stopped is not False, second.stopped is not False)
    return Pair(prompt, first.answer, second.answer, messages, first.reference, stopped)


def _judged(
    judge: Judge, matched: Sequence[tuple[Answer, Answer]], pairs: Sequence[Pair]
) -> list[list[Judgement]]:
    """What the judge says of each pair: two judgements where it sees an order, else one."""
    orders: list[Order] = ["first-second", "second-first"] if judge.sees_order else ["either"]
    asked = [
        (number, order)
        for number, pair in enumerate(pairs)
        for order in orders
        if pair.first.strip() != pair.second.strip()
    ]
    shown = [
        _swapped(pairs[number]) if order == "second-first" else pairs[number]
        for number, order in asked
    ]
    # All at once: an endpoint answers several requests at a time.
    verdicts = judge.judge(shown) if shown else []
    judged: list[list[Judgement]] = [[] for _ in pairs]
    for (number, order), verdict in zip(asked, verdicts, strict=True):
        judged[number].append(_judgement(matched[number][0], order, verdict))
    return [
        own or [Judgement(answer.task, answer.item, "equal", 0.5)]
        for own, (answer, _) in zip(judged, matched, strict=True)
    ]


def _judgement(answer: Answer, order: Order, verdict: Verdict) -> Judgement:
    for_shown_first = (verdict.score > 0.5) + 0.5 * (verdict.score == 0.5)
    for_second = for_shown_first if order == "second-first" else 1 - for_shown_first
    return Judgement(
        answer.task, answer.item, order, float(for_second), verdict.raw, verdict.readable
    )


def _swapped(pair: Pair) -> Pair:
    return Pair(
        pair.prompt,
        pair.second,
        pair.first,
        pair.messages,
        pair.reference,
        (pair.stopped[1], pair.stopped[0]),
    )


# ----- the win rate at equal length ---------------------------------------------------------------

_RESAMPLES = 200
_SEED = 0
# Slight prices of θ² / 2 and φ² / 2, so that there is an optimum where one side always wins, or the
# longer answer always does.
_PRICES = (1e-6, 0.1)
_LARGEST_STEP = 2.0


def _length_controlled(plain: Measurement, outcomes: np.ndarray, longer: np.ndarray) -> Measurement:
    """Outcomes (P,) of 0, 0.5 and 1, and how many characters longer the second answers are (P,)."""
    spread = float(longer.std())
    feature = np.tanh(longer / spread) if spread > 0 else np.zeros_like(longer)
    count = len(outcomes)
    drawn = np.random.default_rng(_SEED).multinomial(count, [1 / count] * count, size=_RESAMPLES)
    fits = _intercepts(feature, outcomes, np.concatenate([np.ones((1, count)), drawn]))
    rates = 1 / (1 + np.exp(-fits))
    low, high = (float(end) for end in np.quantile(rates[1:], (0.025, 0.975)))
    if len(set(outcomes.tolist())) == 1:  # all resamples are alike
        low, high = plain.low, plain.high
    return Measurement(
        plain.task, "length_controlled_win_rate", float(rates[0]), low, high, count, chance=0.5
    )


def _intercepts(feature: np.ndarray, outcomes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """θ of weighted logistic regressions by Newton's method: weights (R, P) -> (R,)."""
    theta, phi = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(100):
        chance = 1 / (1 + np.exp(-(theta[:, None] + phi[:, None] * feature)))
        rest = weights * (outcomes - chance)
        bend = weights * chance * (1 - chance)
        gradient_theta = rest.sum(1) - _PRICES[0] * theta
        gradient_phi = rest @ feature - _PRICES[1] * phi
        both, mixed = bend.sum(1) + _PRICES[0], bend @ feature
        square = bend @ feature**2 + _PRICES[1]
        determinant = both * square - mixed**2
        step_theta = (square * gradient_theta - mixed * gradient_phi) / determinant
        step_phi = (both * gradient_phi - mixed * gradient_theta) / determinant
        largest = np.maximum(np.abs(step_theta), np.abs(step_phi))
        short = np.minimum(1, _LARGEST_STEP / np.maximum(largest, 1e-300))
        theta, phi = theta + short * step_theta, phi + short * step_phi
        if largest.max() < 1e-9:
            break
    return theta
