"""Measures of responses: repetition, means, and who wins how certainly."""

import math
from dataclasses import replace

import pytest
from scipy.stats import binomtest

from lit_llm.evaluation.responses import (
    EvaluatedResponse,
    outcome,
    repetition,
    response_measures,
)


def response(index=0, score=1.0, judge=0.5, **changes):
    own = EvaluatedResponse(
        index=index,
        prompt=f"prompt {index}",
        response=f"answer {index}",
        length=4,
        stopped=True,
        score=score,
        scores={"reward": score, "judge": judge},
        kl=2.0,
        repetition=0.25,
    )
    return replace(own, **changes)


def against(score, other, judge=0.5, other_judge=0.5, index=0):
    baseline = response(index, other, other_judge, response="as it was")
    return response(index, score, judge, baseline=baseline)


@pytest.mark.parametrize(
    ("ids", "n", "share"),
    [
        ([1, 2, 3, 4, 5], 3, 0.0),
        ([1, 2, 3, 1, 2, 3], 3, 1 / 4),  # 123 231 312 123
        ([7] * 12, 3, 9 / 10),
        ([1, 2, 1, 2], 2, 1 / 3),
        ([1, 1], 3, 0.0),  # none
        ([1, 1, 1], 3, 0.0),  # one
        ([], 3, 0.0),
    ],
)
def test_repetition_is_the_share_of_n_grams_said_before(ids, n, share):
    assert repetition(ids, n) == pytest.approx(share)


def test_three_tokens_are_what_repeats_by_default():
    assert repetition([1, 2, 1, 2, 1]) == pytest.approx(1 / 3)  # 121 212 121


def test_the_measures_are_means_over_the_responses():
    rows = [
        response(0, 1.0, 0.0),
        response(1, 4.0, 0.5, length=10, stopped=False, kl=-1.0, repetition=0.5),
    ]
    assert response_measures(rows) == pytest.approx(
        {
            "objective/scores": 2.5,
            "objective/kl": 0.5,
            "rollout/response_length": 7.0,
            "rollout/eos_rate": 0.5,
            "rollout/repetition": 0.375,
            "scores/reward": 2.5,
            "scores/judge": 0.25,
        }
    )
    assert response_measures([]) == {}


@pytest.mark.parametrize(
    ("mine", "its", "won"), [(2.0, 1.0, 1.0), (1.0, 2.0, 0.0), (1.0, 1.0, 0.5), (-2.0, -1.0, 0.0)]
)
def test_the_higher_score_wins(mine, its, won):
    assert outcome(against(mine, its)) == won
    assert outcome(against(0.0, 9.0, judge=mine, other_judge=its), "judge") == won


def test_rounding_wins_nothing():
    assert outcome(against(100.0, 100.00005)) == 0.5
    assert outcome(against(100.0, 100.001)) == 0.0
    assert outcome(against(1e-9, 0.0)) == 0.5
    assert outcome(against(1e-3, 0.0)) == 1.0


def test_the_same_answer_is_a_tie_whatever_its_scores():
    same = response(0, 2.0, baseline=response(0, 1.0))
    assert outcome(same) == 0.5
    assert outcome(replace(same, stopped=False)) == 1.0, "cut off, it is not the same"
    assert outcome(replace(same, length=5)) == 1.0
    assert outcome(replace(same, response="else")) == 1.0


def test_without_a_baseline_and_without_a_number_nobody_wins():
    assert outcome(response()) is None
    assert outcome(against(math.nan, 1.0)) == 0.5
    assert outcome(against(1.0, math.nan)) == 0.5


def test_win_rates_have_wilson_s_interval_and_are_told_by_judge():
    # By the sum 12 wins and 8 losses; by the judge 5 wins, and 15 ties, which count half.
    rows = [
        against(1.0, 0.0 if i < 12 else 2.0, judge=1.0, other_judge=0.0 if i < 5 else 1.0, index=i)
        for i in range(20)
    ]
    found = response_measures(rows)
    ends = binomtest(12, 20).proportion_ci(method="wilson")
    assert found["win_rate"] == pytest.approx(0.6)
    assert found["win_rate_low"] == pytest.approx(ends.low, abs=1e-6)
    assert found["win_rate_high"] == pytest.approx(ends.high, abs=1e-6)
    assert found["win_rate/reward"] == pytest.approx(0.6)
    assert found["win_rate/judge"] == pytest.approx((5 + 7.5) / 20)
    assert found["win_rate_low/judge"] < 0.625 < found["win_rate_high/judge"]
    assert found["objective/scores"] == 1.0, "the policy's, not the reference's"


def test_prompts_that_are_asked_twice_count_once_in_the_interval():
    rows = [against(1.0, 0.0 if i < 12 else 2.0, index=i) for i in range(20)]
    once, twice = response_measures(rows), response_measures(rows + rows)
    for end in ("win_rate_low", "win_rate_high"):
        assert twice[end] == pytest.approx(once[end], abs=0.01)


def test_responses_without_a_baseline_are_not_among_the_wins():
    found = response_measures([against(1.0, 0.0, index=0), response(1, 5.0)])
    assert found["win_rate"] == 1.0 and found["objective/scores"] == 3.0
    # One prompt says little: Wilson's interval of 1 of 1.
    ends = binomtest(1, 1).proportion_ci(method="wilson")
    assert found["win_rate_low"] == pytest.approx(ends.low, abs=1e-6)
