"""Tasks that come with the harness, and what is said where they cannot be had."""

import math
import sys
import textwrap
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from lit_llm.errors import UserError
from lit_llm.evaluation import harness
from lit_llm.evaluation.harness import run_task
from lit_llm.evaluation.suites import EvaluationTask, own_tasks, read_task
from lit_llm.evaluation.tasks import library
from tests.evaluation.rule_lm import RuleLM

LIBRARY = """
import datasets

def docs(**rest):
    rows = [{"q": f"q{n}", "a": "yes" if n % 3 else "no"} for n in range(6)]
    return datasets.DatasetDict(test=datasets.Dataset.from_list(rows))

def pair(doc, results):
    return {"pairs": (doc["a"], results[0])}

def agreement(items):
    return sum(gold == found for gold, found in items) / len(items)

def broken(**rest):
    raise ConnectionError("no route to the Hub\\nmore of it")

def lacking(**rest):
    import no_such_package
"""
WRITTEN = """
test_split: test
output_type: generate_until
doc_to_text: q
doc_to_target: a
generation_kwargs: {until: ["."]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def library_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks in place of the library's."""
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "fakes.py").write_text(LIBRARY)
    for name in ("one", "two", "broken", "lacking"):
        source = name if name in ("broken", "lacking") else "docs"
        head = f"task: {name}\ncustom_dataset: !function fakes.{source}"
        (folder / f"{name}.yaml").write_text(head + WRITTEN)
    rolling = """
        task: rolling
        custom_dataset: !function fakes.docs
        test_split: test
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: q
        metric_list:
          - {metric: word_perplexity}
          - {metric: bits_per_byte}
        """
    (folder / "rolling.yaml").write_text(textwrap.dedent(rolling))
    pairs = """
        include: one.yaml
        task: pairs
        process_results: !function fakes.pair
        metric_list:
          - {metric: pairs, aggregation: !function fakes.agreement, higher_is_better: false}
        """
    (folder / "pairs.yaml").write_text(textwrap.dedent(pairs))
    (folder / "unsafe.yaml").write_text("include: one.yaml\ntask: unsafe\nunsafe_code: true\n")
    group = "group: both\ntask: [one, two]\naggregate_metric_list: [{metric: exact_match}]\n"
    (folder / "both.yaml").write_text(group)
    manager = TaskManager(include_path=folder, include_defaults=False)
    monkeypatch.setattr(harness, "library_tasks", lambda: manager)
    return folder


def theirs(name: str) -> EvaluationTask:
    return EvaluationTask(f"lm_eval/{name}", library=name)


def test_runs_a_task_of_the_library(library_of: Path) -> None:
    lm = RuleLM(write=lambda prompt: "yes", template="T")
    result = run_task(lm, theirs("one"))
    (exact,) = result.measurements
    assert (result.task, result.category) == ("lm_eval/one", "other")
    assert (exact.metric, exact.value, exact.better) == ("exact_match", 4 / 6, "higher")
    assert result.settings["source"] == "Hugging Face Hub (lm_eval/one)"
    assert lm.asked[0][0] == "[user]q0"  # it writes its answers
    assert result.answers[0].reference == "no"


def test_a_group_is_one_task_with_its_parts(library_of: Path) -> None:
    lm = RuleLM(write=lambda prompt: "no")
    result = run_task(lm, theirs("both"))
    (exact,) = result.measurements
    assert exact.value == 4 / 12
    assert exact.items.subsets == ["one"] * 6 + ["two"] * 6
    assert len(set(exact.items.keys)) == 12
    assert [answer.stopped for answer in result.answers] == [True] * 12

    few = run_task(lm, theirs("both"), limit=4).measurements[0].items
    assert few.subsets == ["one", "one", "two", "two"]
    # One item leaves one of the parts without any, of which the harness would take all.
    assert run_task(lm, theirs("both"), limit=1).measurements[0].count == 1


def test_a_number_that_is_no_mean_has_an_interval_all_the_same(library_of: Path) -> None:
    (pairs,) = run_task(RuleLM(write=lambda prompt: "yes"), theirs("pairs")).measurements
    assert (pairs.value, pairs.better, pairs.items, pairs.count) == (4 / 6, "lower", None, 6)
    assert 0 <= pairs.low < 4 / 6 < pairs.high <= 1


