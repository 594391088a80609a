"""Which format of preferences a source has, what does not fit, and what is embedded."""

import sys
from types import SimpleNamespace

import pytest

from lit_llm.data.conversations import read_samples, source_format
from lit_llm.data.preferences import (
    Preference,
    describe_preference_format,
    detect_preference_format,
    preference_fingerprint,
    preference_format,
    read_preferences,
)
from lit_llm.data.records import Record, RecordSource, record_fingerprint
from lit_llm.errors import UserError
from tests.data.test_sources import jsonl

BOTH = {"chosen": "a", "rejected": "b"}
ASKS = {"role": "user", "content": "q"}
ANSWERS = {"role": "assistant", "content": "a"}
SPOKEN = "\n\nHuman: q\n\nAssistant:"


@pytest.fixture
def source(tmp_path):
    """A source of the given records."""

    def write(*records: dict, **options) -> RecordSource:
        file = tmp_path / "a.jsonl"
        file.write_bytes(jsonl(*records))
        return RecordSource(str(file), **options)

    return write


def error_of(read, source: RecordSource) -> str:
    with pytest.raises(UserError) as caught:
        list(read(source))
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(source.path, "a.jsonl")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (BOTH, "preference"),
        (BOTH | {"prompt": "q", "instruction": "q", "messages": [ASKS]}, "preference"),
        (BOTH | {"prompt": [ASKS], "completions": []}, "preference"),
        ({"chosen": f"{SPOKEN} a", "rejected": f"{SPOKEN} b"}, "hh"),
        (BOTH | {"prompt": SPOKEN}, "hh"),
        (BOTH | {"conversations": [ASKS]}, "preference_sharegpt"),
        (BOTH | {"messages": [ASKS], "instruction": "q"}, "preference_sharegpt"),
        (BOTH | {"messages": [ASKS], "chosen": ANSWERS}, "preference_sharegpt"),
        (BOTH | {"messages": [ASKS], "chosen": [ANSWERS]}, "preference_sharegpt"),
        (BOTH | {"messages": [ASKS], "chosen": [ASKS, ANSWERS]}, "preference"),
        (BOTH | {"messages": [ASKS], "chosen": [{"from": "human"}]}, "preference"),
        (BOTH | {"instruction": "q", "input": "", "output": "a"}, "alpaca_preference"),
        (BOTH | {"instruction": "q", "prompt": None}, "alpaca_preference"),
        ({"question": "q", "response_j": "a", "response_k": "b"}, "stack_exchange"),
        ({"prompt": "q", "answers": []}, "ranked"),
        ({"instruction": "q", "completions": [], "messages": []}, "ranked"),
        ({"message_tree_id": "t", "prompt": {}}, "openassistant"),
    ],
)
def test_detection(data, name):
    assert detect_preference_format(Record(data, "f:1")) == name
    assert describe_preference_format(name)


@pytest.mark.parametrize(
    ("data", "format"),
    [
        ({"messages": [ASKS, ANSWERS], "label": True}, "messages"),
        ({"prompt": "q", "completion": "a", "label": True}, "prompt_completion"),
        ({"instruction": "q", "output": "a", "chosen": "b"}, "alpaca"),
    ],
)
def test_samples_for_fine_tuning_are_no_preferences(source, data, format):
    sentence = error_of(read_preferences, source(data))
    assert sentence.startswith(
        "a.jsonl:1: holds no comparison of answers; it is of the format "
        f"{format}, which recipes/sft.py trains on; "
    )
    assert "preference (chosen, rejected), chat_preference (prompt, chosen, rejected)" in sentence
    assert "stack_exchange (question, response_j, response_k)" in sentence


def test_a_record_of_no_format(source):
    sentence = error_of(read_preferences, source({"prompt": "q", "chosen": "a"}))
    assert sentence.startswith(
        "a.jsonl:1: holds no comparison of answers; its fields are: 'prompt', 'chosen'. The"
    )
    sentence = error_of(read_preferences, source(BOTH, {"chosen": "a", "rejected": None}))
    assert sentence.startswith(
        "a.jsonl:2: field 'rejected' is null, which the format preference needs"
    )


