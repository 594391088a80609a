"""The embedded instruction data: form, counts, and what may not cross from train to test."""

import ast
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from lit_llm.data import python_questions
from lit_llm.data.python_docs import FunctionDoc
from lit_llm.data.python_questions import ANSWER_FORMATS, collect_conversations

FOLDER = Path(__file__).parents[2] / "data" / "python-questions"


@pytest.fixture(scope="module")
def conversations():
    return collect_conversations()


@pytest.fixture
def about(monkeypatch):
    """Turns of the conversations about functions given by hand: (question, answer) pairs."""

    def collect(*functions):
        monkeypatch.setattr(
            python_questions,
            "collect_functions",
            lambda: [FunctionDoc("module", *function) for function in functions],
        )
        return [
            (question["content"], answer["content"])
            for conversation in collect_conversations()
            for question, answer in zip(
                conversation.messages[::2], conversation.messages[1::2], strict=True
            )
        ]

    return collect


def answers(turns):
    return {answer for _, answer in turns}


def kind_of(answer_format):
    (kind,) = [kind for kind, own in ANSWER_FORMATS.items() if own == answer_format]
    return kind


def test_counts(conversations):
    assert 6_000 < len(conversations) < 20_000
    text = sum(len(m["content"]) for c in conversations for m in c.messages)
    assert 800_000 < text < 3_000_000
    kinds = Counter(kind_of(c.answer_format) for c in conversations)
    assert set(kinds) == set(ANSWER_FORMATS)
    assert min(kinds.values()) > 0.15 * len(conversations)
    several = sum(len(c.messages) > 2 for c in conversations)
    assert several / len(conversations) == pytest.approx(0.2, abs=0.03)


def test_every_conversation_has_the_form_it_promises(conversations):
    for conversation in conversations:
        messages = conversation.messages
        assert [message["role"] for message in messages] in (
            ["user", "assistant"],
            ["user", "assistant", "user", "assistant"],
        )
        assert re.fullmatch(conversation.answer_format, messages[-1]["content"], re.DOTALL)
        for message in messages:
            content = message["content"]
            assert content.strip() == content and content.isascii(), conversation.origin
            assert "{" not in message["content"].split("`")[0]  # no template is left unfilled
        for question in messages[::2]:
            assert question["content"][-1] in ".?" and "\n" not in question["content"]
        for answer in messages[1::2]:
            fitting = [k for k, f in ANSWER_FORMATS.items() if re.fullmatch(f, answer["content"])]
            assert len(fitting) == 1  # a form belongs to one kind
        assert conversation.origin.startswith("python-docs:")
        assert conversation.tools is None


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("does", "`isleap`"),
        ("does", "`isleap`: Return True"),
        ("does", "`isleap`: Return\nTrue."),
        ("does", "isleap: Return True."),
        ("parameters", "`year`"),
        ("parameters", "- `year`\n"),
        ("parameters", "- `year` - `month`"),
        ("parameters", "It takes no parameters"),
        ("parameters", ""),
        ("signature", "isleap(year)"),
        ("signature", "`isleap`"),
        ("signature", "`isleap(year)` and more"),
    ],
)
def test_answers_of_another_form_are_told(kind, answer):
    assert not re.fullmatch(ANSWER_FORMATS[kind], answer, re.DOTALL)


def test_a_known_function(conversations):
    own = [c for c in conversations if c.origin == "python-docs:calendar.isleap"]
    assert {c.group for c in own} == {"calendar.isleap"}
    turns = [(m["content"], n["content"]) for c in own for m, n in _pairs(c.messages)]
    assert answers(turns) == {
        "`isleap`: Return True for leap years, False for non-leap years.",
        "- `year`",
        "`isleap(year)`",
    }
    assert len(turns) == 3
    assert any("`calendar.isleap" in question for question, _ in turns)


def _pairs(messages):
    return list(zip(messages[::2], messages[1::2], strict=True))


def test_parameters_are_in_the_question_or_before_it(conversations):
    asked = 0
    for conversation in conversations:
        if kind_of(conversation.answer_format) != "parameters":
            continue
        *before, answer = (message["content"] for message in conversation.messages)
        names = re.findall(r"`\**(\w+)`", answer)
        calls = re.findall(r"`[\w.]+(\(.*?\))`", "\n".join(before))
        arguments = ast.parse(f"lambda {calls[0][1:-1]}: 0", mode="eval").body.args
        listed = [argument.arg for argument in ast.walk(arguments) if isinstance(argument, ast.arg)]
        assert sorted(names) == sorted(listed), conversation.origin
        asked += 1
    assert asked > 1_000


def test_what_may_leak_shares_a_group(conversations):
    groups = defaultdict(set)
    for conversation in conversations:
        groups[conversation.origin].add(conversation.group)
        for message in conversation.messages[1::2]:
            match = re.fullmatch(r"`[\w.]+`: (.*)", message["content"])
            if match:
                groups[" ".join(re.findall(r"[a-z0-9_]+", match[1].lower()))].add(
                    conversation.group
                )
    assert all(len(group) == 1 for group in groups.values())
    sizes = Counter(conversation.group for conversation in conversations)
    assert max(sizes.values()) > 20  # some sentences are written often
    assert len(sizes) > 2_500


