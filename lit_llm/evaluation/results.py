"""What an evaluation leaves behind: numbers with intervals, the items behind them, answers.

A number is kept with what each item of its task gave, so that two models are compared item by item,
and so that it can be looked into.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lit_llm.evaluation.intervals import wilson_interval

Better = Literal["higher", "lower", "ideal"]
Scale = Literal["mean", "exp"]

RESAMPLES = 2_000
_LARGEST = 700.0  # of what exp still has a number for
_CHUNK = 200  # resamples at once: a task of some thousand items stays within a few megabytes


@dataclass(frozen=True)
class Items:
    """What each item of a task gave: the number is f(sum of numerators / sum of denominators).

    Attributes:
        keys: What names an item, the same for every model.
        numerators: Such as 1 for a right answer, or the negative log-likelihood of a document.
        denominators: Such as 1, or the tokens of that document.
        subsets: The part of the task that each belongs to, such as a subject; empty without parts.
    """

    keys: list[str]
    numerators: list[float]
    denominators: list[float]
    subsets: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def chosen(self, numbers: Sequence[int]) -> Items:
        """The items of these numbers, in this order."""
        return Items(
            [self.keys[number] for number in numbers],
            [self.numerators[number] for number in numbers],
            [self.denominators[number] for number in numbers],
            [self.subsets[number] for number in numbers] if self.subsets else [],
        )


@dataclass(frozen=True)
class Measurement:
    """One number of one model on one task.

    Attributes:
        task: Name of the task.
        metric: Name of the metric.
        value: The number; NaN where nothing could be measured.
        low: Lower end of its 95 % interval; NaN where it has none.
        high: Upper end.
        count: Items it was measured on.
        better: Which direction is better; ``None`` for a number that only describes.
        ideal: What the number should be near to, where ``better`` is "ideal".
        chance: What guessing gives, where that is known.
        scale: "exp" where the number is the exponential of the items' mean, as perplexity is.
        items: What each item gave; ``None`` where the metric is no mean over items.
    """

    task: str
    metric: str
    value: float
    low: float
    high: float
    count: int
    better: Better | None = "higher"
    ideal: float | None = None
    chance: float | None = None
    scale: Scale = "mean"
    items: Items | None = None


@dataclass(frozen=True)
class Answer:
    """What a model answered to one item.

    Attributes:
        task: Name of the task.
        item: What names the item, the same for every model.
        prompt: What the model was given, as text.
        answer: What it answered; of a choice the one it found most likely.
        reference: The right answer, where there is one.
        scores: What the task's metrics gave.
        generated: Whether the model wrote it; otherwise it was one of several given.
        stopped: Whether a written answer ended by itself; ``None`` where that is not known.
    """

    task: str
    item: str
    prompt: str
    answer: str
    reference: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    generated: bool = True
    stopped: bool | None = None


@dataclass(frozen=True)
class TaskResult:
    """What one model gave on one task.

    Attributes:
        task: Name of the task.
        category: What it looks at: perplexity, reasoning, facts, safety, coherence, python, other.
        measurements: Its numbers, the one that matters most first.
        answers: What was answered.
        skipped: Why it was not run; ``None`` where it was.
        settings: How it was run: examples in the prompt, limit, where its data came from.
        seconds: How long it took.
    """

    task: str
    category: str
    measurements: list[Measurement] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    skipped: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class ModelResults:
    """What one model gave on all tasks.

    Attributes:
        name: Name in the report.
        source: Folder, or name on the Hub.
        tasks: One result a task, in the order they were run.
        about: What is to be known of the model: parameters, context, data type.
    """

    name: str
    source: str
    tasks: list[TaskResult] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)


def measure(
    task: str,
    metric: str,
    items: Items,
    *,
    better: Better | None = "higher",
    ideal: float | None = None,
    chance: float | None = None,
    scale: Scale = "mean",
) -> Measurement:
    """A number with its 95 % interval from what each item gave.

    Shares of right items have Wilson's interval, which holds where all or none are right; all else
    a percentile bootstrap over items (Efron and Tibshirani, "An Introduction to the Bootstrap",
    1993, chapter 13) of 2,000 resamples from a fixed seed.

    Args:
        task: Name of the task.
        metric: Name of the metric.
        items: What each item gave; the sum of denominators must be above 0.
        better: Which direction is better.
        ideal: What the number should be near to, where ``better`` is "ideal".
        chance: What guessing gives.
        scale: "exp" for the exponential of the mean, as perplexity is.
    """
    value = scaled(sum(items.numerators) / sum(items.denominators), scale)
    low = high = math.nan
    # A number whose ideal is 0 may lie on either side of it.
    if scale == "mean" and ideal != 0 and _is_share(items):
        low, high = wilson_interval(value, len(items))
    # A model that has diverged has no interval: draws without that item would give one.
    elif len(items) > 1 and not math.isnan(value):
        # A resample of items without tokens has no number.
        found = [v for v in resampled(items, scale) if not math.isnan(v)]
        low, high = (float(q) for q in np.quantile(found, (0.025, 0.975)))
    return Measurement(
        task, metric, value, low, high, len(items), better, ideal, chance, scale, items
    )


def resampled(items: Items, scale: Scale = "mean", seed: int = 0) -> np.ndarray:
    """The number in each of 2,000 resamples of the items, (2000,).

    The same seed and number of items draw the same items, so that the difference of two models'
    numbers over the same items is a paired bootstrap.

    Args:
        items: What each item gave.
        scale: As for :func:`measure`.
        seed: Seed of the draws.
    """
    generator = np.random.default_rng(seed)
    above, below = np.asarray(items.numerators), np.asarray(items.denominators)
    values = []
    for _ in range(RESAMPLES // _CHUNK):
        drawn = generator.integers(len(items), size=(_CHUNK, len(items)))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratio = above[drawn].sum(1) / below[drawn].sum(1)
            values.append(np.exp(np.minimum(ratio, _LARGEST)) if scale == "exp" else ratio)
    return np.concatenate(values)


def results_to_dict(results: ModelResults | TaskResult) -> dict[str, Any]:
    """Plain data that JSON can hold."""
    return dataclasses.asdict(results)


def task_from_dict(data: dict[str, Any]) -> TaskResult:
    """A task's result, read back from :func:`results_to_dict`; null stands for NaN."""

    def numbers(values: dict[str, Any]) -> dict[str, Any]:
        return {name: math.nan if own is None else own for name, own in values.items()}

    measurements = []
    for own in data["measurements"]:
        items = own["items"] and Items(**own["items"])
        if items is not None:
            above = [math.nan if one is None else one for one in items.numerators]
            items = dataclasses.replace(items, numerators=above)
        told = numbers({name: own[name] for name in ("value", "low", "high")})
        measurements.append(Measurement(**{**own, **told, "items": items}))
    answers = [Answer(**{**own, "scores": numbers(own["scores"])}) for own in data["answers"]]
    return TaskResult(**{**data, "measurements": measurements, "answers": answers})


def scaled(mean: float, scale: Scale) -> float:
    """A number from its items' mean: for "exp" the exponential, as long as there is one."""
    return math.exp(min(mean, _LARGEST)) if scale == "exp" else mean


def _is_share(items: Items) -> bool:
    plain = all(value == 1 for value in items.denominators)
    return plain and all(value in (0, 0.5, 1) for value in items.numerators)
