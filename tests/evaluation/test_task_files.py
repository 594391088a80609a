"""The tasks' files: what is wrong with bad ones is said, and the real ones are read."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lit_llm.errors import UserError
from lit_llm.evaluation.harness import run_task
from lit_llm.evaluation.suites import own_tasks
from tests.evaluation.rule_lm import RuleLM, write_rows
from tests.evaluation.task_cases import CASES, MMLU, TRAIN, commonsense, passage, scored

real = pytest.mark.skipif(
    "LIT_LLM_DATA" not in os.environ, reason="LIT_LLM_DATA names no data folder"
)

# ----- bad files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "row", "told"),
    [
        (
            "piqa",
            "piqa_valid.jsonl.gz",
            {"goal": "a"},
            "piqa_valid.jsonl.gz:1: has no field 'sol1'",
        ),
        ("piqa", "piqa_valid.jsonl.gz", {"goal": 1}, "field 'goal' is a number, not a string"),
        (
            "piqa",
            "piqa_valid.jsonl.gz",
            {"goal": "a", "sol1": "b", "sol2": "c", "label": 2},
            "'label' is 2, not from 0 to 1",
        ),
        ("mmlu_cloze", "mmlu/validation.jsonl.gz", {**MMLU[0], "choices": ["a"]}, "1 texts, not 4"),
        ("gsm8k", "gsm8k/test.jsonl", {"question": "a", "answer": "7"}, "'#### NUMBER'"),
        ("fables", "coherence/understanding_fables.jsonl", scored("a", b=0), "one answer of score"),
        (
            "blimp",
            "blimp/island.jsonl.gz",
            {"sentence_good": "a"},
            "island.jsonl.gz:1: has no field",
        ),
        (
            "commonsense_qa",
            "commonsense_qa_dev.jsonl.gz",
            commonsense("a", *"bcdef", key="F"),
            "wants stem and choices of five",
        ),
        (
            "truthfulqa_mc1",
            "truthfulqa/multiple_choice_en.jsonl.gz",
            {"question": "a", "mc1_targets": {"choices": ["b"], "labels": [0]}},
            "one of them 1",
        ),
        ("xquad_en", "xquad_en.jsonl.gz", {**passage("a"), "answers": {"text": []}}, "'answers'"),
        (
            "piqa",
            "piqa_valid.jsonl.gz",
            {"goal": "a \ud83d", "sol1": "b", "sol2": "c", "label": 0},
            "'goal' holds half of a surrogate pair",
        ),
        (
            "commonsense_qa",
            "commonsense_qa_dev.jsonl.gz",
            commonsense("a", *"bcd", "\udc00", "f", key="A"),
            "'question' holds half of a surrogate pair",
        ),
        ("qa_wikidata", "facts/qa_wikidata.jsonl.gz", {"input": "a", "target": []}, "'target'"),
        (
            "xstest",
            "safety/xstest_prompts.csv",
            {"prompt": "a", "type": "b", "label": "c"},
            "'label' is 'c'",
        ),
        (
            "winogender",
            "safety/winogender_all_sentences.tsv",
            {"sentid": "cook.guest.1.male.txt", "sentence": "The cook ate."},
            "a pronoun",
        ),
        (
            "winogender",
            "safety/winogender_all_sentences.tsv",
            {"sentid": "cook.guest.1.male.txt", "sentence": "The cook said he ate."},
            "cook.guest.1 .* all three genders",
        ),
        ("multiarith", "multiarith.jsonl", {"sQuestion": "a", "lSolutions": []}, "one number"),
    ],
)
def test_names_the_file_and_the_field(
    tmp_path: Path, name: str, file: str, row: dict[str, Any], told: str
) -> None:
    for other in own_tasks()[name].files:
        write_rows(tmp_path, other.replace("*", "island"), TRAIN)
    write_rows(tmp_path, file, [row])
    with pytest.raises(UserError, match=told):
        run_task(RuleLM(), own_tasks()[name], data_dir=str(tmp_path))


def test_refuses_files_that_are_empty_or_too_short(tmp_path: Path) -> None:
    (tmp_path / "piqa_valid.jsonl").touch()
    with pytest.raises(UserError, match=r"piqa_valid.jsonl: is empty"):
        run_task(RuleLM(), own_tasks()["piqa"], data_dir=str(tmp_path))
    write_rows(tmp_path, "bbh/lies.jsonl", [{"input": "a", "target": "b"}] * 3)
    with pytest.raises(UserError, match=r"lies of bbh/\*.jsonl has 3 problems"):
        run_task(RuleLM(), own_tasks()["bbh"], data_dir=str(tmp_path))


# ----- the real files ---------------------------------------------------------------------------


@real
@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(CASES))
def test_real_files_make_sensible_requests(name: str) -> None:
    folder = Path(os.environ["LIT_LLM_DATA"]) / "eval"
    lm = RuleLM()
    result = run_task(lm, own_tasks()[name], data_dir=str(folder))
    assert result.skipped is None
    assert result.settings["items"] >= 100
    assert len({answer.item for answer in result.answers}) == result.settings["items"]
    for context, rest in lm.asked:
        assert "{{" not in context.replace("\\frac{{", "") and "None" not in context.split("\n")
        if isinstance(rest, str):
            assert rest.strip()
    for measurement in result.measurements:
        # A model that goes by length alone is near to chance on all but two.
        if measurement.chance and name not in ("cryobiology_es", "commonsense_qa_cloze"):
            assert abs(measurement.value - measurement.chance) < 0.25, measurement.metric


@real
@pytest.mark.thorough
def test_real_files_are_as_large_as_published() -> None:
    folder = Path(os.environ["LIT_LLM_DATA"]) / "eval"
    sizes = {"piqa": 1838, "commonsense_qa": 1221, "mmlu": 1531, "truthfulqa_mc1": 817}
    sizes |= {"crows_pairs": 1508, "winogender": 240, "xstest": 450, "svamp": 1000}
    for name, size in sizes.items():
        result = run_task(RuleLM(), own_tasks()[name], data_dir=str(folder))
        assert result.settings["items"] == size, name
    path = folder / "truthfulqa" / "generation.jsonl"
    assert len(path.read_text(encoding="utf-8").splitlines()) == 817
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[0])["question"]