def test_single_answers_with_a_label_are_told_how_to_pair(source):
    record = {"prompt": "q", "completion": "a"}
    cure = (
        "single answers with a label are not read: pair a good and a bad answer to a prompt as "
        "chosen and rejected; its fields are"
    )
    assert cure in error_of(read_preferences, source(record | {"label": True}))
    assert cure in error_of(read_preferences, source({"response": "a", "label": 0}))
    assert "label" not in error_of(read_preferences, source(record))


@pytest.mark.parametrize("data", [BOTH | {"prompt": "q"}, {"response_j": "a", "response_k": "b"}])
def test_preferences_are_no_samples_for_fine_tuning(source, data):
    assert error_of(read_samples, source(data)).startswith(
        "a.jsonl:1: holds a preference; recipes/reward.py and recipes/dpo.py train on preferences; "
        "its fields are: "
    )


def test_a_format_of_the_other_kind_is_refused(source):
    both = BOTH | {"messages": [ASKS, ANSWERS]}
    for read in (read_preferences, preference_format):
        assert error_of(read, source(both, format="messages")) == (
            "source a.jsonl: the format messages does not fit here: recipes/sft.py trains on other "
            "samples; use auto, preference, chat_preference, hh, preference_sharegpt, "
            "alpaca_preference, stack_exchange, ranked, openassistant."
        )
    for read in (read_samples, source_format):
        assert error_of(read, source(both, format="hh")) == (
            "source a.jsonl: the format hh does not fit here: recipes/reward.py and recipes/dpo.py "
            "train on preferences; use auto, messages, prompt_completion, chat_prompt_completion, "
            "alpaca, sharegpt, openassistant, text, tokens."
        )


def test_format_of_a_source(source):
    records = [BOTH | {"prompt": "q"}, BOTH | {"instruction": "q"}]
    assert preference_format(source(*records)) == "preference"
    assert preference_format(source(*records, format="chat_preference")) == "chat_preference"
    assert preference_format(source(records[0], rename={"prompt": "instruction"})) == (
        "alpaca_preference"
    )


def test_rename_and_limit(source):
    records = [{"q": f"q{number}", "good": "a", "bad": "b"} for number in range(3)]
    rename = {"q": "prompt", "good": "chosen", "bad": "rejected"}
    found = list(read_preferences(source(*records, rename=rename, max_records=2)))
    assert [(told.prompt, *told.answers) for told in found] == [("q0", "a", "b"), ("q1", "a", "b")]


# --- embedded


def preference(text: str) -> Preference:
    answers = ([ANSWERS], [ANSWERS | {"content": text}])
    return Preference([ASKS], answers, ((0, 1),), None, "python-docs:f", "f", kinds=("k",))


@pytest.fixture
def embedded(monkeypatch) -> dict[str, list[Preference]]:
    told = {
        "python-docs": [preference("x"), preference("y")],
        "python-parameters": [preference("z")],
    }
    module = SimpleNamespace(
        collect_preferences=lambda: told["python-docs"],
        collect_parameter_preferences=lambda: told["python-parameters"],
    )
    monkeypatch.setitem(sys.modules, "lit_llm.data.python_preferences", module)
    monkeypatch.setattr("lit_llm.data.python_preferences", module, raising=False)
    return told


def test_what_is_embedded(embedded):
    for path, told in embedded.items():
        source = RecordSource(path)
        assert list(read_preferences(source)) == told
        assert list(read_preferences(RecordSource(path, max_records=1))) == told[:1]
        assert preference_format(source) == "preference"
        assert source.label == path
        with pytest.raises(UserError, match=f"source {path} has one format"):
            next(read_preferences(RecordSource(path, format="hh")))


def test_parameters_are_nothing_but_preferences():
    source = RecordSource("python-parameters")
    for read in (read_samples, source_format, record_fingerprint):
        with pytest.raises(UserError, match="^source python-parameters holds preferences, which"):
            list(read(source))


def test_fingerprint(source, embedded):
    local = source(BOTH)
    assert preference_fingerprint(local) == record_fingerprint(local)
    docs, parameters = (RecordSource(path, name="n") for path in embedded)
    found = [preference_fingerprint(docs), preference_fingerprint(parameters)]
    assert preference_fingerprint(RecordSource("python-docs")) == found[0]
    found.append(preference_fingerprint(RecordSource("python-docs", max_records=1)))
    embedded["python-docs"].pop()
    found.append(preference_fingerprint(docs))
    embedded["python-parameters"] = embedded["python-docs"]
    found.append(preference_fingerprint(parameters))
    assert len(set(found)) == 5
