"""What the report of an evaluation says first: what is better, what is worse, what is not known."""

from __future__ import annotations

from collections.abc import Sequence

from lit_llm.evaluation.comparison import Change, ModelChanges, regressions
from lit_llm.evaluation.evaluation_page import Block, Bullets, Fold, Prose
from lit_llm.evaluation.results import ModelResults


def verdict(models: Sequence[ModelResults], comparisons: Sequence[ModelChanges]) -> list[Block]:
    """What is certain of each model beside another, and which tasks were not run.

    Args:
        models: The results of each.
        comparisons: All comparisons of the report, corrected together.
    """
    pairs = by_pair(comparisons)
    blocks = [block for one in pairs for block in _told(one)]
    if not pairs:
        alone = f"{models[0].name} is the only model: nothing is compared."
        blocks.append(Prose([alone, *_beside_chance(models[0])]))
    skipped: dict[tuple[str, str], list[str]] = {}
    for model in models:
        for task in model.tasks:
            if task.skipped is not None:
                skipped.setdefault((task.task, task.skipped), []).append(model.name)
    if skipped:
        told: list[str] = []
        for (name, reason), names in skipped.items():
            whose = "" if len(names) == len(models) else f" ({', '.join(names)})"
            told.append(f"{name}{whose}: {reason.removeprefix(f'{name}: ')}")
        blocks.append(Bullets("Not run", told))
    # Last, as in Markdown they are parts with a heading, to which all that follows would belong.
    return blocks + [block for one in pairs for block in _untold(one)]


def by_pair(comparisons: Sequence[ModelChanges]) -> list[ModelChanges]:
    """One for each pair of models: its numbers, and what judges say of it, together.

    Args:
        comparisons: Any number for each pair.
    """
    pairs: dict[tuple[str, str], list[Change]] = {}
    for one in comparisons:
        pairs.setdefault((one.before, one.after), []).extend(one.changes)
    return [ModelChanges(before, after, changes) for (before, after), changes in pairs.items()]


def counted(one: ModelChanges) -> str:
    """How many numbers of a model are better and worse than another's, in one sentence.

    Args:
        one: All comparisons of the two.
    """
    counts = {word: len(one.having(word)) for word in ("better", "worse", "differs")}
    counts["different"] = counts.pop("differs")
    counts["without a certain difference"] = len(one.having("no certain difference"))
    told = [f"{count} {word}" for word, count in counts.items() if count or word != "different"]
    return f"{one.after} against {one.before}: {', '.join(told)}."


def _beside_chance(model: ModelResults) -> list[str]:
    """Which first numbers of tasks are above what guessing gives; each interval by itself."""
    first = [task.measurements[0] for task in model.tasks if task.measurements]
    guessed = [(f"{m.task} {m.metric}", m.low, m.chance) for m in first if m.better == "higher"]
    above = [name for name, low, chance in guessed if chance and low > chance]
    other = [name for name, low, chance in guessed if chance and not low > chance]
    told = {"Above chance": above, "Not certainly above chance": other}
    return [f"{what}: {', '.join(names)}." for what, names in told.items() if names]


def _told(one: ModelChanges) -> list[Block]:
    better, worse, other = one.having("better"), one.having("worse"), one.having("differs")
    sentences = [counted(one)]
    # What is worse stands below, number by number; what else there is to say of that, here.
    blocks: list[Block] = [Prose([*sentences, *regressions([one])[len(worse) :]])]
    for word, changes in (("worse", worse), ("better", better)):
        if changes:
            title = f"{one.after} is {word} than {one.before} on"
            blocks.append(Bullets(title, [str(change) for change in changes], word))
    if other:
        title = f"{one.after} differs from {one.before}, where no direction is better, on"
        blocks.append(Bullets(title, [str(change) for change in other]))
    return blocks


def _untold(one: ModelChanges) -> list[Block]:
    same, apart = one.having("no certain difference"), one.having("not comparable")
    names = f"{one.after} against {one.before}"
    blocks: list[Block] = []
    if same:
        title = f"{names}: no certain difference, {len(same)} number{'s' * (len(same) != 1)}"
        told = dict.fromkeys(f"{change.task} {change.metric}" for change in same)
        blocks.append(Fold(title, [Prose([", ".join(told) + "."])]))
    if apart:
        title = f"{names}: not comparable, {len(apart)} number{'s' * (len(apart) != 1)}"
        told = dict.fromkeys(f"{change.task} {change.metric}: {change.note}" for change in apart)
        blocks.append(Fold(title, [Bullets("Why", list(told))]))
    return blocks
