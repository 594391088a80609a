"""How a task is run: which items, prompts and numbers, and what happens where it cannot be."""

import logging
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_llm.errors import UserError
from lit_llm.evaluation.harness import ContextTooShortError, run_task
from lit_llm.evaluation.suites import own_tasks
from tests.evaluation.rule_lm import RuleLM, prefers, write_rows

PIQA = [
    {"goal": f"goal {number}", "sol1": "right", "sol2": "wrong", "label": 0} for number in range(40)
]
TRAIN = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(9)]


class SizedLM(RuleLM):
    """Reads so many tokens, each a character."""

    max_gen_toks = 10

    def __init__(self, max_length: int, **options: Any) -> None:
        super().__init__(**options)
        self.max_length = max_length

    def tok_encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


@pytest.fixture
def piqa(tmp_path: Path) -> str:
    write_rows(tmp_path, "piqa_valid.jsonl.gz", PIQA)
    return str(tmp_path)


@pytest.fixture
def sums(tmp_path: Path) -> str:
    write_rows(tmp_path, "gsm8k/train.jsonl.gz", TRAIN)
    rows = [{"question": f"Eggs {n}?", "answer": f"#### {n}"} for n in range(12)]
    write_rows(tmp_path, "gsm8k/test.jsonl", rows)
    return str(tmp_path)


def goals(lm: RuleLM) -> list[int]:
    """Numbers of the items that a model was asked about."""
    asked = {arguments[0].split("\n")[0] for arguments in lm.asked}
    return sorted(int(line.rpartition(" ")[2]) for line in asked)


# ----- items ------------------------------------------------------------------------------------


