"""Prompts as they are read: which format a record has, and what of it is asked."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from lit_llm.data import python_preferences, python_questions
from lit_llm.data.conversations import FORMATS as SAMPLE_FORMATS
from lit_llm.data.conversations import Conversation
from lit_llm.data.preferences import FORMATS as PREFERENCE_FORMATS
from lit_llm.data.preferences import Preference
from lit_llm.data.prompt_formats import (
    PromptRecord,
    describe_prompt_format,
    detect_prompt_format,
    prompt_fingerprint,
    prompt_format,
    read_prompts,
)
from lit_llm.data.record_formats import Record
from lit_llm.data.records import RecordFormat, RecordSource
from lit_llm.errors import UserError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def read(tmp_path: Path):
    def reading(*records: dict[str, Any], first_words: int = 0, **options: Any) -> Any:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return list(read_prompts(RecordSource(str(path), **options), first_words))

    return reading


ASKED = [user("Why?")]
FOUND = {
    # Prompts alone.
    "prompt": ({"prompt": "Why?"}, ASKED, None),
    "question and answer": ({"question": "Why?", "answer": "So.\n#### 7"}, ASKED, "So.\n#### 7"),
    "instruction": ({"instruction": "Why?"}, ASKED, None),
    "instruction with input": (
        {"instruction": "Sum up.", "input": "Long.", "reference": "Short."},
        [user("Sum up.\n\nLong.")],
        "Short.",
    ),
    "system": (
        {"system": "Be brief.", "question": "Why?"},
        [{"role": "system", "content": "Be brief."}, *ASKED],
        None,
    ),
    "number": ({"question": "6 + 1", "answer": 7}, [user("6 + 1")], "7"),
    "messages as prompt": (
        {"prompt": [user("A"), assistant("B"), user("C")], "reference": [assistant("D")]},
        [user("A"), assistant("B"), user("C")],
        "D",
    ),
    "message as prompt": ({"prompt": user("A")}, [user("A")], None),
    "messages as prompt with an answer": ({"prompt": [*ASKED, assistant("So.")]}, ASKED, "So."),
    "null answer": ({"prompt": "Why?", "answer": None}, ASKED, None),
    "text beside a question": ({"prompt": "Why?", "text": "Why? So."}, ASKED, None),
    # Fine-tuning.
    "messages": (
        {"messages": [user("A"), assistant("B"), user("C"), assistant("D")]},
        [user("A"), assistant("B"), user("C")],
        "D",
    ),
    "messages without an answer": ({"messages": ASKED}, ASKED, None),
    "two answers in a row": (
        {"messages": [*ASKED, assistant("So."), assistant("And so.")]},
        ASKED,
        "So.\n\nAnd so.",
    ),
    "alpaca": ({"instruction": "Why?", "input": "", "output": "So."}, ASKED, "So."),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        ASKED,
        "So.",
    ),
    "prompt and completion": ({"prompt": "2+2=", "completion": " 4"}, "2+2=", "4"),
    "tokens": ({"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, 8, 9]}, (5, 6, 7), None),
    # Preferences.
    "preference": ({"prompt": "Q: ", "chosen": "good", "rejected": "bad"}, "Q: ", "good"),
    "hh": (
        {
            "chosen": "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D",
            "rejected": "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: E",
        },
        [user("A"), assistant("B"), user("C")],
        "D",
    ),
    "preference before fine-tuning": (
        {"instruction": "Why?", "output": "So.", "chosen": "Thus.", "rejected": "No."},
        ASKED,
        "Thus.",
    ),
    "stack_exchange": ({"question": "Why?", "response_j": "A", "response_k": "B"}, ASKED, "A"),
    "ranked": (
        {"instruction": "Why?", "completions": ["bad", "good", "so so"], "ranks": [3, 1, 2]},
        ASKED,
        "good",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("record", "prompt", "reference"), FOUND.values(), ids=FOUND)
def test_what_is_asked_in_a_record(read: Any, record: Any, prompt: Any, reference: Any) -> None:
    (found,) = read(record)
    assert found.prompt == prompt
    assert found.reference == reference


GROUPS = {
    "question and answer": "Why?",
    "messages as prompt": "A",
    "messages": "A",
    "alpaca": "Why?",
    "prompt and completion": "2+2=",
    "preference": "Q: ",
    "hh": "A",
    "ranked": "Why?",
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_group_is_the_first_question(read: Any, name: str) -> None:
    assert read(FOUND[name][0])[0].group == GROUPS[name]


def test_the_format_can_be_given(read: Any) -> None:
    (found,) = read({"prompt": "2+2=", "completion": "4"}, format="prompt")
    assert (found.prompt, found.reference) == ([user("2+2=")], "4")
    (found,) = read({"prompt": "The film", "domain": "x"}, format="plain_prompt")
    assert (found.prompt, found.reference, found.continued) == ("The film", None, True)
    (found,) = read({"query": "Why?"}, rename={"query": "question"})
    assert found.prompt == ASKED
    (found,) = read({"prompt": "Why?", "completion": "So."}, format="chat_prompt_completion")
    assert (found.prompt, found.reference, found.continued) == (ASKED, "So.", False)


def test_tools_and_options_come_along(read: Any) -> None:
    more = {"tools": [{"name": "f"}], "chat_template_kwargs": {"enable_thinking": False}}
    for record in ({"prompt": "Why?"}, {"messages": [*ASKED, assistant("So.")]}):
        (found,) = read({**record, **more})
        assert (found.tools, found.template_options) == (
            [{"name": "f"}],
            {"enable_thinking": False},
        )


def test_first_words_of_texts(read: Any) -> None:
    records = [
        {"text": "one  two, three\nfour", "label": 1},
        {"text": "one", "label": 0},
        {"text": "one two", "label": 0},
    ]
    found = read(*records, first_words=2)
    assert [(own.prompt, own.reference) for own in found] == [
        ("one  two,", "three\nfour"),
        ("one", None),
        ("one two", None),
    ]
    # The group is that of the text in pre-training and fine-tuning: the whole of it.
    assert [own.group for own in found] == [record["text"] for record in records]
    assert all(own.continued for own in found)
    (found,) = read({"prompt": "one two three"}, format="plain_prompt", first_words=1)
    assert found.prompt == "one"
    # Questions are not cut.
    (found,) = read({"prompt": "Why is it so?"}, first_words=1)
    assert found.prompt == [user("Why is it so?")]
    (found,) = read({"prompt": "2 + 2 =", "completion": "4"}, first_words=1)
    assert found.prompt == "2 + 2 ="


def test_python_docs_are_asked_as_in_fine_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [*ASKED, assistant("So."), user("And?"), assistant("Yes.")]
    one = Conversation(told, "python-docs:a", "a", None, "Yes|No", None)
    monkeypatch.setattr(python_questions, "collect_conversations", lambda: [one, one])
    source = RecordSource("python-docs", max_records=1)
    assert list(read_prompts(source)) == [
        PromptRecord(told[:3], "Yes.", "python-docs:a", "a", None, None, "Yes|No")
    ]
    before = prompt_fingerprint(source)
    monkeypatch.setattr(python_questions, "collect_conversations", lambda: [one])
    assert prompt_fingerprint(source) != before


def test_python_parameters_are_asked_as_in_preferences(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ([assistant("No.")], [assistant("So.")])
    one = Preference(ASKED, answers, ((1, 0),), None, "python-docs:f", "f")
    monkeypatch.setattr(python_preferences, "collect_parameter_preferences", lambda: [one])
    source = RecordSource("python-parameters")
    assert list(read_prompts(source)) == [PromptRecord(ASKED, "So.", "python-docs:f", "f")]
    before = prompt_fingerprint(source)
    monkeypatch.setattr(python_preferences, "collect_parameter_preferences", lambda: [one, one])
    assert prompt_fingerprint(source) != before


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([{"text": "a b c"}], {}, r"data\.jsonl: holds texts.*--data\.first_words 8.*plain_prompt"),
        ([{"text": "a b c"}], {"format": "text"}, "holds texts, which ask for nothing"),
        ([{"label": 1}], {}, r"data\.jsonl:1: holds no prompt.*prompt \(prompt or question or ins"),
        ([{"prompt": 3}], {}, r"data\.jsonl:1: field 'prompt' is a number, not a list of messages"),
        ([{"prompt": []}], {}, "field 'prompt' is an empty list"),
        ([{"prompt": "a"}, {"question": "b"}], {"format": "messages"}, "has no field 'messages'"),
        ([{"prompt": "a"}, {"label": 3}], {}, r"data\.jsonl:2: has no field 'prompt'"),
        ([{"prompt": "a", "answer": True}], {}, "field 'answer' is a boolean, not a string"),
        ([{"prompt": "a", "answer": ["b"]}], {}, "message 1 of 'answer' is a string"),
        ([{"prompt": [user("a")]}], {"format": "plain_prompt"}, "is a list, not a string"),
    ],
)
def test_mistakes(read: Any, records: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read(*records, **options)
    assert "\n" not in str(error.value)


def test_every_format_has_a_place_and_a_description() -> None:
    for name in get_args(RecordFormat)[1:]:
        assert name in SAMPLE_FORMATS or name in PREFERENCE_FORMATS or "prompt" in name
        description = describe_prompt_format(name)
        # Nothing of the data is trained on here.
        assert "trained on" not in description and len(description) > 20
    assert describe_prompt_format("prompt_completion").endswith("messages through it")
    assert detect_prompt_format(Record({"text": "a"}, "here")) == "plain_prompt"
    assert prompt_format(RecordSource("python-docs")) == "messages"
