"""The embedded preferences: what is wrong with an answer, and what must not give it away."""

import hashlib
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from lit_llm.data import python_questions
from lit_llm.data.python_docs import FunctionDoc
from lit_llm.data.python_preferences import collect_parameter_preferences, collect_preferences
from lit_llm.data.python_questions import ANSWER_FORMATS, collect_conversations
from lit_llm.data.splits import assign_split

NO_PARAMETERS = "It takes no parameters."
GARDEN = [
    (
        "Tree.grow",
        "(self, height=1, *, fast=False)",
        "Grow the tree.\n\nMore water makes it grow better.",
    ),
    ("Tree.fell", "(self, saw)", "Cut the tree down with a saw."),
    ("Tree.climb", "(self)", "Go up to the highest branch of it."),
    ("Tree.pick", "(self, *fruits)", "Take fruits and put them into the basket."),
    (
        "Tree.prune",
        "(self, twigs, saw)",
        "Remove twigs that are dead. See the book of the garden.",
    ),
    ("Bush.grow", "(self)", "Make the bush bigger."),
]


@pytest.fixture(scope="module")
def described():
    return collect_preferences()


@pytest.fixture(scope="module")
def listed():
    return collect_parameter_preferences()


@pytest.fixture(scope="module")
def conversations():
    return collect_conversations()


@pytest.fixture
def about(monkeypatch):
    """Preferences about functions given by hand."""

    def collect(collector, *functions):
        documents = [FunctionDoc("garden", *function) for function in functions]
        monkeypatch.setattr(python_questions, "collect_functions", lambda: documents)
        return collector()

    return collect


def content(messages):
    (message,) = messages
    return message["content"]


def answers(preference):
    """The right answer, and the wrong ones by what is wrong."""
    right, *wrong = map(content, preference.answers)
    return right, dict(zip(preference.kinds, wrong, strict=True))


def of_kind(preferences, kind):
    """(right, wrong) of all pairs of a kind."""
    told = [answers(preference) for preference in preferences]
    return [(right, wrong[kind]) for right, wrong in told if kind in wrong]


def longer_is_better(pairs):
    """How often the longer answer is the right one; a tie is a coin's toss."""
    return sum((len(a) > len(b)) + 0.5 * (len(a) == len(b)) for a, b in pairs) / len(pairs)


def test_counts(described, listed):
    assert 2_500 < len(described) < 8_000
    assert 2_000 < len(listed) < len(described)
    kinds = Counter(kind for preference in described for kind in preference.kinds)
    assert set(kinds) == {"other", "truncated", "shuffled"}
    assert min(kinds.values()) > 0.99 * len(described)
    assert {preference.kinds for preference in listed} == {("other", "near")}


def test_pairs_kinds_and_messages_fit(described, listed):
    for origin, preferences in (("python-docs", described), ("python-parameters", listed)):
        origins = [preference.origin for preference in preferences]
        assert len(set(origins)) == len(origins)
        assert all(re.fullmatch(rf"{origin}:[\w.]+", own) for own in origins)
        for preference in preferences:
            roles = [m["role"] for text in (preference.prompt, *preference.answers) for m in text]
            assert roles == ["user"] + ["assistant"] * len(preference.answers)
            worse = range(1, len(preference.answers))
            assert preference.pairs == tuple((0, number) for number in worse)
            assert len(preference.kinds) == len(worse)
            texts = list(map(content, preference.answers))
            assert len(set(texts)) == len(texts), preference.origin
            assert all(text.strip() == text and text.isascii() for text in texts)
            assert preference.margins is preference.tools is preference.template_options is None


def test_questions_right_answers_and_groups_are_those_of_the_instruction_data(
    described, listed, conversations
):
    known = defaultdict(set)
    asked = set()
    groups = {}
    for conversation in conversations:
        name = conversation.origin.partition(":")[2]
        groups[name] = conversation.group
        asked.add(conversation.messages[0]["content"])
        known[name].update(m["content"] for m in conversation.messages[1::2])
    assert {p.origin.partition(":")[2] for p in described} == set(groups)
    for preference in described + listed:
        name = preference.origin.partition(":")[2]
        assert preference.group == groups[name]
        right, wrong = answers(preference)
        assert right in known[name]
        assert known[name].isdisjoint(wrong.values())
    # Some are asked as a follow-up there, in other words.
    assert sum(content(p.prompt) in asked for p in described) > 0.7 * len(described)
    assert sum(content(p.prompt) in asked for p in listed) > 0.6 * len(listed)


