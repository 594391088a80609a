"""Formats: what a record becomes, and one sentence with its place where it is wrong."""

import datetime

import pyarrow
import pyarrow.parquet
import pytest

from lit_llm.data.conversations import Completion, Conversation, Tokens, read_samples
from lit_llm.data.records import RecordSource
from lit_llm.errors import UserError
from tests.data.test_sources import jsonl

HELLO = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


@pytest.fixture
def samples(tmp_path):
    """The samples of a file with the given records, without their place."""

    def read(*records: dict, **options) -> list:
        file = tmp_path / "a.jsonl"
        file.write_bytes(jsonl(*records))
        found = list(read_samples(RecordSource(str(file), **options)))
        assert all(sample.origin.startswith(f"{file}:") for sample in found)
        return found

    return read


@pytest.fixture
def turns(samples):
    """The one conversation that a record gives, as pairs, with a weight where it is 0."""

    def read(record: dict, **options) -> list[tuple]:
        (sample,) = samples(record, **options)
        assert isinstance(sample, Conversation)
        return [
            (m["role"], m["content"]) if m.get("weight", 1) else (m["role"], m["content"], 0)
            for m in sample.messages
        ]

    return read


@pytest.fixture
def error_of(samples, tmp_path):
    def read(*records: dict, **options) -> str:
        with pytest.raises(UserError) as caught:
            samples(*records, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value).removeprefix(str(tmp_path))

    return read


def user(text):
    return ("user", text)


def assistant(text, *weight):
    return ("assistant", text, *weight)


# --- messages


@pytest.mark.parametrize("field", ["messages", "conversations", "conversation"])
def test_messages(samples, field):
    (sample,) = samples({"id": 3, field: HELLO, "tools": None, "chat_template_kwargs": {"a": 1}})
    assert (sample.messages, sample.group, sample.tools) == (HELLO, "hello", None)
    assert sample.answer_format is None


def test_what_a_template_may_ask_for_is_kept(samples):
    call = [{"type": "function", "function": {"name": "light", "arguments": {"on": True}}}]
    messages = [
        {"role": "developer", "content": "Be kind.", "name": None},
        {"role": "user", "content": "Light!"},
        {"role": "assistant", "tool_calls": call},
        {"role": "tool", "name": "light", "content": "on"},
        {"role": "assistant", "content": "Done.", "thinking": "easy", "weight": 0},
    ]
    (sample,) = samples({"messages": messages, "tools": [{"name": "light"}]})
    assert sample.messages == [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "Light!"},
        {"role": "assistant", "content": "", "tool_calls": call},
        {"role": "tool", "content": "on", "name": "light"},
        {"role": "assistant", "content": "Done.", "thinking": "easy", "weight": 0},
    ]
    assert sample.tools == [{"name": "light"}]
    assert sample.group == "Light!"


def test_tools_as_text_and_none(samples):
    (sample,) = samples({"messages": HELLO, "tools": '[{"name": "f"}]'})
    assert sample.tools == [{"name": "f"}]
    assert [s.tools for s in samples(*({"messages": HELLO, "tools": t} for t in ("", [])))] == [
        None,
        None,
    ]


def test_parts_of_text_are_joined(turns):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert turns({"messages": [{"role": "user", "content": parts}]}) == [user("one two")]


