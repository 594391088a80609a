"""OpenAssistant: threads and comparisons of trees drawn by hand."""

import json
import math
from itertools import permutations

import pytest

from lit_llm.data.conversations import read_samples, source_format
from lit_llm.data.openassistant import read_comparisons, read_threads
from lit_llm.data.preferences import preference_format, read_preferences
from lit_llm.data.record_formats import Record
from lit_llm.data.records import RecordSource
from lit_llm.errors import UserError


def asks(text, *replies, **more):
    return {"text": text, "role": "prompter", "replies": list(replies), **more}


def answers(text, rank, *replies, **more):
    return {"text": text, "role": "assistant", "rank": rank, "replies": list(replies), **more}


def threads(*trees: dict) -> list[str]:
    """Threads as words; an answer in brackets is not trained on."""
    records = (
        Record({"message_tree_id": f"tree{number}", "prompt": tree}, f"file:{number}")
        for number, tree in enumerate(trees)
    )
    found = []
    for thread in read_threads(records):
        assert thread.group == f"tree{thread.origin.removeprefix('file:')}"
        for number, message in enumerate(thread.messages):
            assert message["role"] == ("assistant" if number % 2 else "user")
        found.append(
            " ".join(
                f"({m['content']})" if m.get("weight") == 0 else m["content"]
                for m in thread.messages
            )
        )
    return found


def flat(tree: dict, parent: str | None = None) -> list[dict]:
    """The rows of the Hub's form; the text serves as id."""
    row = {name: value for name, value in tree.items() if name != "replies"}
    row |= {"message_id": row["text"], "parent_id": parent, "message_tree_id": "t"}
    return [row, *(other for reply in tree["replies"] for other in flat(reply, row["text"]))]


TREE = asks(
    "q",
    answers("worse", 1, asks("never", answers("seen", 0))),
    answers(
        "best",
        0,
        asks("q1", answers("unranked", None), answers("a1", 3)),
        asks("q2"),
        asks("q3", answers("a3", 0, asks("q4"))),
    ),
)


def test_best_answers_all_continuations_each_answer_trained_on_once():
    assert threads(TREE) == ["q best q1 a1", "q (best) q3 a3"]
    assert threads(TREE, asks("x", answers("best", 0))) == [
        "q best q1 a1",
        "q (best) q3 a3",
        "x best",
    ]


def test_a_missing_rank_comes_last_and_ties_keep_their_order():
    assert threads(asks("q", answers("a", None), answers("b", 7))) == ["q b"]
    assert threads(asks("q", answers("a", math.nan), answers("b", 7))) == ["q b"]
    assert threads(asks("q", answers("a", None), answers("b", None))) == ["q a"]
    assert threads(asks("q", {"text": "a", "role": "assistant"}, answers("b", 2))) == ["q b"]


def test_what_was_deleted_or_failed_its_review_is_gone_with_its_replies():
    gone = answers("a", 0, asks("q1", answers("a1", 0)), deleted=True)
    assert threads(asks("q", gone, answers("b", 1))) == ["q b"]
    assert threads(asks("q", gone | {"deleted": False, "review_result": None})) == ["q a q1 a1"]
    assert threads(asks("q", gone | {"deleted": False, "review_result": False})) == []
    assert threads(asks("q", answers("a", 0), deleted=True)) == []
    assert threads(asks("q", answers("a", 0, asks("x", answers("b", 0), deleted=True)))) == ["q a"]


def test_a_tree_without_answers_gives_nothing():
    assert threads(asks("q"), answers("a", 0)) == []


def test_single_messages_in_any_order_give_the_threads_of_their_tree():
    rows = flat(asks("q", answers("b", 1), answers("a", 0, asks("q1", answers("a1", None)))))
    for order in permutations(rows):
        found = list(read_threads(Record(row, f"hub:{row['text']}") for row in order))
        assert [[m["content"] for m in thread.messages] for thread in found] == [
            ["q", "a", "q1", "a1"]
        ]
        assert (found[0].origin, found[0].group) == ("hub:a1", "t")