def test_another_function_does_something_else(described):
    functions = defaultdict(list)
    for preference in described:
        purpose = answers(preference)[0].partition(": ")[2]
        functions[purpose].append(preference)
    same_split = 0
    for preference in described:
        right, wrong = answers(preference)
        name, _, purpose = wrong["other"].partition(": ")
        assert name == right.partition(": ")[0]
        assert re.fullmatch(ANSWER_FORMATS["does"], wrong["other"])
        told = functions[purpose]  # a right answer of these
        assert preference.group not in {other.group for other in told}
        last = preference.origin.rpartition(".")[2]
        assert {other.origin.rpartition(".")[2].lower() for other in told} != {last.lower()}
        # What is wrong in a test must not be what was right in training.
        splits = {assign_split(other.group, test_fraction=0.1) for other in told}
        same_split += assign_split(preference.group, test_fraction=0.1) in splits
    assert same_split == len(described)
    pairs = of_kind(described, "other")
    assert sum(abs(len(a) - len(b)) for a, b in pairs) < 10 * len(pairs)


def test_truncated_answers_break_off(described):
    pairs = of_kind(described, "truncated")
    second, stopped = 0, 0
    endings = Counter()
    for right, wrong in pairs:
        cut = wrong.removesuffix(".")
        stopped += cut != wrong
        if len(wrong) > len(right):
            assert wrong.startswith(right + " ")
            second += 1
        else:
            assert right.startswith(cut + " ") and len(cut) > len(right.split(" ")[0])
        if cut != wrong:
            endings[cut.split()[-1].lower()] += 1
    assert second > 0.3 * len(pairs)
    assert 0.2 * len(pairs) < stopped < 0.6 * len(pairs)
    # A full stop makes no sentence of them: one may end with "to" or "is", but not with these.
    assert {word for word, _ in endings.most_common(3)} <= {"the", "a", "of", "and", "or"}
    assert endings.keys().isdisjoint({"to", "in", "on", "for", "is", "it", "by", "from", "any"})


def test_shuffled_answers_have_the_words_and_the_form_of_the_right_one(described):
    kept = 0
    for right, wrong in of_kind(described, "shuffled"):
        assert len(wrong) == len(right)
        assert sorted(wrong[:-1].lower().split()) == sorted(right[:-1].lower().split())
        assert re.fullmatch(ANSWER_FORMATS["does"], wrong)
        name, *words = wrong.split(" ")
        assert name == right.split(" ")[0]
        assert words[0][0].isupper()
        kept += words[0].lower() == right.split(" ")[1].lower()
    assert kept < 0.02 * len(described)  # the verb goes elsewhere


def test_wrong_lists_are_wrong(listed):
    added, missing = 0, 0
    for preference in listed:
        right, wrong = answers(preference)
        parameters = right.splitlines() if right != NO_PARAMETERS else []
        for text in (right, *wrong.values()):
            assert re.fullmatch(ANSWER_FORMATS["parameters"], text)
        assert sorted(wrong["other"].splitlines()) != sorted(parameters or [NO_PARAMETERS])
        near = wrong["near"].splitlines() if wrong["near"] != NO_PARAMETERS else []
        assert len(set(near)) == len(near)
        assert abs(len(near) - len(parameters)) == 1
        more, fewer = sorted((near, parameters), key=len, reverse=True)
        (extra,) = set(more) - set(fewer)
        assert [line for line in more if line != extra] == fewer  # the rest keeps its order
        if len(near) > len(parameters):
            added += 1
            assert "*" not in "".join(near[: near.index(extra) + 1])
        else:
            missing += 1
    assert added / missing == pytest.approx(1, abs=0.1)


