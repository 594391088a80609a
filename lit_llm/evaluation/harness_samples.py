"""From what the harness logs of each item to numbers with intervals, and answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_llm.evaluation.results import Answer, Items, Measurement, Scale, measure
from lit_llm.evaluation.suites import EvaluationTask, Metric

if TYPE_CHECKING:
    from lm_eval.api.task import Task

_RESAMPLES = 100  # of a number that is no mean: some take long to compute
_KEY_DIGITS = 16


@dataclass(frozen=True)
class Run:
    """What the harness gave for a task.

    Attributes:
        task: The task.
        parts: The harness's tasks by name: several where a group of the library was run.
        samples: What it logged of each item, by the same names; once for each of its filters.
        stopped: Whether each written answer ended by itself, in the order of the requests.
    """

    task: EvaluationTask
    parts: dict[str, Task]
    samples: dict[str, list[dict[str, Any]]]
    stopped: Sequence[bool] | None = None

    def items(self) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
        """Part, key and samples of each item (one a filter), in order; keys are unique."""
        seen: Counter[str] = Counter()
        for name in self.parts:
            filtered: dict[int, list[dict[str, Any]]] = {}
            for sample in self.samples[name]:
                filtered.setdefault(sample["doc_id"], []).append(sample)
            for own in filtered.values():
                key = own[0]["doc_hash"][:_KEY_DIGITS]
                seen[key] += 1
                # Some files hold an item twice.
                yield name, key if seen[key] == 1 else f"{key}-{seen[key]}", own


def without_numbers(run: Run) -> int:
    """Items with a log-likelihood that is not a number.

    The harness takes the first choice of such an item, which is the right one of many a task.
    """
    return sum(
        any(
            isinstance(reply, tuple | list) and math.isnan(reply[0])
            for replies in samples[0]["resps"]
            for reply in replies
        )
        for _, _, samples in run.items()
    )


# ----- numbers ----------------------------------------------------------------------------------


def measurements_of(run: Run) -> list[Measurement]:
    """The task's numbers, in the order in which they matter."""
    values: dict[str, list[tuple[str, str, Any]]] = {}
    sources: dict[str, tuple[str, str]] = {}
    for part, key, samples in run.items():
        subset = part if len(run.parts) > 1 else str(samples[0]["doc"].get("subset") or "")
        for sample in samples:
            for metric in sample["metrics"]:
                name = _metric_name(metric, sample["filter"])
                values.setdefault(name, []).append((key, subset, sample[metric]))
                sources.setdefault(name, (part, metric))
    listed = [metric.name for metric in run.task.metrics]
    order = sorted(values, key=lambda name: listed.index(name) if name in listed else len(listed))
    return [_measurement(run, name, values[name], *sources[name]) for name in order]


def _metric_name(metric: str, filter_name: str) -> str:
    name = metric if filter_name == "none" else f"{metric}_{filter_name}"
    return name.replace("-", "_").replace(" ", "_")


def _measurement(
    run: Run, name: str, values: list[tuple[str, str, Any]], part: str, metric: str
) -> Measurement:
    about = next((own for own in run.task.metrics if own.name == name), None)
    if about is None:
        higher = run.parts[part].higher_is_better().get(metric, True)
        about = Metric(name, None if higher is None else "higher" if higher else "lower")
    aggregate = run.parts[part].aggregation().get(metric)
    items, scale = _as_items(values, aggregate)
    if items is not None:
        return measure(
            run.task.name,
            name,
            items,
            better=about.better,
            ideal=about.ideal,
            chance=about.chance,
            scale=scale,
        )
    raw = [value for _, _, value in values]
    return Measurement(
        run.task.name,
        name,
        *_with_interval(raw, aggregate),
        len(raw),
        about.better,
        about.ideal,
        about.chance,
    )


