"""Whether two models differ on a number, by how much, and how sure that is."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lit_llm.evaluation.intervals import sign_test, student_p
from lit_llm.evaluation.results import (
    RESAMPLES,
    Better,
    Items,
    Measurement,
    Scale,
    resampled,
    scaled,
)

Verdict = Literal["better", "worse", "differs", "no certain difference", "not comparable"]

CERTAIN = 0.05  # the chance of one or more false claims in a whole report, after Holm's correction
_Z = 1.959964  # 95 % of a normal distribution lie within so many standard deviations
_ROUNDING = 1e-9  # a smaller difference, as a part of the numbers, is rounding
# Sums over the tokens or bytes of fixed text: an item of another size is another item.
_OF_TOKENS = ("perplexity", "token_nll")
_OF_TEXT = (*_OF_TOKENS, "bits_per_byte")


@dataclass(frozen=True)
class Change:
    """How a number of one model differs from that of another.

    Attributes:
        task: Name of the task.
        metric: Name of the metric.
        before: The number of the model compared with, over the items that both have.
        after: That of the other.
        difference: ``after - before``; of a metric with an ideal, how much farther from it.
        low: Lower end of the 95 % interval of the difference; NaN where there is none.
        high: Upper end.
        p_value: How probable so large a difference is where there is none; NaN where not known.
        adjusted: The same for the whole report (:func:`holm`).
        paired: Whether they were compared item by item.
        count: Items that were compared; of two sets the smaller one.
        better: Which direction is better.
        ideal: What the number should be near to.
        note: Why they cannot be compared.
    """

    task: str
    metric: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    p_value: float
    adjusted: float
    paired: bool
    count: int
    better: Better | None = "higher"
    ideal: float | None = None
    note: str | None = None

    def __str__(self) -> str:
        """Such as ``piqa acc: 0.610 → 0.650 (+0.040, 95 % interval +0.012 to +0.068)``."""
        before, after = (number(value, "", self.after) for value in (self.before, self.after))
        change, low, high = (
            number(value, "+", self.difference) for value in (self.difference, self.low, self.high)
        )
        distance = "" if self.ideal is None else f"distance to {self.ideal:g} "
        told = f"{self.task} {self.metric}: {before} → {after} ({distance}{change}"
        return f"{told}, 95 % interval {low} to {high})"

    @property
    def verdict(self) -> Verdict:
        """What can be said: a difference is certain where ``adjusted`` is below 0.05."""
        if self.note is not None:
            return "not comparable"
        if not self.adjusted < CERTAIN:
            return "no certain difference"
        if self.better is None:
            return "differs"
        return "better" if (self.difference > 0) == (self.better == "higher") else "worse"


@dataclass(frozen=True)
class ModelChanges:
    """All that changed from one model to another, by their names."""

    before: str
    after: str
    changes: list[Change]

    def having(self, *verdicts: Verdict) -> list[Change]:
        """The changes of these verdicts."""
        return [change for change in self.changes if change.verdict in verdicts]


def number(value: float, sign: str = "", like: float | None = None) -> str:
    """A number for people: three decimals, more of a small one, fewer of a large one.

    Args:
        value: The number.
        sign: "+" to give a sign to positive numbers too.
        like: A number to give as many decimals as; by default the number itself.
    """
    if not math.isfinite(value):
        return "-" if math.isnan(value) else f"{value:{sign}}"
    size = abs(value if like is None or not math.isfinite(like) else like)
    if max(size, abs(value)) >= 1e6 or 0 < size < 5e-5:
        return f"{value:{sign}.2e}"
    return (
        f"{value:{sign},.{4 if 0 < size < 0.01 else 3 if size < 10 else 2 if size < 100 else 1}f}"
    )


def regressions(comparisons: Sequence[ModelChanges]) -> list[str]:
    """What certainly got worse or was lost, a sentence each; that nothing was, where nothing was.

    Args:
        comparisons: Those of a report, corrected by :func:`holm`.
    """
    found = []
    for one in comparisons:
        worse = one.having("worse")
        found += [f"{one.after} is worse than {one.before} on {change}" for change in worse]
        finite = [change for change in one.changes if math.isfinite(change.before)]
        lost = [f"{own.task} {own.metric}" for own in finite if not math.isfinite(own.after)]
        if lost:  # no test can tell, but it has diverged
            found.append(
                f"{one.after} has no finite value where {one.before} has: {', '.join(lost)}"
            )
        elif not worse:
            told = f"{one.after} is not certainly worse than {one.before} on any number"
            compared = len(one.changes) - len(one.having("not comparable"))
            found.append(f"{told}, of {compared} compared")
    return [f"{sentence}." for sentence in found]


def compare(before: Measurement, after: Measurement) -> Change:
    """Compare a number of two models.

    Where at least half of the items are shared, over these: the interval is a percentile bootstrap
    that draws the same items for both; the p-value is McNemar's exact one (1947,
    https://doi.org/10.1007/BF02295996) where every item is right or wrong, else a paired t-test of
    what each item adds to the difference (of a ratio its linear part). It is never below 2^(1-n)
    for n items, the least that swapping the models item by item can give. Otherwise, the two
    intervals give that of the difference (Zou and Donner 2008, https://doi.org/10.1002/sim.3095;
    of shares Newcombe's) and the p-value.

    Args:
        before: That of the model compared with.
        after: That of the other, of the same task and metric.

    Returns:
        The change, its ``adjusted`` as of a single comparison.
    """
    ideal = after.ideal if after.better == "ideal" else None
    shared = _shared(before, after)
    note = _obstacle(before, after, shared is not None)
    if note is None and shared is not None:
        first, second = (_number(items, after.scale) for items in shared)
        low, high = _bootstrap(*shared, after.scale, ideal)
        p_value = _paired_p(*shared, after.scale, ideal)
        count = len(shared[0])
    else:
        first, second = before.value, after.value
        low, high, p_value = _unpaired(before, after, ideal)
        count = min(before.count, after.count)
    if note is not None:
        low = high = p_value = math.nan
    paired = note is None and shared is not None
    mine, its = (one if ideal is None else abs(one - ideal) for one in (first, second))
    numbers = (first, second, its - mine, low, high)
    test = (p_value, p_value, paired, count)
    return Change(after.task, after.metric, *numbers, *test, after.better, ideal, note)


def compare_with(value: float, measured: Measurement) -> Change:
    """Compare a number with a constant, such as a win rate with one half.

    Args:
        value: The constant.
        measured: The number.
    """
    items = measured.items
    constant = items and Items(
        items.keys, [value * one for one in items.denominators], items.denominators
    )
    exact = replace(measured, value=value, low=value, high=value, items=constant)
    return compare(exact, measured)


def holm(changes: Sequence[Change]) -> list[Change]:
    """Correct p-values for their number (Holm 1979, https://www.jstor.org/stable/4615733).

    Of many differences some look certain by chance alone. With corrected p-values, the probability
    that one or more of all claims below 0.05 are false is at most 0.05, however the numbers depend
    on each other.

    Args:
        changes: All comparisons of a report; those without a p-value do not count.
    """
    known = [n for n, change in enumerate(changes) if not math.isnan(change.p_value)]
    known.sort(key=lambda n: changes[n].p_value)
    found, least = list(changes), 0.0
    for rank, n in enumerate(known):
        least = max(least, min(1.0, (len(known) - rank) * changes[n].p_value))
        found[n] = replace(changes[n], adjusted=least)
    return found


def _shared(before: Measurement, after: Measurement) -> tuple[Items, Items] | None:
    """The items of both in the same order; None where they share less than half."""
    if before.items is None or after.items is None:
        return None
    places = {key: n for n, key in enumerate(_occurrences(before.items.keys))}
    matched = [
        (places[key], n) for n, key in enumerate(_occurrences(after.items.keys)) if key in places
    ]
    if len(matched) < 2 or 2 * len(matched) < min(len(before.items), len(after.items)):
        return None
    first = before.items.chosen([mine for mine, _ in matched])
    second = after.items.chosen([its for _, its in matched])
    if after.metric in _OF_TEXT and first.denominators != second.denominators:
        return None
    return (first, second) if sum(first.denominators) and sum(second.denominators) else None


def _occurrences(keys: Sequence[str]) -> list[tuple[str, int]]:
    """Keys with how often each has come before: a task may hold the same item twice."""
    seen: dict[str, Iterator[int]] = defaultdict(itertools.count)
    return [(key, next(seen[key])) for key in keys]


def _obstacle(before: Measurement, after: Measurement, paired: bool) -> str | None:
    sums = [sum(one.items.numerators) if one.items else one.value for one in (before, after)]
    if not math.isfinite(sum(sums) + before.value + after.value):
        return "one of the two has no finite value"
    if paired:
        return None
    both = [round(sum(one.items.denominators)) for one in (before, after) if one.items]
    if after.metric in _OF_TOKENS and len(set(both)) == 2:
        told = f"they cut the text into other tokens ({both[0]:,} and {both[1]:,})"
        return f"{told}: compare bits_per_byte"
    if any(math.isnan(end) for one in (before, after) for end in (one.low, one.high)):
        return "one of the two has no interval"
    return None


def _number(items: Items, scale: Scale) -> float:
    return scaled(sum(items.numerators) / sum(items.denominators), scale)


def _sides(first: float, second: float, ideal: float | None) -> tuple[int, int]:
    """On which side of the ideal each lies: a distance is this times (value - ideal)."""
    if ideal is None:
        return 1, 1
    mine, its = (int(np.sign(value - ideal)) for value in (first, second))
    return mine or its or 1, its or mine or 1


def _bootstrap(
    before: Items, after: Items, scale: Scale, ideal: float | None
) -> tuple[float, float]:
    gains = _gains(before, after, scale)
    if gains is not None and ideal is None:  # the same, much faster
        ups, downs, count = (gains > 0).sum(), (gains < 0).sum(), len(gains)
        shares = np.array([ups, downs, count - ups - downs]) / count
        draws = np.random.default_rng(0).multinomial(count, shares, RESAMPLES)
        first, second = draws[:, 1] / count, draws[:, 0] / count
    else:
        first, second = resampled(before, scale), resampled(after, scale)
    if ideal is not None:
        first, second = np.abs(first - ideal), np.abs(second - ideal)
    with np.errstate(invalid="ignore"):
        differences = second - first
    finite = differences[np.isfinite(differences)]  # items without tokens have no number
    low, high = np.quantile(finite, (0.025, 0.975)) if len(finite) else (math.nan, math.nan)
    return float(low), float(high)


def _paired_p(before: Items, after: Items, scale: Scale, ideal: float | None) -> float:
    count = len(before)
    # The mean of logarithms for "exp": both are equal where these are, and they are nearer normal.
    first, second = (_number(items, "mean") for items in (before, after))
    mine, its = _sides(first, second, ideal)
    gains = _gains(before, after, scale)
    if mine == its and gains is not None:
        return sign_test(int((gains > 0).sum()), int((gains < 0).sum()))
    centre = ideal or 0.0
    difference = its * (second - centre) - mine * (first - centre)
    if abs(difference) <= _ROUNDING * max(1.0, abs(first), abs(second)):
        return 1.0
    parts = its * _influence(after, second) - mine * _influence(before, first)
    error = float(parts.std(ddof=1)) / math.sqrt(count)
    p_value = student_p(difference / error, count - 1) if error > 0 else 0.0
    return max(p_value, 2.0 ** max(1 - count, -1000))


def _gains(before: Items, after: Items, scale: Scale) -> np.ndarray | None:
    """After less before of items that are right or wrong, (N,); None of other items."""
    ones, values = (before.denominators, after.denominators), (before.numerators, after.numerators)
    plain = set().union(*ones) == {1} and set().union(*values) <= {0, 1} and scale == "mean"
    return np.asarray(values[1]) - np.asarray(values[0]) if plain else None


def _influence(items: Items, ratio: float) -> np.ndarray:
    """What each item adds to a ratio of sums, to first order, (N,)."""
    above, below = np.asarray(items.numerators), np.asarray(items.denominators)
    return (above - ratio * below) / below.mean()


def _unpaired(
    before: Measurement, after: Measurement, ideal: float | None
) -> tuple[float, float, float]:
    """Interval and p-value of the difference of two numbers over different items."""
    ends, centre = [], ideal or 0.0
    for one, side in zip((before, after), _sides(before.value, after.value, ideal), strict=True):
        low, high = sorted((side * (one.low - centre), side * (one.high - centre)))
        ends.append((low, side * (one.value - centre), high))
    (low0, first, high0), (low1, second, high1) = ends
    difference = second - first
    down, up = math.hypot(second - low1, high0 - first), math.hypot(high1 - second, first - low0)
    # The side towards 0: the p-value is below 0.05 exactly where the interval leaves 0 out.
    reach = down if difference > 0 else up
    p_value = math.nan
    if not math.isnan(reach):
        p_value = math.erfc(abs(difference) * _Z / reach / math.sqrt(2)) if reach > 0 else 1.0
    return difference - down, difference + up, p_value