def test_length_alone_does_not_tell(described, listed):
    for preferences, kinds in (
        (described, ("other", "truncated", "shuffled")),
        (listed, ("other", "near")),
    ):
        pairs = [of_kind(preferences, kind) for kind in kinds]
        assert longer_is_better(list(itertools.chain(*pairs))) == pytest.approx(0.5, abs=0.06)
        for own in pairs:
            assert longer_is_better(own) == pytest.approx(0.5, abs=0.12)
    assert longer_is_better(of_kind(listed, "near")) == pytest.approx(0.5, abs=0.01)
    # Nor does the answer that every function without parameters has.
    right = sum(content(p.answers[0]) == NO_PARAMETERS for p in listed)
    wrong = sum(NO_PARAMETERS in answers(p)[1].values() for p in listed)
    assert 0.6 < right / wrong < 1.6


def test_by_hand(about):
    preferences = about(collect_preferences, *GARDEN)
    assert [preference.origin for preference in preferences] == [
        f"python-docs:garden.{name}" for name, _, _ in GARDEN
    ]
    assert content(preferences[0].prompt) == (
        "Tell me what `garden.Tree.grow(height=1, *, fast=False)` does."
    )
    assert content(preferences[5].prompt) == "What is `garden.Bush.grow()` for?"
    assert [answers(preference) for preference in preferences[:5]] == [
        (
            "`Tree.grow`: Grow the tree.",
            {
                "other": "`Tree.grow`: Go up to the highest branch of it.",
                "truncated": "`Tree.grow`: Grow the tree. More water makes it",
                "shuffled": "`Tree.grow`: The grow tree.",
            },
        ),
        (
            "`Tree.fell`: Cut the tree down with a saw.",
            {
                "other": "`Tree.fell`: Go up to the highest branch of it.",
                "truncated": "`Tree.fell`: Cut the.",
                "shuffled": "`Tree.fell`: With the cut saw down a tree.",
            },
        ),
        (
            "`Tree.climb`: Go up to the highest branch of it.",
            {
                "other": "`Tree.climb`: Cut the tree down with a saw.",
                "truncated": "`Tree.climb`: Go up to the.",
                "shuffled": "`Tree.climb`: Of highest to up go it the branch.",
            },
        ),
        (
            "`Tree.pick`: Take fruits and put them into the basket.",
            {
                "other": "`Tree.pick`: Go up to the highest branch of it.",
                "truncated": "`Tree.pick`: Take fruits and.",
                "shuffled": "`Tree.pick`: And take basket fruits them the put into.",
            },
        ),
        (
            "`Tree.prune`: Remove twigs that are dead.",
            {
                "other": "`Tree.prune`: Cut the tree down with a saw.",
                "truncated": "`Tree.prune`: Remove twigs that are dead. See the",
                "shuffled": "`Tree.prune`: That twigs remove dead are.",
            },
        ),
    ]


def test_parameters_by_hand(about):
    preferences = about(collect_parameter_preferences, *GARDEN)
    assert content(preferences[0].prompt) == (
        "What can I pass to `garden.Tree.grow(height=1, *, fast=False)`?"
    )
    assert [answers(preference) for preference in preferences[:4]] == [
        ("- `height`\n- `fast`", {"other": NO_PARAMETERS, "near": "- `fast`"}),
        ("- `saw`", {"other": "- `twigs`\n- `saw`", "near": "- `saw`\n- `height`"}),
        (NO_PARAMETERS, {"other": "- `height`\n- `fast`", "near": "- `saw`"}),
        ("- `*fruits`", {"other": "- `saw`", "near": NO_PARAMETERS}),
    ]


def test_functions_described_alike_are_one_group(about):
    functions = (
        ("Tree.grow", "(self)", "Grow the tree."),
        ("Tree.fell", "(self)", "Cut it down."),
        ("Bush.grow", "(self, x)", "Grow  THE tree"),
    )
    for collector in (collect_preferences, collect_parameter_preferences):
        groups = [preference.group for preference in about(collector, *functions)]
        assert groups == ["garden.Tree.grow", "garden.Tree.fell", "garden.Tree.grow"]


