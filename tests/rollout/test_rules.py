"""Rules against cases decided by hand."""

import time

import pytest

from lit_llm.errors import UserError
from lit_llm.rollout.rewards import RewardSample, load_reward_function, score_samples
from lit_llm.rollout.rules import exact_match, length_window, regex

GSM8K = "He buys 3 * 2 = <<3*2=6>>6 pens and pays 6 * 12 = $72.\n#### 72"


def sample(response, reference=None, answer_format=None, tokens=3):
    return RewardSample(
        prompt="?",
        response=response,
        prompt_ids=[1],
        response_ids=list(range(tokens)),
        stopped=True,
        reference=reference,
        answer_format=answer_format,
    )


# ----- exact match --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        # The text after the mark, or the last number.
        ("3 * 2 = 6, so 6 * 12 = 72\n#### 72", GSM8K, 1),
        ("The answer is 72.", GSM8K, 1),
        ("The answer is 71.", GSM8K, 0),
        ("72 pens cost 6", GSM8K, 0),  # not the last one
        ("#### 6\n#### 72", GSM8K, 1),
        ("#### 72\n#### 6", GSM8K, 0),
        ("#### 72\n\nThat took 5 steps.", GSM8K, 1),
        ("####\n72", GSM8K, 1),
        ("#### 72 dollars", GSM8K, 1),
        ("####", GSM8K, 0),
        ("", GSM8K, 0),
        ("no idea", GSM8K, 0),
        ("seventy-two", GSM8K, 0),
        # Numbers by their values.
        ("It is $1,072.00", "1072", 1),
        ("about 1072,", "#### 1,072", 1),
        ("1 072", "1072", 0),
        ("so x = -5", "-5", 1),
        ("so x = −5", "-5", 1),
        ("so x = 5", "-5", 0),
        ("he lost -$5", "-5", 1),
        ("10-5", "5", 1),  # a difference
        ("3.50", "3.5", 1),
        ("3.51", "3.5", 0),
        (".5", "0.5", 1),
        ("half, 1/2", "0.5", 1),
        ("2 / 4", "1/2", 1),
        ("3/2", "1/2", 0),
        ("50%", "50", 1),
        ("50 %", "50%", 1),
        ("1e3", "1000", 1),
        ("1/0", "0", 0),
        ("1/0", "1/0", 1),
        ("- 5\n- 6", "6", 1),  # a list
        # Texts without case, and without white space and punctuation around them.
        ("Paris", "Paris", 1),
        (" paris. ", "Paris", 1),
        ("The  Eiffel\nTower!", "the eiffel tower", 1),
        ("I think Paris", "Paris", 0),
        ("There are 3 options.\n#### Paris", "Paris", 1),
        ("London", "Paris", 0),
        ("-", "+", 0),
    ],
)
def test_final_answers(response: str, reference: str, expected: int) -> None:
    assert exact_match([sample(response, reference)]) == [expected]


def test_answers_found_by_a_pattern() -> None:
    pattern = r"answer is:?\s*(\S+?)[.\n]"
    responses = ["The answer is: 7. I am 100 % sure.", "7", "The answer is 8.\nThe answer is 7.\n"]
    samples = [sample(response, "7") for response in responses]
    assert exact_match(samples, pattern=pattern) == [1, 0, 1]
    # Without a group it is the whole match, and the reference is read by the pattern as well.
    assert exact_match([sample("a=1 b=2", "b=2 c")], pattern=r"[a-c]=\d") == [1]
    assert exact_match([sample("a=1 c=2", "b=2 c")], pattern=r"[a-c]=\d") == [0]
    # A line feed is a character like others, and a group may take no part.
    assert exact_match([sample("<a>x\ny</a>", "x\ny")], pattern="<a>(.*)</a>") == [1]
    assert exact_match([sample("no", "7")], pattern="(7)?no") == [0]


def test_without_normalising_every_character_counts() -> None:
    pairs = [("7.0", "7"), ("paris", "Paris"), ("Paris.", "Paris"), ("It is 7", "7"), (" a ", "a")]
    samples = [sample(*pair) for pair in pairs]
    assert exact_match(samples, normalise=False) == [0, 0, 0, 1, 1]
    assert exact_match(samples) == [1, 1, 1, 1, 1]