def test_a_time_stamp_is_nothing_for_a_template(tmp_path):
    when = {"timestamp": datetime.datetime(2024, 1, 1), "lang": "en"}
    table = pyarrow.table({"conversation": [[message | when for message in HELLO]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (sample,) = read_samples(RecordSource(str(tmp_path / "a.parquet")))
    assert sample.messages == [message | {"lang": "en"} for message in HELLO]


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("hi", "message 2 of 'messages' is a string, not an object with a role and content."),
        (
            {"content": "x"},
            "message 2 of 'messages': has no field 'role'; its fields are: 'content'",
        ),
        (
            {"role": "bot", "content": "x"},
            "message 2 of 'messages': role 'bot' is unknown; the role",
        ),
        ({"role": "user"}, "message 2 of 'messages': has no field 'content'"),
        ({"role": "user", "content": None}, "message 2 of 'messages': has no field 'content'"),
        (
            {"role": "user", "content": 5},
            "message 2 of 'messages': field 'content' is a number, not",
        ),
        (
            {"role": "user", "content": [{"type": "image", "url": "u"}]},
            "message 2 of 'messages': holds a part of type 'image'; only text can be trained on.",
        ),
        (
            {"role": "assistant", "content": "x", "weight": 0.5},
            "message 2 of 'messages': weight 0.5 must be 1, or 0",
        ),
        (
            {"role": "user", "content": "\ud83d"},
            "message 2 of 'messages': field 'content' holds half of a surrogate pair",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "\ud83d"}}]},
            "message 2 of 'messages': field 'tool_calls' holds half of a surrogate pair",
        ),
    ],
)
def test_a_bad_message_is_told_with_its_place(error_of, message, sentence):
    good = {"messages": HELLO}
    assert error_of(good, {"messages": [HELLO[0], message]}).startswith(f"/a.jsonl:2: {sentence}")


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"messages": []}, "field 'messages' is an empty list"),
        ({"messages": "hi"}, "field 'messages' is a string, not a list of messages."),
        ({"messages": HELLO, "tools": "{"}, "field 'tools' is not JSON"),
        ({"messages": HELLO, "tools": {"a": 1}}, "field 'tools' is an object, not a list"),
        ({"messages": HELLO, "images": ["x.png"]}, "field 'images' says that images belong"),
    ],
)
def test_a_bad_conversation(error_of, record, sentence):
    assert error_of(record).startswith(f"/a.jsonl:1: {sentence}")


# --- prompt and completion


def test_texts_are_joined_as_they_are(samples, tmp_path):
    origin = f"{tmp_path / 'a.jsonl'}:1"
    assert samples({"prompt": "The sky is", "completion": " blue."}) == [
        Completion("The sky is", " blue.", origin, "The sky is")
    ]
    # Every reference answer is a sample.
    assert samples({"prompt": "a", "completion": ["b", "c"]}) == [
        Completion("a", "b", origin, "a"),
        Completion("a", "c", origin, "a"),
    ]


def test_of_messages_only_the_completion_is_trained_on(turns, samples):
    record = {
        "prompt": [*HELLO, {"role": "user", "content": "how are you?"}],
        "completion": [{"role": "assistant", "content": "fine"}],
        "tools": [{"name": "f"}],
    }
    assert turns(record) == [
        user("hello"),
        assistant("hi", 0),
        user("how are you?"),
        assistant("fine"),
    ]
    assert samples(record)[0].group == "hello"
    assert samples(record)[0].tools == [{"name": "f"}]


def test_texts_as_turns(turns):
    record = {"prompt": "hello", "completion": "hi"}
    assert turns(record, format="chat_prompt_completion") == [user("hello"), assistant("hi")]


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"prompt": "x", "completion": HELLO}, "field 'completion' is an object, not a string."),
        ({"prompt": HELLO, "completion": "x"}, "field 'completion' is a string, not a list of"),
        ({"prompt": "x", "completion": []}, "field 'completion' is an empty list"),
        ({"prompt": 1, "completion": "x"}, "field 'prompt' is a number, not a string."),
    ],
)
def test_a_bad_prompt_or_completion(error_of, record, sentence):
    assert error_of(record).startswith(f"/a.jsonl:1: {sentence}")


# --- Alpaca and ShareGPT


def test_alpaca(turns, samples):
    assert turns({"instruction": "Spell.", "input": "freind", "output": "friend"}) == [
        user("Spell.\n\nfreind"),
        assistant("friend"),
    ]
    for record in ({"input": ""}, {"input": None}, {"input": " \n"}, {}):
        assert turns({"instruction": "Say hi.", "output": "hi"} | record)[0] == user("Say hi.")
    assert turns(
        {
            "instruction": "c",
            "output": "d",
            "system": "Be brief.",
            "history": [["a", "b"], ["a2", "b2"]],
        }
    ) == [
        ("system", "Be brief."),
        user("a"),
        assistant("b"),
        user("a2"),
        assistant("b2"),
        user("c"),
        assistant("d"),
    ]
    first, second = samples({"instruction": "a", "output": ["b", "c"]})
    assert (first.messages[-1]["content"], second.messages[-1]["content"]) == ("b", "c")


