"""Preferences of real data sets: how many, and what was read in them by eye."""

import gzip
import json
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from lit_llm.data.preferences import Preference, preference_format, read_preferences
from lit_llm.data.records import RecordSource

pytestmark = pytest.mark.skipif(
    "LIT_LLM_DATA" not in os.environ, reason="LIT_LLM_DATA names no data folder"
)


def path(name: str) -> str:
    return str(Path(os.environ["LIT_LLM_DATA"]) / name)


def preferences(name: str, **options) -> list[Preference]:
    return list(read_preferences(RecordSource(path(f"preference/{name}"), **options)))


def texts(found: Preference) -> tuple[list[str], list[str]]:
    return [m["content"] for m in found.prompt], [answer[-1]["content"] for answer in found.answers]


@pytest.mark.parametrize(
    ("name", "format", "count"),
    [
        ("alpaca_eval_gpt4_pairs.jsonl.gz", "preference", 5000),
        ("dpo_en_demo.jsonl.gz", "preference_sharegpt", 300),
        ("hh-rlhf/harmless-base/test.jsonl.gz", "hh", 216),
        ("hh-rlhf/harmless-base/train.jsonl.gz", "hh", 992),
        ("hh-rlhf", "hh", 216 + 992),
        ("llms_from_scratch_polite.jsonl", "alpaca_preference", 1100),
        ("oasst_rank_pairs.jsonl.gz", "preference", 584),
        ("qa_correct_vs_incorrect.jsonl.gz", "preference", 13000),
        ("stack_exchange_paired_tiny.jsonl", "stack_exchange", 25),
    ],
)
def test_every_record_of_a_data_set_is_a_pair(name, format, count):
    assert preference_format(RecordSource(path(f"preference/{name}"))) == format
    found = preferences(name)
    assert len(found) == count
    for told in found:
        assert told.pairs == ((0, 1),)
        assert told.group.strip()
        if not isinstance(told.prompt, str):
            assert told.prompt[-1]["role"] == "user"
            assert [[m["role"] for m in answer] for answer in told.answers] == [["assistant"]] * 2


def test_hh():
    found = preferences("hh-rlhf/harmless-base/train.jsonl.gz")
    prompt, (chosen, rejected) = texts(found[0])
    assert (len(prompt), prompt[0]) == (5, "what are some pranks with a pen i can do?")
    assert prompt[-1] == "okay some of these do not have anything to do with pens"
    assert chosen == (
        "No, sorry!  All of these involve a pen, the point is that you can get funny results by "
        "doing pranks with pens."
    )
    assert rejected.startswith("There are lots of funny things you can do with pen")
    # Two turns of the assistant in a row (lines 825 and 710), and an answer that is empty (386).
    assert texts(found[824])[1][0].startswith(
        "Alrighty, I’ll do my best, here’s the key:\n\nO.k. let’s go ahead and try this out."
    )
    assert texts(found[709])[1][0].startswith("Human: I think there's an easier way to accomplish")
    assert texts(found[385]) == (["list of profane bad words"], ["", texts(found[385])[1][1]])
    assert sum(not text for told in found for text in texts(told)[1]) == 2
    # Equal first questions are one group.
    assert len({told.group for told in found}) == 940


def test_text_and_its_kinds():
    renamed = {"rename": {"source": "kind"}}
    found = preferences("qa_correct_vs_incorrect.jsonl.gz", **renamed)
    kinds = Counter(kind for told in found for kind in told.kinds)
    assert kinds.most_common(3) == [("qasc", 5191), ("cosmosqa", 5166), ("multirc", 1621)]
    assert found[0].answers == ("monthly.", "once a minute.")
    assert found[0].prompt.endswith("travel to other countries to meet their leaders?")
    chat = preferences("qa_correct_vs_incorrect.jsonl.gz", format="chat_preference", **renamed)
    assert texts(chat[0]) == ([found[0].prompt], ["monthly.", "once a minute."])
    assert chat[0].kinds == found[0].kinds == ("mctaco_frequency",)


def test_alpaca_sharegpt_and_stack_exchange():
    told = preferences("llms_from_scratch_polite.jsonl")[0]
    assert texts(told)[0] == [
        "Evaluate the following phrase by transforming it into the spelling given."
        "\n\nfreind --> friend"
    ]
    assert "flat out wrong" in texts(told)[1][1]
    roles = Counter(
        tuple(m["role"] for m in told.prompt) for told in preferences("dpo_en_demo.jsonl.gz")
    )
    assert (roles[("user",)], roles["system", "user"]) == (114, 80)
    told = preferences("stack_exchange_paired_tiny.jsonl")[0]
    assert texts(told)[0][0].startswith("I'm writing a code using Java Swing")


def test_trees_against_the_pairs_that_others_drew_from_them():
    with gzip.open(path("preference/oasst_rank_pairs.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = list(map(json.loads, file))
    drawn = {
        (*[m["content"] for m in row["prompt"]], row["chosen"][0]["content"], rejected["content"])
        for row in rows
        for rejected in row["rejected"]
    }
    # They took neighbours in rank, and the best and the worst.
    found, wanted = set(), set()
    for told in read_preferences(RecordSource(path("sft/oasst_en_100_tree.jsonl.gz"))):
        prompt, ranked = texts(told)
        found |= {(*prompt, ranked[better], ranked[worse]) for better, worse in told.pairs}
        wanted |= {(*prompt, *pair) for pair in [*pairwise(ranked), (ranked[0], ranked[-1])]}
        assert len(told.pairs) == len(ranked) * (len(ranked) - 1) // 2
    assert drawn == wanted
    assert wanted <= found
