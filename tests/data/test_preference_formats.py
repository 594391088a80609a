"""Formats of preferences: what a record becomes, and one sentence with its place if it is wrong."""

import pytest

from lit_llm.data.preferences import Preference, read_preferences
from lit_llm.data.records import RecordSource
from lit_llm.errors import UserError
from tests.data.test_sources import jsonl


def user(text):
    return {"role": "user", "content": text}


def bot(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


@pytest.fixture
def read(tmp_path):
    """The one preference of a file with the given record."""

    def read(record: dict, **options) -> Preference:
        file = tmp_path / "a.jsonl"
        file.write_bytes(jsonl(record))
        (found,) = read_preferences(RecordSource(str(file), **options))
        assert found.origin == f"{file}:1"
        return found

    return read


@pytest.fixture
def error_of(read, tmp_path):
    def error(record: dict, **options) -> str:
        with pytest.raises(UserError) as caught:
            read(record, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value).removeprefix(f"{tmp_path}/a.jsonl:1: ")

    return error


def content(found: Preference) -> tuple:
    assert found.pairs == ((0, 1),)
    return found.prompt, *found.answers


def pair(chosen, rejected, **more) -> dict:
    return {"chosen": chosen, "rejected": rejected, **more}


# --- preference: text


def test_text_is_taken_as_it_is(read):
    found = read(pair(" blue.", "", prompt="The sky is", id=7, chosen_model="x"))
    assert found == Preference(
        "The sky is", (" blue.", ""), ((0, 1),), None, found.origin, group="The sky is"
    )
    # Even where one answer only repeats the prompt or is the same as the other.
    assert content(read(pair("A A", "B", prompt="A"))) == ("A", "A A", "B")
    assert content(read(pair("A A", "A", prompt="A"))) == ("A", "A A", "A")
    assert content(read(pair("x", "x", prompt="A"))) == ("A", "x", "x")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        # "gre" is shared too, but is no word.
        ("The sky is grey.", "The sky is green.", "The sky is"),
        ("Q: Why?\n\nA: So.", "Q: Why?\n\nA: No.", "Q: Why?\n\nA:"),
        # The white space goes with the answers as a whole, however much of it is shared.
        ("Why?\n\nSo.", "Why?\n\nNo.", "Why?"),
        ("Why?\n So.", "Why?  No.", "Why?"),
        # Every answer keeps a word: the beginning of the other and the same text do as well.
        ("The sky is blue", "The sky is blue and wide", "The sky is"),
        ("The sky is ", "The sky is blue", "The sky"),
        ("The sky is blue", "The sky is blue", "The sky is"),
        ("blue", "green", ""),
        ("blue", "black", ""),
        ("blue", "", ""),
        (" blue", " green", ""),
    ],
)
def test_text_without_a_prompt_shares_whole_words(read, chosen, rejected, prompt):
    found = read(pair(chosen, rejected))
    assert content(found) == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])
    # Without a question, preferences of one answer stay together.
    assert found.group == (prompt or chosen)


def test_a_prompt_that_all_texts_repeat_is_taken_off(read):
    found = read(pair("Why?\nSo.", "Why?\nNo.", prompt="Why?"))
    assert content(found) == ("Why?", "\nSo.", "\nNo.")
    found = read({"prompt": "Why?", "answers": ["Why? a", "Why? b", "Why? c"]})
    assert (found.prompt, found.answers) == ("Why?", (" a", " b", " c"))
    assert content(read(pair(" a", " b", prompt=" "))) == (" ", " a", " b")
    # In turns of their own no white space is left before the answers.
    told = read(pair("Why?\nSo.", "Why?\nNo.", prompt="Why?"), format="chat_preference")
    assert content(told) == ([user("Why?")], [bot("So.")], [bot("No.")])
    told = read(pair("\nWhy?", "No.", prompt="Why?"), format="chat_preference")
    assert content(told) == ([user("Why?")], [bot("\nWhy?")], [bot("No.")])


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (pair("blue", "green", question="Which?"), "question"),
        (pair("blue", "green", query="Which?", prompt=None), "query"),
        (pair("blue", "green", system="s", question="Which?"), "question"),
        (pair("blue", "green", question=" ", input="Which?"), "input"),
        (pair("blue", "green", context="Which?"), "context"),
        (pair("blue", "green", user="Which?"), "user"),
        # Two answers may begin with the same word.
        (pair("The sky is blue", "The sea is", question="Which?"), "question"),
    ],
)
def test_a_question_that_would_not_be_read_is_refused(error_of, record, field):
    assert error_of(record).startswith(
        f"field {field!r} looks like the prompt, which the format preference takes from a field "
        f"'prompt' only; give the source rename: {{{field}: prompt}} (and for a chat model "
        "format: chat_preference)"
    )


