"""The numbers of several models side by side, as tables and as plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from lit_llm.evaluation.comparison import Change, ModelChanges, number
from lit_llm.evaluation.evaluation_page import Block, Cell, Figure, Fold, Section, Table
from lit_llm.evaluation.results import Measurement, ModelResults, measure

if TYPE_CHECKING:
    from lit_llm.evaluation.win_rate import WinRate

_TICKS = 5
_ITEMS_A_PART = 4  # on average; of fewer a number by parts says nothing
_LOG_FROM = 20  # a larger ratio of the largest number to the smallest is drawn on a log axis


@dataclass(frozen=True)
class Line:
    """One number of one task, of all models.

    Attributes:
        category: What the task looks at.
        task: Name of the task.
        metric: Name of the metric.
        main: Whether it is the task's first one.
        values: What each model gave; ``None`` where it has none.
    """

    category: str
    task: str
    metric: str
    main: bool
    values: list[Measurement | None]

    @property
    def first(self) -> Measurement:
        """The first there is, for what is the same for all models."""
        return next(one for one in self.values if one is not None)


@dataclass(frozen=True)
class Mark:
    """One model's number in a row; places are percent of the axis.

    Attributes:
        model: Number of the model, from 0.
        at: Where its number lies.
        low: Where its interval begins; ``None`` without one.
        high: Where it ends.
        told: The number and interval in words.
    """

    model: int
    at: float
    low: float | None
    high: float | None
    told: str


@dataclass(frozen=True)
class Row:
    """The marks of one line, and where chance lies; percent of the axis."""

    label: str
    detail: str
    marks: list[Mark]
    chance: float | None


@dataclass(frozen=True)
class Panel:
    """Rows that share an axis.

    Attributes:
        title: What the axis shows, and which direction is better.
        ticks: Place in percent and label of each tick.
        rows: The rows.
    """

    title: str
    ticks: list[tuple[float, str]]
    rows: list[Row]


def side_by_side(models: Sequence[ModelResults]) -> list[Line]:
    """All numbers of all models, in the order in which tasks and metrics first come up.

    Args:
        models: Their results.
    """
    found: dict[tuple[str, str], list[Measurement | None]] = {}
    tasks: dict[str, tuple[str, str]] = {}
    for place, model in enumerate(models):
        for task in model.tasks:
            for one in task.measurements:
                tasks.setdefault(task.task, (task.category, one.metric))
                row = found.setdefault((task.task, one.metric), [None] * len(models))
                row[place] = one
    order = list(tasks)
    return [
        Line(tasks[task][0], task, metric, tasks[task][1] == metric, values)
        for (task, metric), values in sorted(found.items(), key=lambda one: order.index(one[0][0]))
    ]


def number_sections(
    models: Sequence[ModelResults], comparisons: Sequence[ModelChanges], stages: bool
) -> list[Section]:
    """A summary of the first number of each task, and all numbers by category.

    Args:
        models: Their results.
        comparisons: One for each model after the first, in order; others may follow.
        stages: Whether each was compared with the one before it, not with the first.
    """
    lines = side_by_side(models)
    changes = [{(c.task, c.metric): c for c in one.changes} for one in comparisons]
    names = [model.name for model in models]
    heads = [f"{names[0]} (baseline)" if len(names) > 1 and not stages else names[0]]
    for before, name in pairwise(names):
        heads.append(f"{name} (against {before})" if stages else name)

    def table(chosen: list[Line]) -> Table:
        rows = []
        for line in chosen:
            first = line.first
            told = [direction(first)] if first.better else []
            told += [] if first.chance is None else [f"chance {number(first.chance)}"]
            row = [Cell(f"{line.task} {line.metric}", ", ".join(told))]
            for place, one in enumerate(line.values):
                change = changes[place - 1].get((line.task, line.metric)) if place else None
                row.append(reading(one, change))
            rows.append(row)
        return Table(["number", *heads], rows)

    if not lines:
        return []
    sections = [Section("Summary", [table([line for line in lines if line.main])])]
    for category in dict.fromkeys(line.category for line in lines):
        own = [line for line in lines if line.category == category]
        panels = panels_of(own)
        chance = any(row.chance is not None for panel in panels for row in panel.rows)
        blocks: list[Block] = [Figure(panels, names, chance)] if panels else []
        blocks += [table(own), *(fold for line in own for fold in _parts(line, names))]
        sections.append(Section(category.capitalize(), blocks))
    return sections


def reading(one: Measurement | None, change: Change | None = None) -> Cell:
    """A number as a cell of a table.

    Args:
        one: The number, where there is one.
        change: How it differs from another model's.
    """
    if one is None:
        return Cell("-")
    known = math.isfinite(one.low) and math.isfinite(one.high)
    ends = [number(end, "", one.value) for end in (one.low, one.high)]
    interval = " to ".join(ends) if known else ""
    if change is None:
        return Cell(number(one.value), interval)
    if change.note is not None:
        return Cell(number(one.value), interval, "", "not comparable")
    certain = change.verdict if change.verdict in ("better", "worse", "differs") else ""
    return Cell(number(one.value), interval, certain, number(change.difference, "+"))


def win_panels(names: list[str], win_rates: Sequence[WinRate]) -> Figure:
    """A plot of win rates.

    Args:
        names: Names of the models.
        win_rates: What a judge says of their answers.
    """
    lines = []
    several = len({rate.judge for rate in win_rates}) > 1
    for rate in win_rates:
        judge = f", judge {rate.judge}" if several else ""
        for own, told in ((rate.measurement, ""), (rate.length_controlled, " at equal length")):
            values = [own if name == rate.second else None for name in names]
            if any(values):
                label = f"{rate.second} against {rate.first}{told}{judge}"
                lines.append(Line("", label, "", True, values))
    return Figure(panels_of(lines), names, chance=True)


def _parts(line: Line, names: list[str]) -> list[Block]:
    """A number by the parts of its task, such as subjects."""
    found: dict[str, list[Measurement | None]] = {}
    for place, one in enumerate(line.values):
        items = one.items if one else None
        if one is None or items is None:
            continue
        for part in dict.fromkeys(items.subsets):
            own = items.chosen([n for n, name in enumerate(items.subsets) if name == part])
            if sum(own.denominators) > 0:
                row = found.setdefault(part, [None] * len(names))
                row[place] = measure(part, one.metric, own, scale=one.scale)
    counts = [max(one.count for one in values if one) for values in found.values()]
    if len(found) < 2 or sum(counts) < _ITEMS_A_PART * len(counts):
        return []
    rows = [
        [Cell(part), Cell(f"{max(v.count for v in values if v):,}"), *map(reading, values)]
        for part, values in sorted(found.items())
    ]
    title = f"{line.task} {line.metric} by part ({len(rows)})"
    return [Fold(title, [Table(["part", "items", *names], rows)])]


def panels_of(lines: Sequence[Line]) -> list[Panel]:
    """Plots of the lines: shares on an axis from 0 to 1, each other metric on one of its own.

    Lines without a direction only describe, and are left out.

    Args:
        lines: Those of one category.
    """
    groups: dict[str, list[Line]] = {}
    for line in lines:
        drawn = [one for one in line.values if one and math.isfinite(one.value)]
        if drawn and drawn[0].better is not None:
            share = line.category != "perplexity" and all(
                0 <= end <= 1 for one in drawn for end in _ends(one)
            )
            groups.setdefault("share" if share else line.metric, []).append(line)
    return [_panel(name, own) for name, own in groups.items()]


def direction(measured: Measurement) -> str:
    """Which direction is better, in words; nothing for a number that only describes."""
    if measured.better == "ideal" and measured.ideal is not None:
        return f"nearer to {measured.ideal:g} is better"
    return f"{measured.better} is better" if measured.better else ""


def _ends(measured: Measurement) -> list[float]:
    ends = (measured.value, measured.low, measured.high)
    return [end for end in ends if math.isfinite(end)]


def _panel(name: str, lines: list[Line]) -> Panel:
    axis = _Axis.share() if name == "share" else _Axis.over(lines)
    title = (
        "shares, higher is better" if name == "share" else f"{name} ({direction(lines[0].first)})"
    )
    if axis.log:
        title += ", logarithmic axis"
    rows = []
    for line in lines:
        chance = line.first.chance if line.first.chance is not None else line.first.ideal
        marks = []
        for model, one in enumerate(line.values):
            if one is None or not math.isfinite(one.value):
                continue
            known = math.isfinite(one.low) and math.isfinite(one.high)
            low, high = (axis.place(end) if known else None for end in (one.low, one.high))
            cell = reading(one)
            told = f"{cell.text} ({cell.detail})" if cell.detail else cell.text
            marks.append(Mark(model, axis.place(one.value), low, high, told))
        odd = name == "share" and line.first.better != "higher"
        rows.append(
            Row(
                line.task if line.metric == name else f"{line.task} {line.metric}".strip(),
                direction(line.first) if odd else "",
                marks,
                None if chance is None or not axis.holds(chance) else axis.place(chance),
            )
        )
    return Panel(title, [(axis.place(at), f"{at:g}") for at in axis.ticks()], rows)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool = False

    @classmethod
    def share(cls) -> _Axis:
        return cls(0.0, 1.0)

    @classmethod
    def over(cls, lines: list[Line]) -> _Axis:
        ends = [end for line in lines for one in line.values if one for end in _ends(one)]
        low, high = min(ends), max(ends)
        if low > 0 and high / low > _LOG_FROM:
            return cls(low / 1.2, high * 1.2, log=True)
        pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(low - pad, high + pad)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def place(self, value: float) -> float:
        """Percent of the axis, to a hundredth: enough for any screen, and short."""
        ends = (self.low, value, self.high)
        low, at, high = (math.log(end) for end in ends) if self.log else ends
        return round(100 * (at - low) / (high - low), 2)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [step * 10.0**n for n in range(first, last + 1) for step in steps]
                found = [at for at in found if self.holds(at)]
                if len(found) <= _TICKS + 1:
                    return found
            return found[:: len(found) // _TICKS + 1]
        raw = (self.high - self.low) / _TICKS
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * one for one in (1, 2, 2.5, 5, 10) if power * one >= raw * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(n * step, 12) for n in range(first, last + 1)]
