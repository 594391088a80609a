"""Which format a source has, what does not fit it, and the formats of real data sets."""

import json
import os
from pathlib import Path

import pytest

from lit_llm.data import python_questions
from lit_llm.data.conversations import (
    Completion,
    Conversation,
    describe_format,
    detect_format,
    read_samples,
    source_format,
)
from lit_llm.data.records import Record, RecordSource
from lit_llm.errors import UserError
from tests.data.test_sources import jsonl

HELLO = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
ALPACA = {"instruction": "a", "output": "b"}


@pytest.fixture
def source(tmp_path):
    """A source of the given records."""

    def write(*records: dict, **options) -> RecordSource:
        file = tmp_path / "a.jsonl"
        file.write_bytes(jsonl(*records))
        return RecordSource(str(file), **options)

    return write


def error_of(source: RecordSource) -> str:
    with pytest.raises(UserError) as caught:
        list(read_samples(source))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(str(Path(source.path).parent))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"messages": HELLO, "text": "x"}, "messages"),
        ({"messages": HELLO, "prompt": "x"}, "messages"),
        ({"messages": None, "conversations": HELLO}, "messages"),
        ({"messages": []}, "messages"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "sharegpt"),
        ({"prompt": "x", "completion": "y", "label": True}, "prompt_completion"),
        ({"prompt": HELLO, "completion": HELLO, "messages": HELLO}, "prompt_completion"),
        ({"instruction": "a", "input": "", "output": "b", "text": "a b"}, "alpaca"),
        ({"message_tree_id": "t", "prompt": {}}, "openassistant"),
        ({"message_tree_id": "t", "message_id": "m", "text": "x"}, "openassistant"),
        ({"text": "x", "prompt": "y"}, "text"),
        ({"input_ids": [1], "text": "x"}, "tokens"),
    ],
)
def test_detection(data, name):
    assert detect_format(Record(data, "f:1")) == name
    assert describe_format(name)


def test_no_format_fits(source):
    sentence = error_of(source({"prompt": "x", "chosen": "y"}))
    assert sentence.startswith(
        "/a.jsonl:1: has the fields of no format that is known; its fields are: 'prompt', 'chosen'."
    )
    assert "alpaca (instruction, output)" in sentence
    assert "With rename" in sentence


def test_the_first_record_decides(source):
    assert error_of(source(ALPACA, {"messages": HELLO})).startswith(
        "/a.jsonl:2: has no field 'instruction', which the format alpaca needs; "
        "its fields are: 'messages'. The formats and the fields they need: messages ("
    )
    assert error_of(source(ALPACA, ALPACA | {"output": None})).startswith(
        "/a.jsonl:2: field 'output' is null, which the format alpaca needs"
    )


def test_a_format_that_is_given_is_the_one(source):
    both = ALPACA | {"text": "a b"}
    assert isinstance(next(read_samples(source(both))), Conversation)
    assert isinstance(next(read_samples(source(both, format="text"))), Completion)
    assert error_of(source(ALPACA, format="text")).startswith("/a.jsonl:1: has no field 'text', wh")


def test_format_of_a_source(source):
    records = [ALPACA, {"text": "x"}]
    assert source_format(source(*records)) == "alpaca"
    assert source_format(source(*records, format="text")) == "text"
    rename = {"instruction": "prompt", "output": "completion"}
    assert source_format(source(*records, rename=rename)) == "prompt_completion"


def test_rename_makes_data_fit(source):
    record = {"task": "t", "definition": "Add.", "input": "1 2", "output": "3"}
    (sample,) = read_samples(source(record, rename={"definition": "instruction"}))
    assert [m["content"] for m in sample.messages] == ["Add.\n\n1 2", "3"]


def test_python_docs(monkeypatch):
    told = [Conversation(HELLO, "python-docs:f", "f", None, "hi")]
    monkeypatch.setattr(python_questions, "collect_conversations", lambda: told)
    assert list(read_samples(RecordSource("python-docs"))) == told
    assert source_format(RecordSource("python-docs")) == "messages"


@pytest.mark.skipif("LIT_LLM_DATA" not in os.environ, reason="LIT_LLM_DATA names no data folder")
def test_real_data_sets():
    folder = Path(os.environ["LIT_LLM_DATA"]) / "sft"
    pairs = {"input": "prompt", "target": "completion"}
    rename = {
        "natural_instructions": {"definition": "instruction"},
        "mlsum_es": pairs,
        "common_gen": pairs,
    }
    wanted = {
        "alpaca_en_demo": ("alpaca", 999),
        "chatterbot_en": ("messages", 2026),
        "chatterbot_es": ("messages", 280),
        # 500 records of 2 to 8 answers.
        "common_gen": ("prompt_completion", 2 * 21 + 3 * 49 + 4 * 330 + 5 * 78 + 6 * 19 + 14 + 8),
        "flan_cot": ("alpaca", 23207),
        "gpteacher_codegen": ("alpaca", 4535),
        "gpteacher_roleplay": ("alpaca", 1923),
        "llms_from_scratch_instructions": ("alpaca", 1100),
        "mlsum_es": ("prompt_completion", 300),
        "natural_instructions": ("alpaca", 34278),
        "oasst_messages": ("messages", 254),
        "safety_tuned_llamas": ("alpaca", 2483),
        "self_instruct_seed_tasks": ("alpaca", 175),
        "self_instruct_user_oriented": ("alpaca", 252),
        "topical_chat": ("messages", 950),
    }
    found = {}
    for file in folder.glob("*.jsonl*"):
        name = file.name.partition(".")[0]
        source = RecordSource(str(file), rename=rename.get(name))
        found[name] = (source_format(source), sum(1 for _ in read_samples(source)))
    assert found.pop("oasst_en_100_tree")[0] == "openassistant"
    assert found == wanted


@pytest.mark.skipif("LIT_LLM_DATA" not in os.environ, reason="LIT_LLM_DATA names no data folder")
def test_real_trees_against_the_answers_that_others_drew_from_them():
    folder = Path(os.environ["LIT_LLM_DATA"]) / "sft"
    # One conversation for every question of the same trees, each ending with its best answer.
    drawn = {
        tuple(message["content"] for message in json.loads(line)["messages"])
        for line in (folder / "oasst_messages.jsonl").read_text().splitlines()
    }
    trained = []
    for thread in read_samples(RecordSource(str(folder / "oasst_en_100_tree.jsonl.gz"))):
        texts = tuple(message["content"] for message in thread.messages)
        for number, message in enumerate(thread.messages):
            if message["role"] == "assistant" and message.get("weight") != 0:
                trained.append(texts[: number + 1])
    assert set(trained) <= drawn
    assert len(set(trained)) == len(trained)
    # Those left out have a lesser answer among their earlier turns.
    best = set(trained)
    assert all(len(texts) > 2 and texts[:-2] not in best for texts in drawn - best)