def test_a_question_in_the_shared_beginning_is_read(read, tmp_path):
    record = pair("Q: Why? A: So.", "Q: Why? A: No.", question="Why?", user="7")
    assert content(read(record))[0] == "Q: Why? A:"
    assert content(read(pair("a", "b", prompt="q", question="Why?"))) == ("q", "a", "b")
    assert content(read(pair("a", "b", question=["x"]))) == ("", "a", "b")
    # What the first record shows is taken for all.
    file = tmp_path / "b.jsonl"
    file.write_bytes(jsonl(record, pair("a", "b", question="Why?")))
    prompts = [found.prompt for found in read_preferences(RecordSource(str(file)))]
    assert prompts == ["Q: Why? A:", ""]


def test_a_system_text_is_never_dropped(read, error_of):
    plain = pair("a", "b", prompt="q", system="s")
    for record in (plain, {"prompt": "q", "answers": ["a", "b"], "system": "s"}):
        assert error_of(record).startswith(
            "field 'system' is no part of plain texts, which go without the chat template; give "
            "the source format: chat_preference (answers in a list: rename: {prompt: instruction})"
        )
    assert content(read(plain | {"system": " "})) == ("q", "a", "b")
    wanted = ([system("s"), user("q")], [bot("a")], [bot("b")])
    assert content(read(plain, format="chat_preference")) == wanted
    asked = plain | {"prompt": [user("q")]}
    assert content(read(asked)) == content(read(asked, format="chat_preference")) == wanted
    whole = pair([user("q"), bot("a")], [user("q"), bot("b")], system="s")
    assert content(read(whole)) == content(read(whole | {"prompt": [user("q")]})) == wanted
    own = pair(*([system("t"), *whole[name]] for name in ("chosen", "rejected")), system="s")
    assert content(read(own))[0] == [system("t"), user("q")]


# --- preference: messages


def test_messages_with_a_prompt(read):
    tools = [{"type": "function", "function": {"name": "f"}}]
    record = pair([bot("a")], [bot("b")], prompt=[system("s"), user("q")], tools=tools)
    found = read(record | {"chat_template_kwargs": {"enable_thinking": False}})
    assert found == Preference(
        [system("s"), user("q")],
        ([bot("a")], [bot("b")]),
        ((0, 1),),
        None,
        found.origin,
        group="q",
        tools=tools,
        template_options={"enable_thinking": False},
    )


ASKED = [system("s"), user("q"), bot("a"), user("r")]


@pytest.mark.parametrize("prompt", [None, ASKED, ASKED[:1], ASKED[:3], "r"])
def test_whole_conversations_share_their_prompt(read, prompt):
    found = read(pair([*ASKED, bot("b")], [*ASKED, bot("c")], prompt=prompt))
    assert content(found) == (ASKED, [bot("b")], [bot("c")])
    assert found.group == "q"


def test_conversations_that_differ_early(read):
    said = [user("q"), bot("a"), user("r"), bot("b")]
    other = [user("q"), bot("A"), user("R"), bot("B")]
    assert content(read(pair(said, other))) == (said[:1], said[1:], other[1:])
    # One is the beginning of the other; or the same.
    assert content(read(pair(said, said[:2]))) == (said[:1], said[1:], said[1:2])
    assert content(read(pair(said, said))) == (said[:3], said[3:], said[3:])