def _as_items(
    values: list[tuple[str, str, Any]], aggregate: Callable[[list[Any]], float] | None
) -> tuple[Items | None, Scale]:
    """The items whose mean, or whose mean's exponential, the harness's aggregation is."""
    from lm_eval.api import metrics as known

    keys, subsets = [key for key, _, _ in values], [subset for _, subset, _ in values]
    raw = [value for _, _, value in values]
    scale: Scale = "mean"
    try:
        if aggregate is None or aggregate in (known.mean, known.nanmean):
            above, below = [float(value) for value in raw], [1.0] * len(raw)
        elif aggregate is known.perplexity:
            above, below, scale = [-float(value) for value in raw], [1.0] * len(raw), "exp"
        elif aggregate is known.weighted_perplexity:
            above, below = [-float(log) for log, _ in raw], [float(size) for _, size in raw]
            scale = "exp"
        elif aggregate is known.bits_per_byte:
            above = [-float(log) / math.log(2) for log, _ in raw]
            below = [float(size) for _, size in raw]
        else:
            return None, "mean"
    except (TypeError, ValueError):
        return None, "mean"
    return Items(keys, above, below, subsets if any(subsets) else []), scale


def _with_interval(
    raw: list[Any], aggregate: Callable[[list[Any]], float] | None
) -> tuple[float, float, float]:
    """A number that is no mean over items, with the interval of a bootstrap over them."""
    if aggregate is None:
        return math.nan, math.nan, math.nan
    generator = np.random.default_rng(0)
    found = []
    for _ in range(_RESAMPLES if len(raw) > 1 else 0):
        drawn = generator.integers(len(raw), size=len(raw))
        found.append(float(aggregate([raw[number] for number in drawn])))
    low, high = np.quantile(found, (0.025, 0.975)) if found else (math.nan, math.nan)
    return float(aggregate(raw)), float(low), float(high)


# ----- answers ----------------------------------------------------------------------------------


def answers_of(run: Run) -> list[Answer]:
    """What was answered to each item, with all its scores."""
    stopped = _stopped(run)
    unjudged = any(metric.name == "pct_stereotype" for metric in run.task.metrics)
    answers = []
    for place, (part, key, samples) in enumerate(run.items()):
        scores = {
            _metric_name(metric, sample["filter"]): float(sample[metric])
            for sample in samples
            for metric in sample["metrics"]
            if isinstance(sample[metric], int | float | np.number)
        }
        generated = run.parts[part].OUTPUT_TYPE == "generate_until"
        answers.append(
            Answer(
                task=run.task.name,
                item=key,
                prompt=_text(samples[0]["arguments"][0][0]),
                answer=_answer(samples[0], run.task.choices_per_answer),
                reference=_reference(run.parts[part], samples[0], unjudged=unjudged),
                scores=scores,
                generated=generated,
                stopped=stopped[place] if generated and stopped else None,
            )
        )
    return answers


def _stopped(run: Run) -> Sequence[bool] | None:
    """Known where each item is one request: the harness asks in the order of the items."""
    kinds = {part.OUTPUT_TYPE for part in run.parts.values()}
    known = run.stopped if kinds == {"generate_until"} else None
    return known if known and len(known) == sum(1 for _ in run.items()) else None


def _answer(sample: dict[str, Any], choices_per_answer: int) -> str:
    """What was written, or the likeliest of each set of choices."""
    replies = [replies[0] for replies in sample["resps"]]
    if isinstance(replies[0], str):
        return replies[0]
    if not isinstance(replies[0], tuple | list):
        return ""  # a log-likelihood of a whole text
    texts = [_text(arguments[1]).strip() for arguments in sample["arguments"]]
    # Mutual information asks for each choice once more, without the question.
    count = len(texts) // (2 if "acc_mutual_info" in sample["metrics"] else 1)
    size = choices_per_answer or count
    chosen = []
    for start in range(0, count, size):
        logs = [reply[0] for reply in replies[start : start + size]]
        chosen.append(texts[start + logs.index(max(logs))])
    return "\n".join(chosen)


def _reference(part: Task, sample: dict[str, Any], *, unjudged: bool) -> str | None:
    if unjudged:
        return None  # of two sentences neither is the right one
    target = sample["target"]
    if isinstance(target, list):
        return " | ".join(map(str, target))
    if isinstance(target, int) and part.get_config("doc_to_choice") is not None:
        choices = part.doc_to_choice(sample["doc"])
        return str(choices[target]) if 0 <= target < len(choices) else None
    return None if target is None else str(target)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)
