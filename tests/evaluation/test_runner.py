"""Jobs in turn: what is done is kept, and taken over only where nothing that decides it changed."""

import json
import random

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


def evaluate(folder, *counted, fingerprint="weights"):
    told = []
    results = evaluate_model(
        None, [own.job for own in counted], folder=folder, fingerprint=fingerprint, tell=told.append
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
        lambda folder: evaluate(folder, Counted(identity={"limit": 4})),
        lambda folder: (folder / "results" / "colours.json").write_text('{"key": '),
    ],
    ids=["other weights", "other settings", "a damaged file"],
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