def test_perplexities_are_weighted_by_words_and_bytes(library_of: Path) -> None:
    lm = RuleLM(lambda context, text: -math.log(2) * (1 + int(text[1:])))
    words, bits = run_task(lm, theirs("rolling")).measurements
    # 1 to 6 bits on a word of two bytes each.
    assert (words.value, words.scale, words.better) == (
        pytest.approx(2 ** (21 / 6)),
        "exp",
        "lower",
    )
    assert (bits.value, bits.scale) == (pytest.approx(21 / 12), "mean")
    assert words.low < words.value < words.high


def test_says_why_a_task_of_the_library_cannot_be_run(library_of: Path) -> None:
    reasons = {
        "broken": "cannot be loaded from the Hugging Face Hub: no route to the Hub",
        "lacking": "needs the package no_such_package, which is not installed",
        "unsafe": "runs code that the model wrote",
    }
    for name, reason in reasons.items():
        skipped = run_task(RuleLM(), theirs(name)).skipped
        assert reason in skipped and "\n" not in skipped


def test_takes_the_librarys_where_a_file_is_missing(
    library_of: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (library_of / "gsm8k.yaml").write_text("include: one.yaml\ntask: gsm8k\n")
    manager = TaskManager(include_path=library_of, include_defaults=False)
    monkeypatch.setattr(harness, "library_tasks", lambda: manager)
    task = own_tasks()["gsm8k"]
    lm = RuleLM(write=lambda prompt: "yes")

    monkeypatch.setattr(harness, "hub_answers", lambda: False)
    skipped = run_task(lm, task, data_dir=str(tmp_path)).skipped
    assert f"gsm8k/test.jsonl is not in {tmp_path}, and the Hugging Face Hub cannot" in skipped
    assert "no folder with gsm8k/test.jsonl is named (--data_dir)" in run_task(lm, task).skipped

    monkeypatch.setattr(harness, "hub_answers", lambda: True)
    result = run_task(lm, task, data_dir=str(tmp_path))
    assert (result.category, result.measurements[0].value) == ("reasoning", 4 / 6)

    skipped = run_task(lm, own_tasks()["svamp"], data_dir=str(tmp_path)).skipped
    assert "svamp.jsonl.gz is not in" in skipped and "has no such task" in skipped


def test_the_running_script_is_not_taken_for_a_package(
    library_of: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # recipes/evaluate.py is such a script, and tasks of the library import a package of that name.
    recipes = library_of / "recipes"
    recipes.mkdir()
    (recipes / "shadow_of_a_package.py").write_text("raise SystemExit('the script ran again')")
    (library_of / "shadowed.py").write_text("import shadow_of_a_package\n\ndef docs(**rest): ...\n")
    (library_of / "shadowed.yaml").write_text(
        "task: shadowed\ncustom_dataset: !function shadowed.docs" + WRITTEN
    )
    manager = TaskManager(include_path=library_of, include_defaults=False)
    monkeypatch.setattr(harness, "library_tasks", lambda: manager)
    main = type(sys)("__main__")
    main.__file__ = str(recipes / "evaluate.py")
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.syspath_prepend(str(recipes))
    skipped = run_task(RuleLM(), theirs("shadowed")).skipped
    assert "needs the package shadow_of_a_package" in skipped


def test_runs_a_task_of_the_user(library_of: Path) -> None:
    task = read_task(library_of / "one.yaml")
    result = run_task(RuleLM(write=lambda prompt: "yes"), task)
    assert (result.task, result.measurements[0].value) == ("one", 4 / 6)
    assert result.settings["source"] == str(library_of / "one.yaml")


def test_says_how_to_install_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lit-llm\[eval\]'"):
        run_task(RuleLM(), own_tasks()["piqa"])


def test_knows_that_the_hub_does_not_answer() -> None:
    library.hub_answers.cache_clear()
    assert library.hub_answers() is False  # the tests are offline
