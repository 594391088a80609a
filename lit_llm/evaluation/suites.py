"""Which benchmark tasks there are, and the suites that name sets of them.

A task is a YAML file of the lm-evaluation-harness. Under ``metadata`` it says what the harness does
not ask for: ``version``, ``category``, ``files`` (in the tasks' folder; none where the task is
embedded), ``library`` (the harness's own task of the same data, or null), ``quick``, ``chat``,
``metrics`` (which matter, the first one most, and what each is to be read by) and
``choices_per_answer``.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import yaml

from lit_llm.errors import UserError
from lit_llm.evaluation.results import Better
from lit_llm.evaluation.tasks.reading import find_files

SUITES = {
    "quick": "a short look at everything",
    "reasoning": "arithmetic, common sense, reading and logic",
    "facts": "what a model knows, and whether it is true",
    "safety": "refusals, stereotypes and gender",
    "coherence": "grammar, order and what follows from what",
    "all": "every task",
}
"""The suites and what they look at."""

LIBRARY = "lm_eval/"
"""Before a name: the harness's own task, even where there is one of ours."""

_FOLDER = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class Metric:
    """How a number of a task is to be read.

    Attributes:
        name: The harness's name, with the filter's where there are several.
        better: Which direction is better; ``None`` for a number that only describes.
        ideal: What it should be near to, where ``better`` is "ideal".
        chance: What guessing gives, where that is known.
    """

    name: str
    better: Better | None = "higher"
    ideal: float | None = None
    chance: float | None = None


@dataclass(frozen=True)
class EvaluationTask:
    """A benchmark task.

    Attributes:
        name: Its name in reports.
        category: What it looks at: reasoning, facts, safety, coherence, python, other.
        path: Its YAML file; ``None`` for a task of the library.
        files: Files and patterns that it reads, inside the tasks' folder.
        library: The library's own task of the same data, which is run where a file is missing.
        quick: Whether it is in the suite "quick".
        chat: Whether to use the chat template; ``None``: where the model writes its answers.
        metrics: Its numbers, the one that matters most first.
        choices_per_answer: How many of a document's choices stand against each other; 0 for all.
        version: Counts up where its numbers change.
    """

    name: str
    category: str = "other"
    path: Path | None = None
    files: tuple[str, ...] = ()
    library: str | None = None
    quick: bool = False
    chat: bool | None = None
    metrics: tuple[Metric, ...] = field(default=())
    choices_per_answer: int = 0
    version: int = 1

    def found_files(self, data_dir: str | Path | None) -> list[Path]:
        """Those of its files that are in a folder."""
        return [path for name in self.files for path in find_files(data_dir, name)]

    def missing_file(self, data_dir: str | Path | None) -> str | None:
        """The first of its files that is not in a folder."""
        return next((name for name in self.files if not find_files(data_dir, name)), None)


def tasks_of(suite: Sequence[str], tasks: Sequence[str] = ()) -> list[EvaluationTask]:
    """The tasks of suites, and more by name, each once, in this order.

    Args:
        suite: Names of suites.
        tasks: Names of tasks: ours, ``file.yaml`` of yours, the library's (also its groups), or
            ``lm_eval/NAME`` for the library's own where there is one of ours by that name.

    Raises:
        UserError: A suite or task is unknown; names the nearest.
    """
    found: dict[str, EvaluationTask] = {}
    for name in suite:
        if name not in SUITES:
            raise UserError(f"unknown suite {name!r}; {_nearest(name, SUITES)}")
        found |= {task.name: task for task in own_tasks().values() if _belongs(task, name)}
    for name in tasks:
        task = _task(name)
        found.setdefault(task.name, task)
    return list(found.values())


@functools.cache
def own_tasks() -> dict[str, EvaluationTask]:
    """Our tasks by name, in alphabetical order."""
    read = (read_task(path) for path in sorted(_FOLDER.glob("*.yaml")))
    return {task.name: task for task in read}


def read_task(path: Path) -> EvaluationTask:
    """A task from its YAML file.

    Args:
        path: A file of the harness's format.

    Raises:
        UserError: The file cannot be read as a task.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        about = content.get("metadata") or {}
        metrics = about.get("metrics") or {}
        return EvaluationTask(
            name=content["task"],
            category=about.get("category", "other"),
            path=path.resolve(),
            files=tuple(about.get("files") or ()),
            library=about.get("library"),
            quick=bool(about.get("quick", False)),
            chat=about.get("chat"),
            metrics=tuple(_metric(name, own or {}) for name, own in metrics.items()),
            choices_per_answer=int(about.get("choices_per_answer", 0)),
            version=int(about.get("version", 1)),
        )
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: is no task of the lm-evaluation-harness ({type(error).__name__}: {reason})"
        ) from error


def _metric(name: str, about: dict[str, Any]) -> Metric:
    better = about.get("better", "higher")
    if better is not None and better not in get_args(Better):
        raise ValueError(f"better: {better!r} of {name} is not one of {get_args(Better)} or null")
    return Metric(name, cast("Better | None", better), about.get("ideal"), about.get("chance"))


def _belongs(task: EvaluationTask, suite: str) -> bool:
    return suite == "all" or task.category == suite or (suite == "quick" and task.quick)


def _task(name: str) -> EvaluationTask:
    if name in own_tasks():
        return own_tasks()[name]
    if name.endswith((".yaml", ".yml")):
        return read_task(Path(name).expanduser())
    from lit_llm.evaluation.tasks.library import library_tasks

    plain = name.removeprefix(LIBRARY)
    known = library_tasks().all_tasks
    if plain not in known:
        raise UserError(f"unknown task {name!r}; {_nearest(plain, [*own_tasks(), *known])}")
    return EvaluationTask(name, library=plain)


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    if near:
        return f"the nearest are {', '.join(near)}"
    return f"there are {', '.join(known[:30])}{', ...' if len(known) > 30 else ''}"


class _Loader(yaml.SafeLoader):
    """Reads a task without importing the functions that it names."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
