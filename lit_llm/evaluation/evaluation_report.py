"""The report of an evaluation: several models side by side, what is certain, and what they said."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llm.errors import UserError
from lit_llm.evaluation.comparison import (
    ModelChanges,
    compare,
    compare_with,
    holm,
    number,
    regressions,
)
from lit_llm.evaluation.evaluation_page import (
    Block,
    Cell,
    Command,
    Fold,
    Prose,
    Reply,
    Sample,
    Section,
    Table,
    html_page,
    markdown_page,
)
from lit_llm.evaluation.evaluation_plots import number_sections, reading, side_by_side, win_panels
from lit_llm.evaluation.evaluation_verdict import by_pair, counted, verdict
from lit_llm.evaluation.results import Answer, Measurement, ModelResults, TaskResult
from lit_llm.strategies.checkpoint_io import write_text

if TYPE_CHECKING:
    from lit_llm.evaluation.win_rate import WinRate

_SAMPLES = 4  # of a task whose answers are written
_CHOSEN_SAMPLES = 2  # of one whose answers are given, which say less
_READING = [
    "In brackets or below a number: its 95 % interval. Shares of right items have Wilson's, other "
    "numbers a bootstrap over items.",
    "Better, worse, differs: certain after Holm's correction over all comparisons of this report. "
    "The probability that one or more of these claims are false is at most 5 %. Other differences "
    "may be chance, even where the interval of a single one leaves 0 out.",
    "Models are compared item by item: McNemar's exact test where every item is right or wrong, "
    "else a paired t-test. Where they do not share items, their two intervals are compared.",
    "Of a number with an ideal, such as 0.5, what counts is the distance to it.",
    "Chance: what guessing gives. A number whose interval holds it shows no ability.",
]


def write_report(
    folder: Path,
    models: list[ModelResults],
    *,
    win_rates: Sequence[WinRate] = (),
    command: str,
    title: str = "Evaluation",
    stages: bool = False,
) -> Path:
    """Write ``evaluation.md``, ``evaluation.html`` and ``evaluation.json``, each whole or not.

    Args:
        folder: Where to write them.
        models: The results of each; the first is the one that the others are compared with.
        win_rates: What a judge says of their answers.
        command: How to do this again.
        title: Title of the page.
        stages: Compare each model with the one before it, as the stages of a life cycle.

    Returns:
        The path of ``evaluation.md``.

    Raises:
        UserError: There are no models.
    """
    if not models:
        raise UserError("no model was evaluated, so there is nothing to report")
    comparisons = compare_models(models, win_rates, stages)
    sections = [
        Section("What can be said", verdict(models, comparisons)),
        *_win_rates(models, win_rates),
        *number_sections(models, comparisons, stages),
        *_lengths(models),
        *_samples(models),
        Section("How it was run", _settings(models, command)),
        Section("How to read this", [Prose(_READING)]),
    ]
    numbers = {
        "title": title,
        "command": command,
        "models": [_model_numbers(model) for model in models],
        "comparisons": [_comparison_numbers(one) for one in comparisons],
        "counts": [counted(one) for one in by_pair(comparisons)],
        "regressions": regressions(by_pair(comparisons)),
        "win_rates": [_win_numbers(rate) for rate in win_rates],
    }
    # JSON knows no NaN; what is no plain data in the settings is told as text.
    plain = json.loads(json.dumps(numbers, default=str), parse_constant=lambda _: None)
    folder = Path(folder)
    write_text(folder / "evaluation.json", json.dumps(plain, indent=1) + "\n")
    write_text(folder / "evaluation.html", html_page(title, sections))
    write_text(folder / "evaluation.md", markdown_page(title, sections))
    return folder / "evaluation.md"


def compare_models(
    models: Sequence[ModelResults], win_rates: Sequence[WinRate] = (), stages: bool = False
) -> list[ModelChanges]:
    """All comparisons of a report, their p-values corrected together.

    Args:
        models: Their results.
        win_rates: What a judge says of their answers; compared with one half.
        stages: Compare each model with the one before it, not with the first.

    Returns:
        One for each model after the first, in order, and then one for each win rate.
    """
    lines = side_by_side(models)
    found = []
    for place, model in enumerate(models[1:], start=1):
        other = place - 1 if stages else 0
        pairs = [(line.values[other], line.values[place]) for line in lines]
        changes = [compare(before, after) for before, after in pairs if before and after]
        found.append(ModelChanges(models[other].name, model.name, changes))
    for rate in win_rates:
        told = dataclasses.replace(rate.measurement, metric=f"win rate by {rate.judge}")
        found.append(ModelChanges(rate.first, rate.second, [compare_with(0.5, told)]))
    corrected = iter(holm([change for one in found for change in one.changes]))
    return [
        dataclasses.replace(one, changes=[next(corrected) for _ in one.changes]) for one in found
    ]


# ----- what is shown ------------------------------------------------------------------------------


def _win_rates(models: Sequence[ModelResults], win_rates: Sequence[WinRate]) -> list[Section]:
    if not win_rates:
        return []
    rows = []
    for rate in win_rates:
        bias = "-" if rate.position_bias is None else number(rate.position_bias)
        rows.append(
            [
                Cell(f"{rate.second} against {rate.first}", f"judge: {rate.judge}"),
                reading(rate.measurement),
                reading(rate.length_controlled),
                Cell(f"{rate.wins:,} / {rate.ties:,} / {rate.losses:,}"),
                Cell(bias),
                Cell(f"{rate.mean_words[1]:.1f} / {rate.mean_words[0]:.1f}"),
            ]
        )
    columns = "answers of|win rate|at equal length|wins / ties / losses|position bias|mean words"
    told = (
        "Share of pairs of answers that the judge decides for the first named model, ties half. "
        "Position bias: share of pairs with another verdict when the answers change places."
    )
    plot = win_panels([model.name for model in models], win_rates)
    blocks: list[Block] = [Prose([told]), plot, Table(columns.split("|"), rows)]
    return [Section("Whose answers are better", blocks)]


def _lengths(models: Sequence[ModelResults]) -> list[Section]:
    rows = []
    for task in _tasks(models):
        cells = [_length(_answers(model, task)) for model in models]
        if any(cell.text != "-" for cell in cells):
            rows.append([Cell(task), *cells])
    if not rows:
        return []
    told = "Median words of an answer that the model wrote, and below it the rest."
    table = Table(["task", *(model.name for model in models)], rows)
    return [Section("Length of answers", [Prose([told]), table])]


def _length(answers: Sequence[Answer]) -> Cell:
    written = [one for one in answers if one.generated]
    if not written:
        return Cell("-")
    words = [len(one.answer.split()) for one in written]
    told = [f"mean {statistics.mean(words):.1f}", f"longest {max(words):,}"]
    if empty := words.count(0):
        told.append(f"{empty:,} of {len(words):,} empty")
    known = [one.stopped for one in written if one.stopped is not None]
    if known:
        told.append(f"{100 * sum(known) / len(known):.0f} % end by themselves")
    return Cell(f"{statistics.median(words):g}", ", ".join(told))


def _samples(models: Sequence[ModelResults]) -> list[Section]:
    blocks: list[Block] = []
    for task in _tasks(models):
        by_model = [{one.item: one for one in reversed(_answers(model, task))} for model in models]
        items = dict.fromkeys(one.item for model in models for one in _answers(model, task))
        # Those that most models have, first those on which they differ; else in the task's order.
        ranked = sorted(items, key=lambda item: _rank([own.get(item) for own in by_model]))
        samples: list[Block] = []
        written = any(one.generated for own in by_model for one in own.values())
        for item in ranked[: _SAMPLES if written else _CHOSEN_SAMPLES]:
            found = [own.get(item) for own in by_model]
            one = next(answer for answer in found if answer is not None)
            replies = [
                Reply(model.name, answer.answer if answer else "", _about(answer))
                for model, answer in zip(models, found, strict=True)
            ]
            samples.append(Sample(f"{task}, item {item}", one.prompt, one.reference, replies))
        if samples:
            count = f"{len(samples)} of {len(items):,} items"
            blocks.append(Fold(f"{task} ({count})", samples))
    if not blocks:
        return []
    told = "Items on which the models differ come first: they say nothing of how often they do."
    return [Section("Samples", [Prose([told]), *blocks])]


def _rank(answers: Sequence[Answer | None]) -> tuple[int, bool, bool]:
    there = [one for one in answers if one is not None]
    scores, texts = ({str(one.scores) for one in there}, {one.answer for one in there})
    return -len(there), len(scores) < 2, len(texts) < 2


def _about(answer: Answer | None) -> str:
    if answer is None:
        return "no answer to this item"
    told = [f"{name} {number(value)}" for name, value in answer.scores.items()]
    notes = {
        "empty": not answer.answer.strip(),
        "cut off": answer.stopped is False,
        "chosen from several": not answer.generated,
    }
    return ", ".join([*told, *(note for note, holds in notes.items() if holds)])


def _tasks(models: Sequence[ModelResults]) -> list[str]:
    return list(dict.fromkeys(task.task for model in models for task in model.tasks))


def _answers(model: ModelResults, name: str) -> list[Answer]:
    return [one for task in model.tasks if task.task == name for one in task.answers]


def _settings(models: Sequence[ModelResults], command: str) -> list[Block]:
    facts = list(dict.fromkeys(fact for model in models for fact in model.about))
    rows = [[Cell("source"), *(Cell(model.source) for model in models)]]
    rows += [
        [Cell(fact), *(Cell(_plain(model.about.get(fact, "-"))) for model in models)]
        for fact in facts
    ]
    rows.append(
        [Cell("seconds"), *(Cell(f"{sum(t.seconds for t in m.tasks):,.0f}") for m in models)]
    )
    table = Table(["model", *(model.name for model in models)], rows)
    tasks = []
    for name in _tasks(models):
        own = [task for model in models for task in model.tasks if task.task == name]
        told = dict.fromkeys(_in_words(task) for task in own if task.skipped is None)
        if told:
            tasks.append([Cell(name), Cell(own[0].category), Cell("; ".join(told))])
    settings = Fold("Settings of the tasks", [Table(["task", "category", "settings"], tasks)])
    return [Command(command), table, *([settings] if tasks else [])]


def _in_words(task: TaskResult) -> str:
    given = {name: value for name, value in task.settings.items() if value is not None}
    return ", ".join(f"{name}: {_plain(value)}" for name, value in given.items())


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


# ----- the same as numbers ------------------------------------------------------------------------


def _model_numbers(model: ModelResults) -> dict[str, Any]:
    tasks = []
    for task in model.tasks:
        own = {one.name: getattr(task, one.name) for one in dataclasses.fields(task)}
        own["measurements"] = [_measured(one) for one in task.measurements]
        own["answers"] = len(task.answers)
        tasks.append(own)
    return {"name": model.name, "source": model.source, "about": model.about, "tasks": tasks}


def _measured(one: Measurement) -> dict[str, Any]:
    own = dataclasses.asdict(dataclasses.replace(one, items=None))
    return {name: value for name, value in own.items() if name != "items"}


def _comparison_numbers(one: ModelChanges) -> dict[str, Any]:
    changes = [dataclasses.asdict(change) | {"verdict": change.verdict} for change in one.changes]
    return {"before": one.before, "after": one.after, "changes": changes}


def _win_numbers(rate: WinRate) -> dict[str, Any]:
    own = {one.name: getattr(rate, one.name) for one in dataclasses.fields(rate)}
    measured = {name: _measured(own[name]) for name in ("measurement", "length_controlled")}
    return own | measured | {"judgements": len(rate.judgements)}
