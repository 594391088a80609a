"""What the report says first, and what it leaves out because it says nothing."""

from dataclasses import replace

from lit_llm.evaluation.comparison import ModelChanges, compare
from lit_llm.evaluation.evaluation_report import write_report
from lit_llm.evaluation.evaluation_verdict import by_pair, counted, verdict
from lit_llm.evaluation.results import Answer, Items, ModelResults, TaskResult, measure


def measured(right, task="t", count=60, parts=(), **changes):
    values = [float(n < right) for n in range(count)]
    keys = [str(n) for n in range(count)]
    return measure(task, "acc", Items(keys, values, [1.0] * count, list(parts)), **changes)


def change(before, after, **changes):
    return compare(measured(before, **changes), measured(after, **changes))


def test_a_pair_is_judged_once_over_all_that_is_known_of_it():
    worse, same = change(50, 10), change(30, 31, task="u")
    judged = change(10, 50, task="v")
    told = change(10, 50, task="w", better=None)
    pairs = by_pair(
        [
            ModelChanges("a", "b", [worse, same]),
            ModelChanges("b", "c", [same]),
            ModelChanges("a", "b", [judged, told]),
        ]
    )
    assert [(one.before, one.after, len(one.changes)) for one in pairs] == [
        ("a", "b", 4),
        ("b", "c", 1),
    ]
    expected = "b against a: 1 better, 1 worse, 1 different, 1 without a certain difference."
    assert counted(pairs[0]) == expected
    assert counted(pairs[1]) == "c against b: 0 better, 0 worse, 1 without a certain difference."
    blocks = verdict([], pairs)
    # What is certain of every pair, before anything that has a heading of its own in Markdown.
    kinds = [block.kind for block in blocks]
    assert kinds == ["prose", "bullets", "bullets", "bullets", "prose", "fold", "fold"]
    assert blocks[5].title == "b against a: no certain difference, 1 number"


def one(name, **changes):
    answers = [
        Answer("t", str(n), "", f"answer {n}", "right", {"acc": 1.0}, generated=False)
        for n in range(5)
    ]
    settings = {"limit": None, "chat_template": False}
    task = TaskResult("t", "facts", [measured(3, **changes)], answers, settings=settings)
    return ModelResults(name, name, [task])


def test_a_model_alone_is_set_beside_chance(tmp_path):
    # Of 60 items 40 right: Wilson's interval is 0.541 to 0.773; 35 right: 0.457 to 0.699.
    tasks = [
        TaskResult("known", "facts", [measured(40, "known", chance=0.5)]),
        TaskResult("unsure", "facts", [measured(35, "unsure", chance=0.5)]),
        TaskResult("written", "facts", [measured(40, "written", chance=0.0)]),
        TaskResult("bias", "safety", [measured(40, "bias", chance=0.5, better="ideal", ideal=0.5)]),
        TaskResult("bbh", "reasoning", skipped="bbh: the model reads at most 9 tokens"),
    ]
    page = write_report(tmp_path, [ModelResults("a", "a", tasks)], command="x").read_text()
    said = page.split("## Summary")[0]
    assert "Above chance: known acc.\n\nNot certainly above chance: unsure acc.\n" in said
    assert "- bbh: the model reads at most 9 tokens" in said


def test_parts_of_few_items_are_left_out(tmp_path):
    parts = [f"part {n % 16}" for n in range(60)]
    assert "by part" not in write_report(tmp_path, [one("a", parts=parts)], command="x").read_text()
    parts = [f"part {n % 15}" for n in range(60)]
    assert (
        "t acc by part (15)"
        in write_report(tmp_path, [one("a", parts=parts)], command="x").read_text()
    )


def test_given_answers_need_few_samples_and_no_empty_prompt(tmp_path):
    page = write_report(tmp_path, [one("a")], command="x").read_text()
    assert "### t (2 of 5 items)" in page and "Prompt:" not in page
    assert "<h5>Prompt</h5>" not in (tmp_path / "evaluation.html").read_text()
    asked = one("a")
    task = asked.tasks[0]
    answers = [replace(answer, prompt="Which?") for answer in task.answers]
    asked = replace(asked, tasks=[replace(task, answers=answers)])
    page = write_report(tmp_path, [asked], command="x").read_text()
    assert page.count("Prompt:") == 2
    assert "<h5>Prompt</h5>" in (tmp_path / "evaluation.html").read_text()


def test_settings_are_words(tmp_path):
    page = write_report(tmp_path, [one("a")], command="x").read_text()
    assert "| t | facts | chat_template: no |" in page
