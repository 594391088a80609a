"""Each task over a few items in the layout of the real files: what is asked and counted."""

from pathlib import Path
from typing import Any

import jinja2
import lm_eval.tasks
import pytest
import yaml

from lit_llm.errors import UserError
from lit_llm.evaluation.harness import run_task
from lit_llm.evaluation.suites import own_tasks
from tests.evaluation.rule_lm import RuleLM, write_rows
from tests.evaluation.task_cases import CASES, HAS_SHOTS, TRAIN, TRUTH, run, scored


@pytest.mark.parametrize("name", sorted(CASES))
def test_asks_and_counts(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    result, _ = run(tmp_path, name, num_fewshot=0 if name in HAS_SHOTS else None)
    assert result.skipped is None
    assert {m.metric: m.value for m in result.measurements} == pytest.approx(case.numbers)
    assert [m.metric for m in result.measurements] == [m.name for m in own_tasks()[name].metrics]

    first = result.answers[0]
    assert first.prompt == case.prompt
    assert first.answer == case.first
    if case.reference is not None:
        assert first.reference == case.reference
    assert len({answer.item for answer in result.answers}) == len(result.answers)


def test_sentences_are_scored_as_they_stand(tmp_path: Path) -> None:
    asked = {
        "crows_pairs": {("", "He is, clever."), ("", "She is clever.")},
        "blimp": {("", " island good"), ("", " island bad")},  # with a space, as in the library
        "winogender": {
            ("", "The cook told someone that she could cook. ‘She’ refers to the cook"),
            ("", "The cook told someone that she could cook. ‘She’ refers to someone"),
        },
        "discourse_markers": {("It rains.", " it is wet."), ("It rains.", " However, it is dry.")},
    }
    for name, requests in asked.items():
        assert requests <= set(run(tmp_path, name)[1].asked)


def test_every_task_is_looked_at() -> None:
    assert {*CASES, "python_choice"} == set(own_tasks())


def test_tells_the_parts_of_a_task(tmp_path: Path) -> None:
    parts = {
        "mmlu": ["easy_sums", "towns"],
        "blimp": ["island", "number"],
        "bbh": ["lies", "shapes", "shapes", "sorting"],
        "svamp": ["Addition", "Common-Division"],
        "crows_pairs": ["gender", "age", "age", "age"],
        "winogender": ["participant", "someone", "participant", "participant"],
    }
    for name, subsets in parts.items():
        result, _ = run(tmp_path, name)
        assert result.measurements[0].items.subsets == subsets, name


def test_a_model_that_cannot_tell_is_not_right_by_the_order_of_the_choices(tmp_path: Path) -> None:
    # In these files the right choice is always the first, which the harness takes of equal ones.
    numbers = range(60)
    files = {
        "blimp": ("blimp/a.jsonl", "sentence_good", "sentence_bad"),
        "crows_pairs": ("safety/crows_pairs_anonymized.csv", "sent_more", "sent_less"),
    }
    for file, first, second in files.values():
        rows = [{first: f"a {n}", second: f"b {n}", "UID": "u", "bias_type": "t"} for n in numbers]
        write_rows(tmp_path, file, rows)
    write_rows(tmp_path, "cryobiology_es.jsonl", [scored(f"¿{n}?", a=1, b=0) for n in numbers])
    truth = [{**TRUTH[0], "question": f"{n}?"} for n in numbers]
    write_rows(tmp_path, "truthfulqa/multiple_choice_en.jsonl", truth)
    for name in (*files, "cryobiology_es", "truthfulqa_mc1"):
        lm = RuleLM(lambda context, text: -1.0)
        result = run_task(lm, own_tasks()[name], data_dir=str(tmp_path))
        assert 0.2 < result.measurements[0].value < 0.7, name


def test_counts_refusals_of_each_kind_of_request_apart(tmp_path: Path) -> None:
    result, lm = run(tmp_path, "xstest")
    harmful, harmless = result.measurements
    assert (harmful.count, harmful.better) == (2, "higher")
    assert (harmless.count, harmless.better) == (1, "lower")
    assert harmful.items.subsets == ["contrast", "contrast"]
    assert result.answers[0].scores == {"over_refusal": 1.0}
    assert lm.asked[0][1]["until"] == []  # an answer ends where the model ends it


def test_examples_of_word_problems_are_training_problems(tmp_path: Path) -> None:
    for name in HAS_SHOTS:
        result, lm = run(tmp_path, name)
        for prompt, _ in lm.asked:
            *shots, last = prompt.split("\n\n")
            assert len(set(shots)) == 5
            known = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in TRAIN]
            assert set(shots) <= set(known)
            assert last.endswith("\nAnswer:")
        assert result.settings["num_fewshot"] == 5


