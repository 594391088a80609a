"""Prompts of real data sets: how many, and what was read in them by eye."""

import os
from pathlib import Path

import pytest

from lit_llm.data.preferences import read_preferences
from lit_llm.data.prompt_formats import PromptRecord, prompt_format, read_prompts
from lit_llm.data.records import RecordSource
from lit_llm.data.splits import assign_split

pytestmark = pytest.mark.skipif(
    "LIT_LLM_DATA" not in os.environ, reason="LIT_LLM_DATA names no data folder"
)


def source(name: str, **options) -> RecordSource:
    return RecordSource(str(Path(os.environ["LIT_LLM_DATA"]) / name), **options)


def prompts(name: str, first_words: int = 0, **options) -> list[PromptRecord]:
    return list(read_prompts(source(name, **options), first_words))


def questions(found: list[PromptRecord]) -> list[str]:
    return [own.prompt[-1]["content"] for own in found]


@pytest.mark.parametrize(
    ("name", "format", "count", "referenced"),
    [
        ("rl_prompts/hh_harmless_first_turns.jsonl", "prompt", 940, 0),
        ("rl_prompts/bold.jsonl.gz", "prompt", 19895, 0),
        ("eval/gsm8k/train.jsonl.gz", "prompt", 7473, 7473),
        ("eval/safety/xstest_prompts.csv", "prompt", 450, 0),
        ("preference/hh-rlhf", "hh", 216 + 992, 216 + 992 - 2),  # two chosen answers are empty
        ("preference/kto_en_demo.jsonl.gz", "messages", 300, 300),
        ("preference/llms_from_scratch_polite.jsonl", "alpaca_preference", 1100, 1100),
        ("preference/stack_exchange_paired_tiny.jsonl", "stack_exchange", 25, 25),
        ("sft/self_instruct_user_oriented.jsonl", "alpaca", 252, 252),
        ("sft/oasst_en_100_tree.jsonl.gz", "openassistant", 102, 102),
    ],
)
def test_every_record_of_a_data_set_is_a_prompt(name, format, count, referenced):
    assert prompt_format(source(name)) == format
    found = prompts(name)
    assert len(found) == count
    assert sum(own.reference is not None for own in found) == referenced
    assert {own.prompt[-1]["role"] for own in found} == {"user"}


def test_gsm8k():
    found = prompts("eval/gsm8k/train.jsonl.gz")
    assert questions(found)[1] == (
        "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of "
        "babysitting. How much did she earn?"
    )
    assert found[1].reference.endswith("\n#### 10")
    assert all("\n#### " in own.reference for own in found)


def test_first_turns_are_held_out_as_the_conversations_that_begin_with_them():
    first = prompts("rl_prompts/hh_harmless_first_turns.jsonl")
    told = list(read_preferences(source("preference/hh-rlhf/harmless-base/train.jsonl.gz")))
    assert {own.group for own in first} == {own.group for own in told}
    assert questions(first)[0] == told[0].prompt[0]["content"]
    asked = prompts("preference/hh-rlhf/harmless-base/train.jsonl.gz")
    assert [own.prompt for own in asked] == [own.prompt for own in told]
    held_out = {own.group for own in first if assign_split(own.group) != "train"}
    assert 50 < len(held_out) < 140


def test_beginnings_of_film_reviews():
    found = prompts("rl_prompts/movie_review_sentences.jsonl.gz", first_words=5)
    assert len(found) == 8500
    assert found[0].prompt == "the author's devotees will probably"
    assert found[0].reference == "find it fascinating ; others may find it baffling ."
    assert max(len(own.prompt.split()) for own in found) == 5
    for own in found[:100]:
        assert own.group.startswith(own.prompt)
        assert own.group.split() == f"{own.prompt} {own.reference or ''}".split()


def test_beginnings_that_are_continued_as_they_are():
    found = prompts("rl_prompts/bold.jsonl.gz", format="plain_prompt")
    assert found[0].prompt == "Jacob Zachar is an American actor whose "
    assert all(own.continued for own in found)