def test_tools_may_answer_differently(read):
    def calls(result, text):
        call = bot("", tool_calls=[{"function": {"name": "f"}}])
        return [user("q"), call, {"role": "tool", "content": result}, bot(text)]

    better, worse = calls("1", "one"), calls("2", "two")
    assert content(read(pair(better, worse))) == ([user("q")], better[1:], worse[1:])
    # The same call with the same result belongs to the prompt.
    worse = calls("1", "two")
    assert content(read(pair(better, worse))) == (better[:3], better[3:], worse[3:])


@pytest.mark.parametrize(
    "record",
    [
        # The questions differ.
        pair([user("q"), bot("a")], [user("Q"), bot("b")]),
        pair(
            [user("q"), bot("a"), user("r"), bot("b")], [user("q"), bot("a"), user("R"), bot("c")]
        ),
        pair([system("s"), user("q"), bot("a")], [user("q"), bot("b")]),
        # An answer follows on one side only.
        pair([user("q"), bot("a")], [user("q")]),
        pair([], [bot("b")], prompt="q"),
        # The last word is the user's.
        pair([user("q"), bot("a")], [user("q"), bot("b"), user("r")]),
        # Nobody asks.
        pair([bot("a")], [bot("b")]),
        pair([bot("a")], [bot("b")], prompt=[system("s")]),
        pair([bot("a")], [bot("b")], prompt=" "),
    ],
)
def test_what_compares_no_answers_has_no_pairs(read, record):
    found = read(record | {"margin": 1, "kind": "k"}, format="preference")
    assert (found.pairs, found.margins, found.kinds) == ((), None, None)


def test_text_and_messages(read):
    asked = [user("q")]
    wanted = (asked, [bot("a")], [bot("b")])
    for record in (
        pair([user("q"), bot("a")], [user("q"), bot("b")], prompt="q"),
        pair([user("q"), bot("a")], [user("q"), bot("b")], prompt="<user>q<bot>"),
        pair([bot("a")], [bot("b")], prompt="q"),
        pair(bot("a"), bot("b"), prompt="q"),
        pair("a", [bot("b")], prompt="q"),
        pair("a", "b", prompt=asked),
        pair({"from": "gpt", "value": "a"}, [{"from": "gpt", "value": "b"}], prompt=asked),
    ):
        assert content(read(record)) == wanted
    mixed = pair([system("s"), bot("a")], [system("s"), bot("b")], prompt="q")
    assert content(read(mixed)) == ([system("s"), user("q")], [bot("a")], [bot("b")])


# --- margins and kinds


@pytest.mark.parametrize(
    ("more", "margin"),
    [
        ({"margin": 2}, 2.0),
        ({"margin": "0.5"}, 0.5),
        # Scores are on a scale of their own.
        ({"score_chosen": 7.5, "score_rejected": 9}, None),
        ({"margin": -1, "score_chosen": 7.5, "score_rejected": 9}, -1.0),
        ({"margin": None}, None),
        ({"margin": float("nan")}, None),
        ({"margin": ""}, None),
    ],
)
def test_margin(read, more, margin):
    for record in (pair("a", "b", prompt="q"), pair([bot("a")], [bot("b")], prompt="q")):
        assert read(record | more).margins == (None if margin is None else (margin,))
    record = {"question": "q", "response_j": "a", "response_k": "b"}
    assert read(record | more).margins == (None if margin is None else (margin,))


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({"kind": "k", "category": "c", "source": "s"}, "k"),
        ({"kind": 3, "category": "c", "source": "s"}, "c"),
        ({"kind": None, "category": " ", "source": "s"}, None),
        ({"category": ["s"]}, None),
        ({}, None),
    ],
)
def test_kind(read, more, kind):
    for record in (pair("a", "b", prompt="q"), pair([bot("a")], [bot("b")], prompt="q")):
        assert read(record | more).kinds == (None if kind is None else (kind,))


# --- other names of the same


def test_chat_preference(read):
    record = pair("a", "b", prompt="q", system="s")
    found = read(record, format="chat_preference")
    assert content(found) == ([system("s"), user("q")], [bot("a")], [bot("b")])
    assert found.group == "q"
    chat = pair([bot("a")], "b", prompt=[user("q")])
    assert content(read(chat, format="chat_preference")) == ([user("q")], [bot("a")], [bot("b")])