@pytest.mark.parametrize(
    "other",
    [
        ("Bush.grow", "Grow `the` tree."),  # the same words
        ("Bush.GROW", "Make something bigger."),  # a method of the same name
        ("Bush.rise", "Let the tree grow very quickly and high."),  # says no less
        ("Bush.rise", "Return the grown thing of this tree, if true."),  # "tree" is half of it
        ("Bush.rise", "Return it."),  # says nothing
    ],
)
def test_what_describes_both_is_no_wrong_answer(about, other):
    tree = ("Tree.grow", "(self)", "Grow the tree.")
    one = about(collect_preferences, tree, (other[0], "(self)", other[1]))[0]
    alike = other[1] != "Return the grown thing of this tree, if true."
    assert one.kinds == (("truncated", "shuffled") if alike else ("other", "truncated", "shuffled"))
    assert one.pairs == tuple((0, number) for number in range(1, 1 + len(one.kinds)))


def test_the_same_parameters_in_another_order_are_no_wrong_list(about):
    functions = [("f", "(a, b)", "Do the first thing."), ("g", "(b, a)", "Make a second one.")]
    for preference in about(collect_parameter_preferences, *functions):
        assert preference.kinds == ("near",)
        assert answers(preference)[1]["near"] in ("- `a`", "- `b`")  # there is nothing to add


def test_only_known_parameters_are_asked_for(about):
    functions = [
        ("f", "", "Do the first thing."),
        ("g", "(x=<object>)", "Make a second one."),
        ("h", "()", "Print another value."),
    ]
    assert about(collect_parameter_preferences, *functions) == []  # nothing wrong can be made
    functions.append(("k", "(x)", "Forget all of them."))
    preferences = about(collect_parameter_preferences, *functions)
    assert [preference.origin[-1] for preference in preferences] == ["h", "k"]
    assert len(about(collect_preferences, *functions)) == 4


def test_a_sentence_without_another_order_is_not_shuffled(about):
    (preference,) = about(collect_preferences, ("f", "()", "Forget `everything`."))
    assert preference.kinds == ("truncated",)
    assert answers(preference) == ("`f`: Forget `everything`.", {"truncated": "`f`: Forget"})


def test_the_nearest_length_of_the_module_is_taken(monkeypatch):
    words = "Alpha Beta Gamma Delta Epsilon Zeta Eta Theta Iota Kappa Lambda Omega".split()
    documents = [
        FunctionDoc(module, f"{word}{module}", "()", f"{word} {word.lower() * number}.")
        for module in ("one", "two")
        for number, word in enumerate(words, start=3)
    ]
    documents.append(FunctionDoc("small", "f", "()", "Write letters."))
    documents.append(FunctionDoc("small", "g", "()", f"Put the {'very ' * 30}last stamp on."))
    monkeypatch.setattr(python_questions, "collect_functions", lambda: documents)
    preferences = collect_preferences()
    assert len(preferences) == len(documents)
    module = [len(document.docstring) for document in documents[: len(words)]]
    ranks = set()
    for preference in preferences[:-2]:
        right, wrong = (text.partition(": ")[2] for text in map(content, preference.answers[:2]))
        distances = sorted(abs(length - len(right)) for length in module)
        ranks.add(distances.index(abs(len(wrong) - len(right))))
    # One of the four nearest in the module; the function itself is the nearest of all.
    assert max(ranks) <= 4 and len(ranks) > 2
    # A module of a few functions may have none that is about as long.
    assert len(answers(preferences[-2])[1]["other"]) < 60


def test_the_same_in_every_process(described, listed):
    code = (
        "import hashlib; from lit_llm.data.python_preferences import *\n"
        "both = [collect_preferences(), collect_parameter_preferences()]\n"
        "print(hashlib.sha256(repr(both).encode()).hexdigest())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = hashlib.sha256(repr([described, listed]).encode()).hexdigest()
    assert result.stdout.strip() == expected


def test_the_card_can_be_written_anew(tmp_path, capsys):
    folder = Path(__file__).parents[2] / "data" / "python-preferences"
    spec = importlib.util.spec_from_file_location("prepare_preferences", folder / "prepare.py")
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    prepare.main(["--path", str(tmp_path / "card.md")])
    assert "wrote" in capsys.readouterr().out
    cards = [(folder / "card.md").read_text("utf-8"), (tmp_path / "card.md").read_text("utf-8")]
    facts = [dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card, re.M)) for card in cards]
    # Another version has other functions, another build other parts of its system.
    if facts[0]["Python"] == facts[1]["Python"]:
        counts = [int(fact["documents"].replace(",", "")) for fact in facts]
        assert counts[1] == pytest.approx(counts[0], rel=0.02)