def test_huge_numbers_cost_nothing() -> None:
    start = time.perf_counter()
    huge = [
        "1e999999999",
        "1e-999999999",
        "9" * 20_000,
        "1e999999999/1e-999999999",
        "1e" + "9" * 99,
    ]
    assert exact_match([sample(text, "72") for text in huge]) == [0] * 5
    assert exact_match([sample("9" * 20_000, "9" * 20_000)]) == [1]
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("reference", [None, "", " \n"])
def test_no_reference_is_told_with_the_sample(reference) -> None:
    function = load_reward_function("exact_match")
    samples = [sample("1", "1"), sample("two", reference)]
    with pytest.raises(UserError, match="reward maths: exact_match compares .*response 'two'"):
        score_samples("maths", function, samples)


# ----- length -------------------------------------------------------------------------------------


def lengths(*counts, **options):
    return length_window([sample("", tokens=count) for count in counts], **options)


def test_hard_limits() -> None:
    assert lengths(0, 1, 2, 5, 6, shortest=2, longest=5) == [0, 0, 1, 1, 0]
    assert lengths(0, 5, 6, longest=5) == [1, 1, 0]
    assert lengths(0, 2, 999, shortest=2) == [0, 1, 1]
    assert lengths(0, 1, longest=0) == [1, 0]


def test_soft_edges_fall_in_a_straight_line() -> None:
    found = lengths(5, 6, 8, 10, 12, 20, 21, 24, 25, 99, shortest=10, longest=20, edge=5)
    assert found == pytest.approx([0, 0.2, 0.6, 1, 1, 1, 0.8, 0.2, 0, 0])


def test_words_are_what_white_space_parts() -> None:
    samples = [sample("one, two\n three", tokens=99), sample("", tokens=99), sample("a b c d")]
    assert length_window(samples, shortest=1, longest=3, unit="words") == [1, 0, 0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give shortest, longest or both"),
        ({"edge": 3}, "give shortest, longest or both"),
        ({"shortest": 5, "longest": 4}, "longest 4 is below shortest 5"),
        ({"shortest": -1}, "shortest must be a whole number from 0 on, got -1"),
        ({"longest": "20"}, "longest must be a whole number from 0 on, got '20'"),
        ({"longest": 2.5}, "got 2.5"),
        ({"longest": True}, "got True"),
        ({"longest": 5, "edge": None}, "edge must be a whole number"),
        ({"longest": 5, "unit": "bytes"}, "unit must be tokens or words, got 'bytes'"),
    ],
)
def test_limits_that_make_no_sense_are_told_before_any_response(options, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_reward_function("length_window", options)


# ----- regular expressions ------------------------------------------------------------------------


def test_a_pattern_is_searched_or_matches_the_whole() -> None:
    samples = [sample("<b>bold</b>"), sample("see <b>x\ny</b>"), sample("none")]
    assert regex(samples, pattern="<b>.*</b>") == [1, 1, 0]
    assert regex(samples, pattern="<b>.*</b>", full=True) == [1, 0, 0]


def test_by_default_each_sample_has_its_own_format() -> None:
    samples = [
        sample("42", answer_format=r"\d+"),
        sample("42 apples", answer_format=r"\d+"),
        sample("a\nb", answer_format="a.b"),
    ]
    assert regex(samples) == [1, 0, 1]
    assert regex(samples, pattern="b") == [0, 0, 1]
    with pytest.raises(UserError, match="reward form: regex needs a pattern.*response 'free'"):
        score_samples("form", load_reward_function("regex"), [*samples, sample("free")])
    with pytest.raises(UserError, match="pattern '\\[' is no regular expression"):
        regex([sample("a", answer_format="[")])


@pytest.mark.parametrize("rule", ["regex", "exact_match"])
@pytest.mark.parametrize(("pattern", "words"), [("(", "no regular expression"), (7, "is no text")])
def test_bad_patterns_are_told_before_any_response(rule: str, pattern, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_reward_function(rule, {"pattern": pattern})