def test_a_limit_takes_one_item_from_each_stretch_of_the_file(piqa: str) -> None:
    lm = RuleLM()
    result = run_task(lm, own_tasks()["piqa"], data_dir=piqa, limit=8)
    assert [number // 5 for number in goals(lm)] == list(range(8))
    assert result.measurements[0].count == result.settings["items"] == 8
    # Each answer belongs to the item that was asked about.
    assert [answer.prompt for answer in result.answers] == [
        f"Question: goal {number}\nAnswer:" for number in goals(lm)
    ]


def test_a_limit_beyond_the_task_costs_nothing(piqa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness looks each item up in a list of numbers, which takes minutes for 67,000."""
    import lm_eval.evaluator as harness

    given, evaluate = [], harness.evaluate

    def watched(*args: Any, **options: Any) -> Any:
        given.append(options["samples"])
        return evaluate(*args, **options)

    monkeypatch.setattr(harness, "evaluate", watched)
    for limit in (39, 40, 10**6, None):
        run_task(RuleLM(), own_tasks()["piqa"], data_dir=piqa, limit=limit)
    assert len(given[0]["piqa"]) == 39 and given[1:] == [None] * 3


def test_models_are_asked_about_the_same_items(piqa: str) -> None:
    task = own_tasks()["piqa"]
    one = run_task(RuleLM(), task, data_dir=piqa, limit=7)
    two = run_task(RuleLM(prefers("right")), task, data_dir=piqa, limit=7)
    assert one.measurements[0].items.keys == two.measurements[0].items.keys
    other = run_task(RuleLM(), task, data_dir=piqa, limit=7, seed=1)
    assert one.measurements[0].items.keys != other.measurements[0].items.keys
    everything = run_task(RuleLM(), task, data_dir=piqa, limit=1000)
    assert len(set(everything.measurements[0].items.keys)) == 40
    assert set(one.measurements[0].items.keys) < set(everything.measurements[0].items.keys)


def test_items_that_are_in_a_file_twice_have_two_names(tmp_path: Path) -> None:
    write_rows(tmp_path, "piqa_valid.jsonl.gz", [PIQA[0], PIQA[1], PIQA[0]])
    result = run_task(RuleLM(), own_tasks()["piqa"], data_dir=str(tmp_path))
    first, _, third = result.measurements[0].items.keys
    assert third == f"{first}-2"


def test_leaves_random_states_and_the_loggers_alone(piqa: str) -> None:
    def states() -> tuple[Any, ...]:
        generator = np.random.get_state()
        own = random.getstate(), generator[1].tolist(), torch.get_rng_state().tolist()
        return (*own, logging.getLogger("lm_eval").level, list(sys.path))

    before = states()
    run_task(RuleLM(), own_tasks()["piqa"], data_dir=piqa, limit=5)
    assert states() == before


def test_is_quiet(piqa: str, capfd: pytest.CaptureFixture[str], caplog: Any) -> None:
    run_task(RuleLM(), own_tasks()["piqa"], data_dir=piqa)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


# ----- prompts ----------------------------------------------------------------------------------


def test_examples_can_be_more_fewer_or_none(sums: str, piqa: str) -> None:
    for number in (0, 2, None):
        lm = RuleLM()
        result = run_task(lm, own_tasks()["gsm8k"], data_dir=sums, num_fewshot=number)
        expected = 5 if number is None else number
        assert {prompt.count("####") for prompt, _ in lm.asked} == {expected}
        assert result.settings["num_fewshot"] == expected
    # A task without examples has none all the same.
    result = run_task(RuleLM(), own_tasks()["piqa"], data_dir=piqa, num_fewshot=3)
    assert result.settings["num_fewshot"] == 0


def test_the_seed_draws_the_examples(sums: str) -> None:
    def prompts(**options: Any) -> list[str]:
        lm = RuleLM()
        run_task(lm, own_tasks()["gsm8k"], data_dir=sums, **options)
        return [prompt for prompt, _ in lm.asked]

    assert prompts() == prompts() != prompts(seed=1)

    def from_sized() -> list[str]:  # which looks at some prompts beforehand
        lm = SizedLM(10_000)
        run_task(lm, own_tasks()["gsm8k"], data_dir=sums)
        return [prompt for prompt, _ in lm.asked]

    assert from_sized() == prompts()
    # Seed 0 is what the harness draws by default.
    drawn = random.Random(1234).sample(TRAIN, 5)
    shots = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in drawn)
    assert prompts()[0] == f"{shots}Question: Eggs 0?\nAnswer:"


def test_written_answers_go_through_the_chat_template(sums: str, piqa: str) -> None:
    def prompt(name: str, template: str, **options: Any) -> tuple[str, bool]:
        lm = RuleLM(template=template)
        result = run_task(lm, own_tasks()[name], data_dir=sums, num_fewshot=1, **options)
        return lm.asked[0][0], result.settings["chat_template"]

    turns, used = prompt("gsm8k", "T")
    assert used
    assert turns.startswith("[user]Question: What") and "[assistant]#### " in turns
    assert turns.endswith("[user]Question: Eggs 0?\nAnswer:")
    for template, chat in (("", "auto"), ("T", "off")):
        text, used = prompt("gsm8k", template, chat=chat)
        assert not used and "[user]" not in text

    text, used = prompt("piqa", "T")
    assert (text, used) == ("Question: goal 0\nAnswer:", False)
    text, used = prompt("piqa", "T", chat="on")
    assert (text, used) == ("[user]Question: goal 0\nAnswer:", True)
    with pytest.raises(UserError, match="has no chat template"):
        prompt("piqa", "", chat="on")


def test_sentences_without_a_prompt_are_no_turns_of_a_chat(tmp_path: Path) -> None:
    row = {"sentence_good": "He is.", "sentence_bad": "He are.", "UID": "agreement"}
    write_rows(tmp_path, "blimp/agreement.jsonl", [row])
    lm = RuleLM(template="T")
    run_task(lm, own_tasks()["blimp"], data_dir=str(tmp_path), chat="on")
    assert sorted(lm.asked) == [("", " He are."), ("", " He is.")]


def test_a_sentence_to_go_on_with_is_no_turn_either(tmp_path: Path) -> None:
    write_rows(tmp_path, "facts/qa_wikidata.jsonl", [{"input": "Goa is in", "target": "India"}])
    lm = RuleLM(template="T")
    run_task(lm, own_tasks()["qa_wikidata"], data_dir=str(tmp_path))
    assert lm.asked[0][0] == "Goa is in"


def test_refuses_a_context_too_short_for_the_items(sums: str, piqa: str) -> None:
    # "Question: Eggs 10?\nAnswer:" has 26 characters, and 256 tokens are left for the answer.
    with pytest.raises(
        ContextTooShortError, match="gsm8k: the model reads at most 275 tokens, .*smaller --n"
    ):
        run_task(SizedLM(275), own_tasks()["gsm8k"], data_dir=sums)
    result = run_task(SizedLM(281), own_tasks()["gsm8k"], data_dir=sums, num_fewshot=0)
    assert result.settings["cut_prompts"] == 2  # Eggs 10 and Eggs 11
    with pytest.raises(UserError, match=r"need up to 1 more; use a smaller|leave the task out"):
        run_task(SizedLM(280), own_tasks()["gsm8k"], data_dir=sums, num_fewshot=0)

    # "Question: goal 10\nAnswer:" + " right", of which the last character is not read.
    exact = 25 + 6 - 1
    result = run_task(SizedLM(exact), own_tasks()["piqa"], data_dir=piqa)
    assert result.settings["cut_prompts"] == 0
    with pytest.raises(UserError, match=r"piqa: .* need up to 1 more; leave the task out"):
        run_task(SizedLM(exact - 1), own_tasks()["piqa"], data_dir=piqa)


def test_ranks_run_a_task_together_or_not_at_all(
    piqa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub may answer one of them only; the other would wait for its share of the scores."""

    def gather(parts: list[Any], own: Any, group: Any) -> None:
        parts[:] = [own, "the data set cannot be loaded there"]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    lm = RuleLM()
    lm.ranks = object()
    result = run_task(lm, own_tasks()["piqa"], data_dir=piqa)
    assert result.skipped == "the data set cannot be loaded there"
    assert not lm.asked


# ----- numbers and answers ----------------------------------------------------------------------


def test_numbers_have_intervals_and_are_read_as_the_task_says(piqa: str) -> None:
    def score(context: str, text: str) -> float:
        number = int(context.partition("\n")[0].rpartition(" ")[2])
        return float(("right" in text) == (number < 30))

    acc, _ = run_task(RuleLM(score), own_tasks()["piqa"], data_dir=piqa).measurements
    assert (acc.task, acc.metric, acc.value, acc.count) == ("piqa", "acc", 0.75, 40)
    assert (acc.better, acc.chance) == ("higher", 0.5)
    # Wilson's interval of 30 out of 40, from its formula.
    z, n, p = 1.959964, 40, 0.75
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert (acc.low, acc.high) == pytest.approx((centre - half, centre + half), abs=1e-5)
    assert acc.items.numerators == [1.0] * 30 + [0.0] * 10


def test_a_model_whose_numbers_are_none_measures_nothing(piqa: str) -> None:
    # The harness would take the first choice, which is right here.
    result = run_task(
        RuleLM(lambda context, text: math.nan if "goal 7\n" in context else 0.0),
        own_tasks()["piqa"],
        data_dir=piqa,
    )
    assert "no numbers on 1 of 40 items" in result.skipped
    assert not result.measurements


def test_keeps_every_answer_with_its_scores(sums: str) -> None:
    def write(prompt: str) -> str:
        return "" if "Eggs 1?" in prompt else "#### 3"

    result = run_task(RuleLM(write=write), own_tasks()["gsm8k"], data_dir=sums)
    assert len(result.answers) == 12
    silent, right = result.answers[1], result.answers[3]
    assert (silent.answer, silent.stopped, right.stopped) == ("", False, True)
    assert right.generated and right.answer == "#### 3" and right.reference == "#### 3"
    assert right.scores == {
        "exact_match_strict_match": 1.0,
        "exact_match_flexible_extract": 1.0,
    }
    assert set(silent.scores.values()) == {0.0}
    assert right.item == result.measurements[0].items.keys[3]