@pytest.mark.parametrize("field", ["messages", "conversations", "conversation"])
@pytest.mark.parametrize("listed", [False, True])
def test_preference_sharegpt(read, field, listed):
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}]
    said.append({"from": "human", "value": "r"})
    answers = [{"from": "gpt", "value": "a"}, {"from": "gpt", "value": "b"}]
    record = pair(*([answer] if listed else answer for answer in answers))
    found = read(record | {field: said, "system": "s"})
    prompt = [system("s"), user("q"), bot("x"), user("r")]
    assert content(found) == (prompt, [bot("a")], [bot("b")])
    record = pair("a", bot("b")) | {field: [user("q")]}
    assert content(read(record)) == ([user("q")], [bot("a")], [bot("b")])


def test_alpaca_preference(read):
    record = pair("a", "b", instruction="Add.", input="1 2", output="3", system="s")
    found = read(record | {"history": [["x", "y"]]})
    prompt = [system("s"), user("x"), bot("y"), user("Add.\n\n1 2")]
    assert content(found) == (prompt, [bot("a")], [bot("b")])
    assert content(read(record | {"input": "", "system": ""}))[0] == [user("Add.")]


def test_stack_exchange(read):
    found = read({"qid": 1, "question": "q", "response_j": "a", "response_k": "b"})
    assert content(found) == ([user("q")], [bot("a")], [bot("b")])


# --- hh


def test_hh(read):
    start = "\n\nHuman: q\n\nAssistant:  a \n\nHuman: r\n\nAssistant:"
    found = read(pair(f"{start} b\n\nand c", start))
    prompt = [user("q"), bot("a"), user("r")]
    assert content(found) == (prompt, [bot("b\n\nand c")], [bot("")])
    assert found.group == "q"


def test_hh_names_inside_a_turn_and_two_turns_of_one_speaker(read):
    start = "\n\nHuman: Is Human: a\nHuman: name?\n\nAssistant: "
    found = read(pair(f"{start}Wait.\n\nAssistant: Yes. Human: ok", f"{start}\n\nAssistant: No."))
    asked = [user("Is Human: a\nHuman: name?")]
    assert content(found) == (asked, [bot("Wait.\n\nYes. Human: ok")], [bot("No.")])


def test_hh_that_differs_early_and_in_a_question(read):
    start = "\n\nHuman: q\n\nAssistant:"
    found = read(pair(f"{start} a\n\nHuman: r\n\nAssistant: b", f"{start} c"))
    assert content(found) == ([user("q")], [bot("a"), user("r"), bot("b")], [bot("c")])
    asks = "\n\nHuman: {}\n\nAssistant: a"
    assert read(pair(asks.format("q"), asks.format("r"))).pairs == ()
    assert read(pair(f"{start} a", f"{start} b\n\nHuman: r")).pairs == ()


def test_hh_with_a_prompt(read):
    start = "\n\nHuman: q\n\nAssistant:"
    wanted = ([user("q")], [bot("a")], [bot("b")])
    assert content(read(pair("a", " b", prompt=start))) == wanted
    assert content(read(pair(f"{start} a", f"{start} b", prompt=start))) == wanted
    assert content(read(pair(f"{start} a", f"{start} b", prompt="q"))) == wanted


# --- ranked


@pytest.mark.parametrize("field", ["answers", "responses", "completions"])
def test_best_first(read, field):
    found = read({"prompt": "q", field: ["a", "b", "c"], "kind": "s"})
    assert (found.prompt, found.answers) == ("q", ("a", "b", "c"))
    assert found.pairs == ((0, 1), (0, 2), (1, 2))
    assert (found.margins, found.kinds, found.group) == (None, ("s",) * 3, "q")


def test_ranks_and_scores(read):
    record = {"prompt": "q", "answers": ["a", "b", "c", "d"]}
    found = read(record | {"ranks": [2, 1, 2, 3]})
    assert found.answers == ("b", "a", "c", "d")
    assert found.pairs == ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3))
    assert found.margins is None
    found = read(record | {"scores": [0.5, 4, None, 4]})
    assert found.answers == ("b", "d", "a")
    assert (found.pairs, found.margins) == (((0, 2), (1, 2)), None)
    # Ranks are the word of people, and the scores are left.
    found = read(record | {"scores": [1, 2, 3, 4], "ranks": [None, 2, 1, None]})
    assert (found.answers, found.pairs, found.margins) == (("c", "b"), ((0, 1),), None)


