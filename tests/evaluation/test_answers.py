"""Measures of answers, worked out by hand."""

import pytest

from lit_llm.errors import UserError
from lit_llm.evaluation.answers import answer_measures


def rouge_l(answer, reference):
    return answer_measures([answer], [reference], [True], [None])["rouge_l"]


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        # The example of Lin (2004): LCS "police the gunman" and "the gunman", of 4 words each
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        # LCS "a c e" = 3: precision 3/5, recall 3/3, F = 2 * 0.6 * 1 / 1.6
        ("a b c d e", "a c e", 0.75),
        # LCS "b d" or "a d" = 2: precision 2/3, recall 2/4, F = 2 * 2 / (3 + 4)
        ("b a d", "a b c d", 4 / 7),
        ("Red, GREEN; blue!", "red green blue", 1.0),
        ("déjà vu", "DÉJÀ vu", 1.0),
        ("привет мир", "привет мой мир", 0.8),
        ("one", "two", 0.0),
        ("", "two", 0.0),
        ("!?", "!?", 0.0),  # no words
    ],
)
def test_rouge_l_by_hand(answer, reference, expected):
    assert rouge_l(answer, reference) == pytest.approx(expected, abs=1e-6)


def test_means_over_the_answers():
    measures = answer_measures(
        ["a b", "a b c d", "", "x"],
        ["a b", "a c", "a", "y"],
        [True, True, True, False],
        [None] * 4,
    )
    # F of each: 1, 2 * 2 / (4 + 2), 0, 0
    expected = {"stop_rate": 3 / 4, "well_formed_rate": 2 / 4, "rouge_l": (1 + 2 / 3) / 4}
    assert measures == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "well_formed"),
    [
        ("An answer.", True),
        ("1 < 2 and 3 > 2, x | y, [1], <b>bold</b>", True),
        (" \n\t", False),
        ("caf\ufffd", False),
        ("Sure.<|im_end|>", False),
        ("<|start_header_id|>user", False),
        ("<end_of_turn>", False),
        ("</s>", False),
        ("[INST] and", False),
        ("ends with [EOT]", False),  # a special token of this tokenizer
    ],
)
def test_well_formed_means_text_without_control(answer, well_formed):
    measures = answer_measures([answer], ["x"], [True], [None], special_tokens=["[EOT]"])
    assert measures["well_formed_rate"] == well_formed
    cut_off = answer_measures([answer], ["x"], [False], [None])
    assert cut_off["well_formed_rate"] == 0


def test_a_format_is_matched_as_a_whole_and_over_lines():
    pattern = r".*#### -?\d+"
    answers = ["2 + 2\n= 4\n#### 4", "#### 4 apples", "4", "#### 4 apples"]
    measures = answer_measures(answers, ["4"] * 4, [True] * 4, [pattern] * 3 + [None])
    assert measures["well_formed_rate"] == 2 / 4


def test_no_answers_have_no_measures():
    assert answer_measures([], [], [], []) == {}


def test_a_broken_format_is_named():
    with pytest.raises(UserError, match=r"the answer format '\(' is no regular expression"):
        answer_measures(["a"], ["a"], [True], ["("])