def test_equal_sentences_are_one_group_and_methods_lose_self(about, monkeypatch):
    turns = about(
        ("Tree.grow", "(self, height=1, *, fast=False)", "Grow the tree.\n\nMore."),
        ("Bush.grow", "(cls, /)", "Grow the  TREE!"),
        ("grow", "(*names, **options)", "Grow `the` tree"),
        ("Tree.fell", "(type, saw, /, axe)", "Cut the tree down."),
    )
    assert answers(turns) == {
        "`Tree.grow`: Grow the tree.",
        "- `height`\n- `fast`",
        "`Tree.grow(height=1, *, fast=False)`",
        "`grow`: Grow `the` tree.",
        "- `*names`\n- `**options`",
        "`grow(*names, **options)`",
        "`Tree.fell`: Cut the tree down.",
        "- `saw`\n- `axe`",
        "`Tree.fell(saw, /, axe)`",
    }
    groups = {c.origin: c.group for c in collect_conversations()}
    assert groups == {
        "python-docs:module.Tree.grow": "module.Tree.grow",
        "python-docs:module.grow": "module.Tree.grow",
        "python-docs:module.Tree.fell": "module.Tree.fell",
    }


def test_no_parameters(about):
    assert "It takes no parameters." in answers(about(("Tree.grow", "(self)", "Grow the tree.")))


def test_annotations_are_left_out(about):
    turns = about(("grow", "(a: int, *b: str, c: float=1.0) -> None", "Grow the tree."))
    assert "`grow(a, *b, c=1.0)`" in answers(turns)
    assert "- `a`\n- `*b`\n- `c`" in answers(turns)


@pytest.mark.parametrize("signature", ["", "(x=<object>)", "(x, [y])", f"({'x' * 130})", "(self)"])
def test_without_a_usable_signature_only_the_purpose_is_asked(about, signature):
    ((question, answer),) = about(("grow", signature, "Grow the tree."))
    assert "`module.grow`" in question
    assert answer == "`grow`: Grow the tree."


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the x. Then y.", "Return the x."),
        ("Return x\nand y.  Then z.", "Return x and y."),
        ("Return x, e.g. Y, i.e. Z. Then.", "Return x, e.g. Y, i.e. Z."),
        ("Return version 3.11 of it. Next.", "Return version 3.11 of it."),
        ("Return the x\n\nAnd more.", "Return the x."),
        ("Return ``x`` as text.", "Return `x` as text."),
        ("Return the x\n:param x: the x", "Return the x."),
        ("Return one of\n  - the first\n  - the last", "Return one of."),
        ("grow(x) -> y\n\nReturn the y.", "Return the y."),
        ("grow(x)\nReturn the y.", "Return the y."),
    ],
)
def test_first_sentences(about, docstring, sentence):
    assert answers(about(("grow", "", docstring))) == {f"`grow`: {sentence}"}


@pytest.mark.parametrize(
    "docstring",
    [
        ">>> grow(1)\n2",
        "See :func:`grow` for more.",
        "Return the x: ",
        "Return x (see Y. Then z).",
        "Return the `x.",
        "Return the naïve x.",
        "return the x.",
        "Is it x?",
        "Return.",
        "Grow x -> y.",
        "Grow " + "very " * 50 + "tall.",
    ],
)
def test_docstrings_without_a_clear_first_sentence_are_left_out(about, docstring):
    assert about(("grow", "(x)", docstring)) == []


def test_a_function_defined_twice_is_asked_about_once(about):
    once = about(("grow", "(x)", "Grow the tree."))
    assert about(("grow", "(x)", "Grow the tree."), ("grow", "(y)", "Grow the bush.")) == once


def test_phrasings_vary(conversations):
    first = Counter(
        re.sub(r"`[^`]*`", "NAME", conversation.messages[0]["content"])[:18]
        for conversation in conversations
    )
    for begin in ("What does NAME do?", "List the parameter", "Write down the sig"):
        assert first[begin] > 0.02 * len(conversations)
    for template in python_questions._QUESTIONS.values():
        assert 4 <= len(template) <= 6


def test_a_second_question_is_not_answered_by_the_first(conversations):
    for conversation in conversations:
        if len(conversation.messages) > 2:
            first, _, second, answer = (m["content"] for m in conversation.messages)
            assert "`" not in second
            assert answer.partition(": ")[2] not in first or ": " not in answer


def test_the_same_in_every_process(conversations):
    code = (
        "import hashlib; from lit_llm.data.python_questions import collect_conversations\n"
        "print(hashlib.sha256(repr(collect_conversations()).encode()).hexdigest())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == hashlib.sha256(repr(conversations).encode()).hexdigest()


def test_committed_card_is_what_the_script_writes(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("prepare", FOLDER / "prepare.py")
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    prepare.main(["--path", str(tmp_path / "card.md")])
    assert "wrote" in capsys.readouterr().out
    cards = [(FOLDER / "card.md").read_text("utf-8"), (tmp_path / "card.md").read_text("utf-8")]
    facts = [dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card, re.M)) for card in cards]
    assert facts[0]["Python"].startswith("CPython 3.")
    headings = [[line for line in card.splitlines() if line.startswith("#")] for card in cards]
    assert headings[0] == headings[1]
    # Another version has other functions, another build other parts of its system (module os).
    if facts[0]["Python"] == facts[1]["Python"]:
        counts = [int(fact["documents"].replace(",", "")) for fact in facts]
        assert counts[1] == pytest.approx(counts[0], rel=0.02)