def test_sharegpt(turns, samples):
    names = ["human", "gpt", "user", "chatgpt", "tool", "bing", "observation", "model"]
    talk = [{"from": name, "value": name} for name in [*names, "function_response"]]
    roles = [role for role, _ in turns({"conversations": talk})]
    assert roles == ["user", "assistant"] * 2 + ["tool", "assistant"] * 2 + ["tool"]
    talk = [{"from": "human", "value": "a"}, {"from": "function_call", "value": "b", "weight": 0}]
    record = {"conversations": talk, "system": "Be kind.", "tools": '[{"name": "f"}]'}
    assert turns(record) == [("system", "Be kind."), user("a"), assistant("b", 0)]
    assert (samples(record)[0].group, samples(record)[0].tools) == ("a", [{"name": "f"}])
    record["conversations"] = [{"from": "system", "value": "Own."}, *talk]
    assert turns(record)[:2] == [("system", "Own."), user("a")]


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"conversations": [{"from": "alien", "value": "x"}]}, "speaker 'alien' is unknown; those"),
        ({"conversations": [{"from": "human"}]}, "has no field 'value'"),
        (
            {"conversations": [{"from": "gpt", "value": "", "weight": 2}]},
            "weight 2 must be 1, or 0",
        ),
    ],
)
def test_bad_sharegpt(error_of, record, sentence):
    wanted = f"/a.jsonl:1: message 1 of 'conversations': {sentence}"
    assert error_of(record).startswith(wanted)


def test_bad_alpaca(error_of):
    record = {"instruction": "a", "output": "b"}
    assert error_of(record | {"history": [["q"]]}).startswith(
        "/a.jsonl:1: turn 1 of 'history' is not a pair"
    )
    assert "field 'input' is a list, not a string" in error_of(record | {"input": ["x"]})


# --- texts and tokens


def test_text(samples, tmp_path):
    assert samples({"text": "The sky is blue."}) == [
        Completion("", "The sky is blue.", f"{tmp_path / 'a.jsonl'}:1", "The sky is blue.")
    ]


@pytest.mark.parametrize(
    ("columns", "ids", "trained"),
    [
        ({}, [5, 6, 7], [1, 1, 1]),
        ({"labels": [-100, 6, 7]}, [5, 6, 7], [0, 1, 1]),
        ({"completion_mask": [0, 1, 1]}, [5, 6, 7], [0, 1, 1]),
        ({"assistant_masks": [0, 1, 0]}, [5, 6, 7], [0, 1, 0]),
        ({"completion_mask": [0, 0, 1], "assistant_masks": [1, 0, 1]}, [5, 6, 7], [0, 0, 1]),
        # Labels are what masks would only be turned into.
        ({"labels": [-100, 6, -100], "completion_mask": [1, 1, 1]}, [5, 6, 7], [0, 1, 0]),
        ({"attention_mask": [1, 1, 0]}, [5, 6], [1, 1]),
        ({"attention_mask": [0, 1, 1], "labels": [-100, -100, 7]}, [6, 7], [0, 1]),
    ],
)
def test_tokens(samples, columns, ids, trained):
    (sample,) = samples({"input_ids": [5, 6, 7], **columns})
    assert isinstance(sample, Tokens)
    assert (sample.input_ids, sample.trained) == (ids, list(map(bool, trained)))


def test_equal_prompts_of_tokens_are_one_group(samples):
    found = samples(
        {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]},
        {"input_ids": [1, 2, 4, 5], "labels": [-100, -100, 4, -100]},
        {"input_ids": [1, 3, 3], "labels": [-100, -100, 3]},
        {"input_ids": [1, 2]},
    )
    assert found[0].group == found[1].group
    assert found[0].group != found[2].group
    assert samples({"input_ids": [1, 2]})[0].group != samples({"input_ids": [1, 3]})[0].group


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"input_ids": [1, 2], "labels": [1]}, "field 'labels' has 1 values for 2 tokens."),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "label 2 is neither -100 nor the token at"),
        ({"input_ids": [1.5]}, "field 'input_ids' is not a list of whole numbers."),
        ({"input_ids": "x"}, "field 'input_ids' is not a list of whole numbers."),
        ({"input_ids": [-1]}, "field 'input_ids' is empty or holds a negative number."),
        ({"input_ids": []}, "field 'input_ids' is empty or holds a negative number."),
    ],
)
def test_bad_tokens(error_of, record, sentence):
    assert error_of(record).startswith(f"/a.jsonl:1: {sentence}")