def test_single_messages_read_like_the_tree_and_orphans_are_left_out():
    rows = [*flat(TREE), *flat(asks("lost", answers("too", 0)), parent="unknown")]
    found = list(read_threads(Record(row, "hub") for row in rows))
    told = [[message["content"] for message in thread.messages] for thread in found]
    assert told == [["q", "best", "q1", "a1"], ["q", "best", "q3", "a3"]]
    assert [m.get("weight", 1) for m in found[1].messages] == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"role": "prompter"}, "f:1: has no field 'text'"),
        (asks("q") | {"role": "user"}, "f:1: role 'user' is unknown"),
        (asks("q", answers("a", "first")), "f:1: field 'rank' is a string, not a number."),
        (asks("q", "a"), "f:1: a message of the tree is a string, not an object."),
    ],
)
def test_a_bad_message_is_told_with_its_place(message, sentence):
    with pytest.raises(UserError) as caught:
        list(read_threads([Record({"message_tree_id": "t", "prompt": message}, "f:1")]))
    assert str(caught.value).startswith(sentence)


def test_both_forms_are_recognised(tmp_path):
    tree, rows = tmp_path / "tree.jsonl", tmp_path / "rows.jsonl"
    tree.write_text(json.dumps({"message_tree_id": "t", "prompt": TREE}))
    rows.write_text("".join(json.dumps(row) + "\n" for row in flat(TREE)))
    for file in (tree, rows):
        source = RecordSource(str(file))
        assert source_format(source) == preference_format(source) == "openassistant"
        assert len(list(read_samples(source))) == 2
        assert len(list(read_preferences(source))) == 1


# --- comparisons


def comparisons(tree: dict) -> list[tuple[str, list[str], tuple]]:
    """Comparisons as the words of the prompt, the answers and the pairs."""
    records = [Record({"message_tree_id": "t", "prompt": tree}, "file:1")]
    found = []
    for told in read_comparisons(records):
        assert (told.origin, told.group, told.margins, told.kinds) == ("file:1", "t", None, None)
        for number, message in enumerate(told.prompt):
            assert message["role"] == ("assistant" if number % 2 else "user")
        assert all([m["role"] for m in answer] == ["assistant"] for answer in told.answers)
        prompt = " ".join(message["content"] for message in told.prompt)
        found.append((prompt, [answer[0]["content"] for answer in told.answers], told.pairs))
    return found


def test_ranked_answers_are_compared_after_any_answer():
    tree = asks(
        "q",
        answers("worst", 2, asks("q1", answers("b", 5), answers("a", 0), answers("?", None))),
        answers("best", 0, asks("q2", answers("only", 0)), asks("q3")),
        answers("middle", 1),
        answers("none", None, asks("q4", answers("d", 1), answers("c", 0))),
    )
    found = comparisons(tree)
    assert found == [
        ("q", ["best", "middle", "worst"], ((0, 1), (0, 2), (1, 2))),
        ("q worst q1", ["a", "b"], ((0, 1),)),
        ("q none q4", ["c", "d"], ((0, 1),)),
    ]
    rows = [Record(row, f"hub:{row['text']}") for row in reversed(flat(tree))]
    told = list(read_comparisons(rows))
    assert {(comparison.origin, comparison.pairs) for comparison in told} == {
        ("hub:q", ((0, 1), (0, 2), (1, 2))),
        ("hub:q1", ((0, 1),)),
        ("hub:q4", ((0, 1),)),
    }


def test_equal_ranks_and_missing_ones_are_no_comparison():
    tied = asks("q", answers("a", 1), answers("b", 0), answers("c", 1))
    assert comparisons(tied) == [("q", ["b", "a", "c"], ((0, 1), (0, 2)))]
    assert comparisons(asks("q", answers("a", 1), answers("b", 1))) == [("q", ["a", "b"], ())]
    assert comparisons(asks("q", answers("a", 1), answers("b", math.nan))) == []
    assert comparisons(asks("q", answers("a", 1), answers("b", 0, deleted=True))) == []
    assert comparisons(answers("a", 1, answers("b", 1), answers("c", 2))) == []