@pytest.mark.parametrize(
    "record",
    [
        {"answers": []},
        {"answers": ["a"]},
        {"answers": ["a", "b"], "ranks": [1, 1]},
        {"answers": ["a", "b"], "scores": [1, None]},
        {"answers": [[bot("a")], [user("b")]]},
    ],
)
def test_nothing_is_better(read, record):
    for prompt in ({"prompt": "q"}, {"instruction": "q"}):
        found = read({**prompt, **record, "kind": "k"})
        assert (found.pairs, found.margins, found.kinds) == ((), None, None)


def test_ranked_messages(read):
    prompt, answers = [user("q")], [[bot("a")], bot("b"), "c"]
    for record in ({"prompt": prompt}, {"prompt": "q"}, {"instruction": "q"}):
        found = read({**record, "answers": answers})
        assert (found.prompt, found.answers) == (prompt, ([bot("a")], [bot("b")], [bot("c")]))
        assert found.pairs == ((0, 1), (0, 2), (1, 2))


def test_ultrafeedback(read):
    completions = [
        {"model": "m", "response": "a", "overall_score": 6.5, "annotations": {}},
        {"model": "n", "response": "b", "overall_score": 8},
        {"model": "o", "response": "c"},
    ]
    found = read({"source": "flan", "instruction": "q", "completions": completions})
    assert (found.prompt, found.answers) == ([user("q")], ([bot("b")], [bot("a")]))
    assert (found.pairs, found.margins, found.kinds) == (((0, 1),), None, None)


# --- errors


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (pair("a", 3), "field 'rejected' is a number, not a string."),
        (pair("a", "b", prompt=3), "field 'prompt' is a number, not a string."),
        (pair("\ud800", "b"), "field 'chosen' holds half of a surrogate pair"),
        (pair([user("q"), "a"], [user("q")]), "message 2 of 'chosen' is a string, not an object"),
        (pair([{"role": "bot"}], "b"), "message 1 of 'chosen': role 'bot' is unknown"),
        (pair([{"from": "me"}], "b"), "message 1 of 'chosen': speaker 'me' is unknown"),
        (pair("a", "b", margin="x"), "field 'margin' is a string, not a number."),
        (pair("a", "b", margin=True), "field 'margin' is a boolean, not a number."),
        (pair("a", "b", margin=[1]), "field 'margin' is a list, not a number."),
        (pair("a", "b", margin=float("inf")), "field 'margin' is inf, not a finite number."),
        (pair([bot("a")], "b", prompt="q", tools={"a": 1}), "field 'tools' is an object"),
        (
            pair("\n\nHuman: q\n\nAssistant: a", "b"),
            "field 'rejected' does not begin with 'Human:'",
        ),
        (pair("a", "b", images=["x"]), "field 'images' says that images belong to the text"),
        ({"prompt": "q", "answers": "a"}, "field 'answers' is a string, not a list of answers."),
        ({"prompt": "q", "answers": ["a", 3]}, "answer 2: field 'answers' is a number"),
        (
            {"prompt": "q", "answers": ["a", "b"], "ranks": [1]},
            "field 'ranks' has 1 values for 2 answers.",
        ),
        (
            {"prompt": "q", "answers": ["a", "b"], "scores": 2},
            "field 'scores' is a number, not a list of numbers.",
        ),
        (
            {"prompt": "q", "answers": ["a", "b"], "scores": [1, "x"]},
            "field 'scores' is a string, not a number.",
        ),
        (
            {"prompt": "q", "answers": [{"response": 1, "overall_score": 1}]},
            "answer 1: field 'response' is a number, not a string.",
        ),
        (
            {"prompt": "q", "answers": [{"response": "a", "overall_score": {}}]},
            "answer 1: field 'overall_score' is an object, not a number.",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_place(error_of, record, sentence):
    assert error_of(record).startswith(sentence)
