"""Which tasks there are, how they are named, and what their files must be called."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lit_llm.errors import UserError
from lit_llm.evaluation import suites
from lit_llm.evaluation.suites import SUITES, EvaluationTask, Metric, own_tasks, tasks_of
from lit_llm.evaluation.tasks import library

FOLDER = Path(suites.__file__).parent / "tasks"
CATEGORIES = {"reasoning", "facts", "safety", "coherence", "python"}


def names(*args: list[str]) -> list[str]:
    return [task.name for task in tasks_of(*args)]


def raw(path: Path) -> dict:
    """A task's file without its functions, and with what it includes."""
    text = re.sub(r"!function (\S+)", r"'\1'", path.read_text(encoding="utf-8"))
    content = yaml.safe_load(text)
    base = raw(path.parent / content["include"]) if "include" in content else {}
    return base | content


@pytest.fixture
def few_library_tasks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # To look through the library's own takes ten seconds.
    known = SimpleNamespace(all_tasks=["arc_easy", "gsm8k", "hellaswag", "mmlu"])
    monkeypatch.setattr(library, "library_tasks", lambda: known)
    return


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_says_all_that_is_asked_for(path: Path) -> None:
    content, task = raw(path), own_tasks()[path.stem]
    about = content["metadata"]
    assert task.name == content["task"] == path.stem
    assert task.category in CATEGORIES
    assert "library" in about and about["version"] >= 1
    assert content["test_split"] == "test" and "num_fewshot" in content

    filters = [own["name"] for own in content.get("filter_list", [])]
    computed = [
        f"{own['metric']}_{name.replace('-', '_')}" if filters else own["metric"]
        for own in content["metric_list"]
        for name in filters or [""]
    ]
    assert sorted(metric.name for metric in task.metrics) == sorted(computed)
    for metric in task.metrics:
        assert (metric.better == "ideal") == (metric.ideal is not None)
    # Chance is that of one choice among as many as the prompt's letters, where there are letters.
    if isinstance(content.get("doc_to_choice"), list):
        assert task.metrics[0].chance == 1 / len(content["doc_to_choice"])
    assert path.read_text(encoding="utf-8").startswith("# ")  # where it parts from the library


def test_suites_are_the_categories_and_a_few_of_each() -> None:
    assert set(names(["all"])) == {path.stem for path in FOLDER.glob("*.yaml")}
    assert names(["safety"]) == ["crows_pairs", "winogender", "xstest"]
    assert names(["coherence"]) == ["blimp", "discourse_markers", "fables", "step_ordering"]
    quick = {own_tasks()[name].category for name in names(["quick"])}
    assert quick == CATEGORIES
    assert len(names(["quick"])) == 9
    for suite in SUITES:
        assert names([suite])


def test_takes_each_task_once_and_in_order() -> None:
    both = names(["safety", "quick"], ["piqa", "mmlu"])
    assert both[:3] == ["crows_pairs", "winogender", "xstest"]
    assert both[-1] == "mmlu"
    assert len(both) == len(set(both)) == 3 + 9 - 2 + 1


def test_offers_the_nearest_names(few_library_tasks: None) -> None:
    with pytest.raises(UserError, match="unknown suite 'reasonning'; the nearest are reasoning"):
        tasks_of(["reasonning"])
    with pytest.raises(UserError, match="unknown suite 'x'; there are quick, reasoning, facts"):
        tasks_of(["x"])
    with pytest.raises(UserError, match="unknown task 'mmul'; the nearest are mmlu"):
        tasks_of([], ["mmul"])
    with pytest.raises(UserError, match="unknown task 'hellaswagg'; the nearest are hellaswag"):
        tasks_of([], ["hellaswagg"])
    with pytest.raises(UserError, match="unknown task 'lm_eval/arc'; the nearest are arc_easy"):
        tasks_of([], ["lm_eval/arc"])


def test_tells_our_task_from_the_librarys(few_library_tasks: None) -> None:
    ours, theirs, other = tasks_of([], ["gsm8k", "lm_eval/gsm8k", "hellaswag"])
    assert ours.path == FOLDER / "gsm8k.yaml" and ours.category == "reasoning"
    assert theirs == EvaluationTask("lm_eval/gsm8k", library="gsm8k")
    assert (other.name, other.library, other.path) == ("hellaswag", "hellaswag", None)


def test_our_tasks_need_no_look_through_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library_tasks", lambda: pytest.fail("looked"))
    assert names(["quick"], ["gsm8k"])[-1] == "gsm8k"


def test_says_how_to_install_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    library.library_tasks.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'lit-llm\[eval\]'"):
        tasks_of([], ["hellaswag"])


def test_reads_a_task_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "task: mine\nprocess_docs: !function mine.docs\nmetadata:\n  category: facts\n"
        "  metrics:\n    rate: {better: lower, chance: 0.5}\n    size: {better: null}\n"
    )
    (task,) = tasks_of([], [str(path)])
    assert (task.name, task.category, task.path) == ("mine", "facts", path.resolve())
    assert task.metrics == (Metric("rate", "lower", None, 0.5), Metric("size", None))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- a list", "is no task"),
        ("metadata: {}", "KeyError: 'task'"),
        ("task: [", "is no task"),
        ("task: a\nmetadata: {metrics: {acc: {better: more}}}", "better: 'more' of acc"),
    ],
)
def test_refuses_a_file_that_is_no_task(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=told):
        tasks_of([], [str(path)])


def test_refuses_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        tasks_of([], [str(tmp_path / "mine.yaml")])


def test_finds_files_compressed_or_not(tmp_path: Path) -> None:
    task = EvaluationTask("t", files=("a/test.jsonl", "parts/*.jsonl.gz"))
    assert task.missing_file(None) == task.missing_file(tmp_path) == "a/test.jsonl"
    (tmp_path / "a").mkdir()
    (tmp_path / "parts").mkdir()
    (tmp_path / "a" / "test.jsonl.gz").touch()
    assert task.missing_file(tmp_path) == "parts/*.jsonl.gz"
    for name in ("y", "x"):
        (tmp_path / "parts" / f"{name}.jsonl").touch()
    assert task.missing_file(str(tmp_path)) is None
    found = [path.relative_to(tmp_path).as_posix() for path in task.found_files(tmp_path)]
    assert found == ["a/test.jsonl.gz", "parts/x.jsonl", "parts/y.jsonl"]


@pytest.mark.thorough
def test_the_library_has_the_tasks_that_ours_name() -> None:
    library.library_tasks.cache_clear()
    known = set(library.library_tasks().all_tasks)
    assert {task.library for task in own_tasks().values()} - {None} <= known