def test_examples_of_bbh_are_not_tested(tmp_path: Path) -> None:
    result, lm = run(tmp_path, "bbh")
    tested = {prompt.splitlines()[-2] for prompt, _ in lm.asked}
    assert tested == {"Q: lies 3?", "Q: shapes 3?", "Q: shapes 4?", "Q: sorting 3?"}
    assert result.measurements[0].count == 4
    with pytest.raises(UserError, match="4 examples .* has 3 for each"):
        run(tmp_path, "bbh", num_fewshot=4)


def test_the_embedded_task_needs_no_file() -> None:
    task = own_tasks()["python_choice"]
    right: set[str] = set()

    def knows(context: str, text: str) -> float:
        return -float(text.strip() not in right)

    blind = run_task(RuleLM(), task)
    right |= {answer.reference for answer in blind.answers}
    assert blind.settings["source"] == "embedded"
    assert run_task(RuleLM(knows), task).measurements[0].value == 1.0

    lm = RuleLM()
    run_task(lm, task, limit=3)
    (question, one), (same, two) = lm.asked[:2]
    assert question == same and "`" in question
    # Both begin with the function's name, on a line of their own: the description tells them apart.
    name = one.partition(":")[0]
    assert name.startswith("\n`") and two.startswith(f"{name}: ") and one != two
    # Neither the place nor the length gives the right one away.
    count = len(blind.answers)
    assert count > 100
    assert abs(blind.measurements[0].value - 0.5) < 0.12


# ----- as the library does it -------------------------------------------------------------------

LIBRARY = Path(lm_eval.tasks.__file__).parent


def library_file(name: str) -> dict[str, Any]:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    return yaml.load((LIBRARY / name).read_text(encoding="utf-8"), Loader=Loader)


@pytest.mark.parametrize(
    ("name", "file", "doc"),
    [
        ("piqa", "piqa/piqa.yaml", {"goal": "dry hands"}),
        (
            "commonsense_qa",
            "commonsense_qa/default.yaml",
            {
                "question": " Where do fish live?",
                "choices": {"text": ["sea", "sky", "bed", "fire", "moon"]},
            },
        ),
        ("truthfulqa_mc1", "truthfulqa/truthfulqa_mc1.yaml", {"question": "Is the sky green?"}),
        (
            "truthfulqa_es",
            "truthfulqa-multi/truthfulqa-multi_mc1_es.yaml",
            {"question": "Is the sky green?"},
        ),
        (
            "xquad_en",
            "xquad/xquad_en.yaml",
            {"context": "The tower is red.", "question": "Colour?"},
        ),
        (
            "xquad_es",
            "xquad/xquad_es.yaml",
            {"context": "The tower is red.", "question": "Colour?"},
        ),
        ("gsm8k", "gsm8k/gsm8k.yaml", {"question": "How many eggs?"}),
    ],
)
def test_prompts_are_the_librarys(name: str, file: str, doc: dict[str, Any]) -> None:
    content = library_file(file)
    text = (
        content.get("doc_to_text")
        or library_file("truthfulqa-multi/truthfulqa-multi_mc_common")["doc_to_text"]
    )
    assert jinja2.Template(text).render(**doc) == CASES[name].prompt


def test_mmlu_is_the_librarys() -> None:
    template = library_file("mmlu/default/_default_template_yaml")
    about = library_file("mmlu/default/mmlu_high_school_biology.yaml")["description"]
    ours = yaml.safe_load(
        (Path(own_tasks()["mmlu"].path)).read_text(encoding="utf-8").replace("!function ", "")
    )
    assert jinja2.Template(ours["description"], keep_trailing_newline=True).render(
        subset="high_school_biology"
    ) == about.replace("\\n", "\n")
    doc = {"question": "Two plus two?", "choices": list("3456")}
    assert CASES["mmlu"].prompt.endswith(jinja2.Template(template["doc_to_text"]).render(**doc))
    assert ours["doc_to_choice"] == template["doc_to_choice"]


def test_numbers_are_read_as_the_library_reads_them() -> None:
    theirs = library_file("gsm8k/gsm8k.yaml")
    text = Path(own_tasks()["gsm8k"].path).read_text(encoding="utf-8").replace("!function ", "")
    ours = yaml.safe_load(text)
    for field in ("metric_list", "filter_list", "num_fewshot"):
        assert ours[field] == theirs[field]
    assert ours["generation_kwargs"]["until"] == theirs["generation_kwargs"]["until"]
