"""A metric over the iterations of PPO: its beginning, its end, and what of it is noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lit_llm.evaluation.ppo_limits import HealthLimits, History

ITERATION = "iteration"  # key of a row of the history that numbers it
# A level is told from so many iterations on, should the window be longer.
_FEWEST = 3


@dataclass(frozen=True)
class Stretch:
    """A metric over some successive iterations.

    Attributes:
        iterations: Their numbers, the first iteration of a run being 1.
        values: The metric in each of them, finite.
    """

    iterations: Sequence[int]
    values: Sequence[float]

    def __len__(self) -> int:
        """The number of iterations."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Mean over the iterations."""
        return sum(self.values) / len(self.values)

    @property
    def median(self) -> float:
        """Median over the iterations; unlike the mean it does not heed a single spike."""
        ordered = sorted(self.values)
        middle = len(ordered) // 2
        return (ordered[middle] + ordered[~middle]) / 2

    @property
    def when(self) -> str:
        """The iterations for people: ``iterations 3 to 7``."""
        first, last = self.iterations[0], self.iterations[-1]
        return f"iteration {first}" if first == last else f"iterations {first} to {last}"

    def part(self, start: int | None, stop: int | None = None) -> "Stretch":
        """A part of it, by places as in a slice."""
        return Stretch(self.iterations[start:stop], self.values[start:stop])


class Series(Stretch):
    """A metric over a whole run so far."""

    @property
    def noise(self) -> float:
        """Standard deviation of an iteration about the trend, in the units of the metric.

        From successive differences (von Neumann et al. 1941, "The mean square successive
        difference"), sqrt(Σ (x_{t+1} - x_t)² / 2 (n - 1)): a slow trend adds nearly nothing to it,
        a jump a little. The prompts of an iteration are others than those before, so its noise is
        its own.
        """
        pairs = zip(self.values[:-1], self.values[1:], strict=True)
        squares = [(after - before) ** 2 for before, after in pairs]
        return math.sqrt(sum(squares) / 2 / max(1, len(squares)))

    def rise(self, earlier: Stretch, later: Stretch) -> float:
        """How many standard errors the mean of ``later`` lies above that of ``earlier``.

        Args:
            earlier: A part of the series.
            later: Another, which shares no iteration with it.
        """
        gain = later.mean - earlier.mean
        error = self.noise * math.sqrt(1 / len(earlier) + 1 / len(later))
        if error == 0:
            return math.copysign(math.inf, gain) if gain else 0.0
        return gain / error


def series(history: History, name: str) -> Series | None:
    """Take one metric out of the history of a run.

    Args:
        history: The metrics of each iteration, in order. A row's number is its ``iteration``, and
            where it has none its place, from 1.
        name: The metric.

    Returns:
        Its finite values; ``None`` where the last iteration has none, so that nothing is said of
        what is over.
    """
    found = [
        (int(row.get(ITERATION, place)), float(row[name]))
        for place, row in enumerate(history, start=1)
        if math.isfinite(row.get(name, math.nan))
    ]
    if not found or not math.isfinite(history[-1].get(name, math.nan)):
        return None
    iterations, values = zip(*found, strict=True)
    return Series(iterations, values)


def level(history: History, name: str, limits: HealthLimits) -> Stretch | None:
    """The last window of a metric, or what there is of it from the third iteration on.

    Args:
        history: The metrics of each iteration.
        name: The metric.
        limits: Knows the window.
    """
    found = series(history, name)
    if found is None or len(found) < min(_FEWEST, limits.window):
        return None
    return found.part(-limits.window)


class Ends(NamedTuple):
    """How a metric began and how it is now.

    Attributes:
        first: Its first window.
        last: Its last window, which shares no iteration with the first.
        rise: By how many standard errors the last lies above the first.
    """

    first: Stretch
    last: Stretch
    rise: float


def ends(history: History, name: str, limits: HealthLimits) -> Ends | None:
    """Compare the end of a metric with its beginning.

    Args:
        history: The metrics of each iteration.
        name: The metric.
        limits: Knows the window.

    Returns:
        Both; ``None`` until there are two windows.
    """
    found = series(history, name)
    if found is None or len(found) < 2 * limits.window:
        return None
    first, last = found.part(0, limits.window), found.part(-limits.window)
    return Ends(first, last, found.rise(first, last))
