"""What can be said of a policy's responses to held-out prompts, and whose are better."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lit_llm.evaluation.intervals import rate

# Scores closer than this, as a part of their size, differ by rounding only.
_ROUNDING = 1e-6


@dataclass
class EvaluatedResponse:
    """A response to a held-out prompt, with everything that was measured of it.

    Attributes:
        index: Number of the prompt among the held-out ones.
        prompt: The prompt as text.
        response: The response as text, without special tokens.
        length: Its tokens, the stop token included.
        stopped: Whether it ended by itself; otherwise it was cut off.
        score: Weighted sum of the rewards, which PPO maximises.
        scores: Score by each reward and each judge, by its name; the same names for every response
            of an evaluation.
        kl: Sum over its tokens of log(policy / reference), in nats.
        repetition: Share of its n-grams that it has said before (:func:`repetition`).
        baseline: The reference's response to the same prompt, where there is one.
    """

    index: int
    prompt: str
    response: str
    length: int
    stopped: bool
    score: float
    scores: dict[str, float]
    kl: float
    repetition: float
    baseline: "EvaluatedResponse | None" = None


def repetition(ids: Sequence[int], n: int = 3) -> float:
    """Share of the n-grams of a response that have stood in it before, in [0, 1).

    0 is text that never repeats itself; a response that says the same few tokens over and over
    comes near to 1. One of fewer than n tokens has none, which counts as 0.

    Args:
        ids: The tokens.
        n: Tokens of an n-gram.
    """
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def outcome(row: EvaluatedResponse, name: str | None = None) -> float | None:
    """Whether a response is better than the reference's: 1, 0.5 for a tie, or 0.

    The same answer is a tie whatever its scores, and so are scores that differ by rounding only:
    most rewards see a response in another batch each time.

    Args:
        row: The response.
        name: The reward or judge that decides; by default the weighted sum of the rewards.

    Returns:
        The outcome; ``None`` without a response of the reference.
    """
    other = row.baseline
    if other is None:
        return None
    mine, its = (one.score if name is None else one.scores[name] for one in (row, other))
    same = (row.response, row.length, row.stopped) == (other.response, other.length, other.stopped)
    return 0.5 if same else preferred(mine, its)


def preferred(first: float, second: float) -> float:
    """Which of two scores is higher: 1 for the first, 0 for the second, 0.5 for neither.

    Scores that differ by rounding only are equal: most rewards see a response in another batch each
    time.

    Args:
        first: A score.
        second: Another one.
    """
    margin = _ROUNDING * max(1.0, abs(first), abs(second))
    if not abs(first - second) > margin:  # NaN is nobody's win
        return 0.5
    return float(first > second)


def response_measures(rows: Sequence[EvaluatedResponse]) -> dict[str, float]:
    """Measure responses to held-out prompts.

    - ``objective/scores``: mean weighted sum of the rewards; ``scores/NAME`` by each reward and
      judge.
    - ``objective/kl``: mean KL(policy || reference) of a response, in nats.
    - ``rollout/response_length``, ``rollout/eos_rate``, ``rollout/repetition``: tokens a response,
      share that end by themselves, share of repeated n-grams.
    - ``win_rate``: share of prompts to which the policy answers better than the reference, by the
      sum of the rewards; ``win_rate/NAME`` by each reward and judge. Ties count half. Each has its
      95 % interval (:func:`lit_llm.evaluation.intervals.rate`) beside it: ``win_rate_low``,
      ``win_rate_high``, ``win_rate_low/NAME``, ``win_rate_high/NAME``. A reward that was trained
      on says how far PPO got; only a judge that was not says whether the answers got better.

    Args:
        rows: The responses; their order does not matter.

    Returns:
        The measures; nothing where there are no responses, no win rates without a reference.
    """
    if not rows:
        return {}
    names = list(rows[0].scores)
    measures = {
        "objective/scores": _mean([row.score for row in rows]),
        "objective/kl": _mean([row.kl for row in rows]),
        "rollout/response_length": _mean([row.length for row in rows]),
        "rollout/eos_rate": _mean([row.stopped for row in rows]),
        "rollout/repetition": _mean([row.repetition for row in rows]),
    }
    measures |= {f"scores/{name}": _mean([row.scores[name] for row in rows]) for name in names}
    compared = [row for row in rows if row.baseline is not None]
    if not compared:
        return measures
    prompts = torch.tensor([row.index for row in compared])
    for name in (None, *names):
        found = rate(torch.tensor([outcome(row, name) for row in compared]), prompts)
        suffix = "" if name is None else f"/{name}"
        measures[f"win_rate{suffix}"] = found.value
        measures[f"win_rate_low{suffix}"] = found.low
        measures[f"win_rate_high{suffix}"] = found.high
    return measures


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
