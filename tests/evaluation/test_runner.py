"""Jobs in turn: what is done is kept, and taken over only where nothing that decides it changed."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lit_llm.errors import UserError
from lit_llm.evaluation.results import Answer, Items, TaskResult, measure
from lit_llm.evaluation.runner import Job, evaluate_model, plan
from lit_llm.evaluation.settings import EvaluationSettings


class Counted:
    """A job that counts how often it ran, and uses up random numbers."""

    def __init__(self, name="colours", identity=None, skipped=None):
        self.runs = 0
        self.skipped = skipped
        self.job = Job(name, "facts", identity or {"limit": 3}, self.run)

    def run(self, lm):
        self.runs += 1
        random.random()
        np.random.rand()
        torch.manual_seed(99)
        if self.skipped:
            return TaskResult(self.job.name, "facts", skipped=self.skipped)
        answers = [Answer(self.job.name, "a", "Sky?", "blue\n", "blue", {"acc": 1.0})]
        return TaskResult(
            self.job.name,
            "facts",
            [measure(self.job.name, "acc", Items(["a"], [1.0], [1.0]))],
            answers,
        )


def evaluate(folder, *counted, fingerprint="weights", template=""):
    told = []
    results = evaluate_model(
        SimpleNamespace(identity={"template": template}),
        [own.job for own in counted],
        folder=folder,
        fingerprint=fingerprint,
        tell=told.append,
    )
    return results, told


def test_what_is_done_is_taken_over(tmp_path):
    first, second = Counted(), Counted("shapes")
    evaluate(tmp_path, first)
    results, told = evaluate(tmp_path, first, second)
    assert (first.runs, second.runs) == (1, 1)
    assert [result.task for result in results] == ["colours", "shapes"]
    assert results[0].answers[0].answer == "blue\n"
    assert "as before" in told[0] and "as before" not in told[1]


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: evaluate(folder, Counted(), fingerprint="other"),
        lambda folder: evaluate(folder, Counted(), template="chat"),
        lambda folder: evaluate(folder, Counted(identity={"limit": 4})),
        lambda folder: (folder / "results" / "colours.json").write_text('{"key": '),
    ],
    ids=["other weights", "another template", "other settings", "a damaged file"],
)
def test_what_was_done_otherwise_is_done_again(tmp_path, change):
    own = Counted()
    evaluate(tmp_path, own)
    change(tmp_path)
    evaluate(tmp_path, own)
    assert own.runs == 2


def test_what_was_skipped_is_tried_again(tmp_path):
    own = Counted(skipped="no network")
    _, told = evaluate(tmp_path, own)
    evaluate(tmp_path, own)
    assert own.runs == 2
    assert "skipped, no network" in told[0]


def test_every_answer_is_kept_as_a_line(tmp_path):
    evaluate(tmp_path, Counted("lm_eval/colours"))
    (line,) = (tmp_path / "answers" / "lm_eval_colours.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["item"], row["answer"], row["scores"]) == ("a", "blue\n", {"acc": 1.0})


def test_no_random_number_is_used_up():
    def numbers():
        return random.random(), np.random.rand(), float(torch.rand(()))

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = numbers()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    evaluate(None, Counted())
    assert numbers() == expected


def test_names_of_parts_are_told_apart(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(f"{name} text\n")
    paths = [str(tmp_path / name / "text.txt") for name in ("one", "two")]
    with pytest.raises(UserError, match="two parts of the evaluation are named 'text'"):
        plan(EvaluationSettings(suite=[], texts=[f"text={path}" for path in paths], prompts=[]))
    named = [f"first={paths[0]}", f"second={paths[1]}"]
    jobs = plan(EvaluationSettings(suite=[], texts=named, prompts=[]))
    assert [job.name for job in jobs] == ["first", "second"]


def test_other_texts_of_the_same_name_are_another_job(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one")
    first = plan(EvaluationSettings(suite=[], texts=[str(path)], prompts=[]))
    path.write_text("two")
    second = plan(EvaluationSettings(suite=[], texts=[str(path)], prompts=[]))
    assert first[0].identity != second[0].identity


def test_parts_that_would_share_a_file_are_told_apart(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("text\n")
    yaml = tmp_path / "task.yaml"
    yaml.write_text("task: my/text\noutput_type: multiple_choice\n")
    with pytest.raises(UserError, match="two parts of the evaluation are named 'my_text'"):
        plan(EvaluationSettings(suite=[], tasks=[str(yaml)], texts=[f"my_text={path}"], prompts=[]))


def test_a_task_that_reads_otherwise_is_another_job(tmp_path):
    yaml = tmp_path / "task.yaml"
    settings = EvaluationSettings(suite=[], tasks=[str(yaml)], texts=[], prompts=[])
    found = []
    for text in ("Question:", "Frage:"):
        yaml.write_text(f"task: own\ndoc_to_text: '{text} {{{{question}}}}'\n")
        found.append(plan(settings)[0].identity)
    assert found[0] != found[1]


def test_another_reference_is_another_job_and_another_line_is_not(tmp_path):
    path = tmp_path / "asked.jsonl"
    settings = EvaluationSettings(suite=[], texts=[], prompts=[str(path)], num_prompts=2)
    found = []
    for start, answer in (("", "blue"), ("", "red"), ("\n", "blue")):
        path.write_text(start + json.dumps({"prompt": "sky?", "answer": answer}) + "\n")
        found.append(plan(settings)[0].identity)
    assert found[0] != found[1] and found[0] == found[2]


def test_answers_of_an_earlier_evaluation_are_not_left_beside_a_skipped_one(tmp_path):
    evaluate(tmp_path, Counted())
    assert (tmp_path / "answers" / "colours.jsonl").exists()
    evaluate(tmp_path, Counted(skipped="no network"), fingerprint="other")
    assert not (tmp_path / "answers" / "colours.jsonl").exists()


@pytest.mark.parametrize("named", [False, True])
def test_an_answer_longer_than_the_context_ends_a_suite_s_task_only(tmp_path, named):
    """Most items fit, so that the look at some prompts beforehand finds nothing."""
    rows = [{"goal": f"g {n}", "sol1": "red", "sol2": "a tree", "label": 0} for n in range(20)]
    rows[7]["sol1"] = "tree " * 100
    path = tmp_path / "piqa_valid.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = EvaluationSettings(
        suite=[], tasks=["piqa"], data_dir=str(tmp_path), texts=[], prompts=[]
    )
    from lit_llm.evaluation.harness_model import HarnessModel
    from tests.evaluation.tiny_models import model, tokenizer

    lm = HarnessModel(model(positions=64), tokenizer())
    (job,) = plan(settings, strict=named)
    if named:
        with pytest.raises(UserError, match="task piqa, item 7: the continuation has"):
            job.run(lm)
    else:
        assert "task piqa, item 7: the continuation has" in (job.run(lm).skipped or "")


def test_questions_without_room_are_skipped_and_shortened_ones_counted(tmp_path):
    """An answer as long as the context would leave one token of each question."""
    from lit_llm.evaluation.harness_model import HarnessModel
    from tests.evaluation.tiny_models import model, tokenizer

    path = tmp_path / "asked.jsonl"
    rows = [{"prompt": words * "fox "} for words in (1, 2, 60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lm = HarnessModel(model(positions=64), tokenizer())
    found = {}
    for length in (4, 64):
        settings = EvaluationSettings(
            suite=[], texts=[], prompts=[str(path)], max_new_tokens=length
        )
        found[length] = plan(settings)[0].run(lm)
    assert found[4].settings["cut_prompts"] == 1 and len(found[4].answers) == 3
    assert not found[64].answers
    assert "the model reads at most 64 tokens, and most questions" in found[64].skipped


def test_what_has_no_number_is_kept_as_json_that_others_read(tmp_path):
    """JSON knows no NaN, which Python writes all the same."""
    nan = float("nan")
    measured = measure("t", "m", Items(["a", "b"], [nan, 1.0], [1.0, 1.0]))
    result = TaskResult("t", "facts", [measured], [Answer("t", "a", "Sky?", "", scores={"m": nan})])
    job = Job("t", "facts", {}, lambda lm: result)
    own = SimpleNamespace(job=job)
    (first,), _ = evaluate(tmp_path, own)
    for path in (tmp_path / "results" / "t.json", tmp_path / "answers" / "t.jsonl"):
        json.loads(path.read_text(), parse_constant=pytest.fail)
    (again,), told = evaluate(tmp_path, own)
    assert "as before" in told[0]
    assert repr(again) == repr(first)  # NaN is equal to nothing
