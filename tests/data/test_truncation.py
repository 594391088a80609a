"""Cutting conversations to a length: by hand, and laws that hold for any conversation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_llm.data.chat_template import TokenizedChat
from lit_llm.data.truncation import fit, split_text, train_labels

# BOS 1, two questions of three tokens, answers that end with 9; a line feed (7) after each.
CHAT = TokenizedChat(
    [1, 20, 21, 22, 30, 31, 9, 7, 23, 24, 25, 32, 33, 34, 9, 7],
    [(4, 7), (11, 15)],
    [True, True],
)
FIRST = TokenizedChat([1, 20, 21, 22, 30, 31, 9], [(4, 7)], [True])


@pytest.mark.parametrize("last_only", [False, True])
def test_what_fits_is_kept(last_only):
    assert fit(CHAT, 16, last_only=last_only) == (CHAT, "kept")
    # The line feed after the last answer is no part of it.
    short = TokenizedChat(CHAT.input_ids[:15], CHAT.turns, CHAT.trained)
    assert fit(CHAT, 15, last_only=last_only) == (short, "kept")


@pytest.mark.parametrize("seq_len", range(7, 15))
def test_later_turns_go_first(seq_len):
    assert fit(CHAT, seq_len) == (FIRST, "turns_cut")


@pytest.mark.parametrize(
    ("seq_len", "ids", "turn"),
    [
        (6, [20, 21, 22, 30, 31, 9], (3, 6)),
        (5, [21, 22, 30, 31, 9], (2, 5)),
        (4, [22, 30, 31, 9], (1, 4)),
    ],
)
def test_then_the_prompt_on_its_left(seq_len, ids, turn):
    assert fit(CHAT, seq_len) == (TokenizedChat(ids, [turn], [True]), "prompt_cut")


@pytest.mark.parametrize(
    ("seq_len", "ids", "turn"),
    [(6, [1, 21, 22, 30, 31, 9], (3, 6)), (5, [1, 22, 30, 31, 9], (2, 5))],
)
def test_bos_survives_the_cut(seq_len, ids, turn):
    wanted = TokenizedChat(ids, [turn], [True])
    assert fit(CHAT, seq_len, bos_token_id=1) == (wanted, "prompt_cut")
    # No BOS at the beginning, none there afterwards.
    other = TokenizedChat([20, *CHAT.input_ids[1:]], CHAT.turns, CHAT.trained)
    left = fit(other, seq_len, bos_token_id=1)[0]
    assert left == TokenizedChat(CHAT.input_ids[7 - seq_len : 7], [(seq_len - 3, seq_len)], [True])


def test_an_answer_that_does_not_fit_whole_is_dropped():
    assert fit(CHAT, 3) == (None, "dropped")
    assert fit(CHAT, 4, bos_token_id=1) == (None, "dropped")  # no token of the prompt but BOS


def test_text_without_a_prompt_is_dropped():
    text = TokenizedChat([30, 31, 32, 9], [(0, 4)], [True])
    assert fit(text, 3) == (None, "dropped")
    begun = TokenizedChat([1, 31, 32, 9], [(1, 4)], [True])
    assert fit(begun, 3, bos_token_id=1) == (None, "dropped")
    assert fit(TokenizedChat([1, 2, 3], [], []), 2) == (None, "dropped")


@pytest.mark.parametrize(
    ("seq_len", "bos", "ids", "turns"),
    [
        # The earlier answer is whole, then in part, and counts as prompt.
        (14, None, CHAT.input_ids[1:15], [(3, 6), (10, 14)]),
        (11, None, CHAT.input_ids[4:15], [(0, 3), (7, 11)]),
        (10, None, CHAT.input_ids[5:15], [(6, 10)]),
        (12, 1, [1, *CHAT.input_ids[4:15]], [(1, 4), (8, 12)]),
        (11, 1, [1, *CHAT.input_ids[5:15]], [(7, 11)]),
        (5, None, [25, 32, 33, 34, 9], [(1, 5)]),
        (6, 1, [1, 25, 32, 33, 34, 9], [(2, 6)]),
    ],
)
def test_only_the_last_turn_counts(seq_len, bos, ids, turns):
    left, outcome = fit(CHAT, seq_len, bos_token_id=bos, last_only=True)
    assert left == TokenizedChat(ids, turns, [True] * len(turns))
    assert outcome == "prompt_cut"


def test_the_last_turn_is_dropped_rather_than_cut():
    assert fit(CHAT, 4, last_only=True) == (None, "dropped")
    assert fit(CHAT, 5, bos_token_id=1, last_only=True) == (None, "dropped")


def test_answers_that_are_not_trained_on_do_not_count():
    later = TokenizedChat(CHAT.input_ids, CHAT.turns, [False, True])
    assert fit(later, 15)[1] == "kept"
    # Ending with the first answer would leave nothing to learn.
    assert fit(later, 14) == (
        TokenizedChat(CHAT.input_ids[1:15], [(3, 6), (10, 14)], [False, True]),
        "prompt_cut",
    )
    first = TokenizedChat(CHAT.input_ids, CHAT.turns, [True, False])
    assert fit(first, 15) == (FIRST, "kept")  # nothing to learn is lost
    assert fit(TokenizedChat(CHAT.input_ids, CHAT.turns, [False, False]), 15) == (None, "dropped")


CHATS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 6), st.booleans(), st.integers(0, 2)),
    min_size=1,
    max_size=4,
)


@given(
    parts=CHATS,
    bos=st.booleans(),
    seq_len=st.integers(1, 40),
    last_only=st.booleans(),
)
def test_any_conversation(parts, bos, seq_len, last_only):
    ids, turns, trained = [1] if bos else [], [], []
    for question, answer, flag, rest in parts:
        ids += range(100 + len(ids), 100 + len(ids) + question)
        turns.append((len(ids), len(ids) + answer))
        ids += range(1000 + len(ids), 1000 + len(ids) + answer - 1)
        ids.append(5000 + len(ids))  # the end of a turn, another for each
        trained.append(flag)
        ids += [7] * rest
    chat = TokenizedChat(ids, turns, trained)
    left, outcome = fit(chat, seq_len, bos_token_id=1, last_only=last_only)
    assert (left is None) == (outcome == "dropped")
    answers = [ids[start:stop] for start, stop in turns]
    if left is None:
        counted = [a for a, flag in zip(answers, trained, strict=True) if flag]
        counted = answers[-1:] if last_only else counted[:1]
        assert all(len(answer) + 1 + bos > seq_len for answer in counted)
        return
    assert len(left.input_ids) <= seq_len
    assert not bos or left.input_ids[0] == 1
    found = [left.input_ids[start:stop] for start, stop in left.turns]
    where = [answers.index(answer) for answer in found]
    assert [trained[k] for k in where] == left.trained
    if outcome == "kept":
        counted = [len(turns) - 1] if last_only else [k for k, flag in enumerate(trained) if flag]
        assert len(ids) <= seq_len or set(counted) <= set(where)
        assert left.input_ids == ids[: len(left.input_ids)]
    if outcome == "turns_cut":
        assert any(left.trained)
        assert where == list(range(len(where)))
        assert left.input_ids == ids[: turns[where[-1]][1]]
    if outcome == "prompt_cut":
        assert len(left.input_ids) == seq_len
        assert last_only or left.trained.index(True) == len(left.trained) - 1
        assert left.input_ids[-1] >= 5000


# --- labels


def test_labels():
    no = -100
    chat = TokenizedChat([1, 20, 30, 9, 21, 31, 9, 7], [(2, 4), (5, 7)], [True, True])
    assert train_labels(chat, "all") == chat.input_ids
    assert train_labels(chat, "assistant") == [no, no, 30, 9, no, 31, 9, no]
    assert train_labels(chat, "last") == [no, no, no, no, no, 31, 9, no]
    train_labels(chat, "all")[0] = 5
    assert chat.input_ids[0] == 1  # a copy


def test_labels_of_answers_that_are_not_trained_on():
    no = -100
    ids = [1, 20, 30, 9, 21, 31, 9, 7]
    first = TokenizedChat(ids, [(2, 4), (5, 7)], [True, False])
    assert train_labels(first, "all") == ids
    assert train_labels(first, "assistant") == [no, no, 30, 9, no, no, no, no]
    assert train_labels(first, "last") == [no] * 8
    last = TokenizedChat(ids, [(2, 4), (5, 7)], [False, True])
    assert train_labels(last, "assistant") == [no, no, no, no, no, 31, 9, no]
    assert train_labels(TokenizedChat(ids, [], []), "last") == [no] * 8


# --- plain text


@pytest.mark.parametrize(
    ("length", "pieces"),
    [
        (0, []),
        (2, [[0, 1]]),
        (3, [[0, 1, 2]]),
        (4, [[0, 1, 2], [3]]),
        (7, [[0, 1, 2], [3, 4, 5], [6]]),
    ],
)
def test_pieces_of_text(length, pieces):
    assert split_text(list(range(length)), 3) == pieces
