"""Numbers and intervals from what each item gave, and their way through a file."""

import json
import math

import numpy as np
import pytest

from lit_llm.evaluation.results import (
    Answer,
    Items,
    TaskResult,
    measure,
    resampled,
    results_to_dict,
    task_from_dict,
)


def items(numerators, denominators=None):
    ones = [1.0] * len(numerators)
    keys = [f"item {number}" for number in range(len(numerators))]
    return Items(keys, list(numerators), list(denominators or ones))


def test_a_number_is_a_ratio_of_sums_and_perplexity_its_exponential():
    assert measure("t", "m", items([6.0, 2.0], [3.0, 1.0])).value == 2.0
    assert measure("t", "m", items([1.0, 8.0], [1.0, 2.0])).value == 3.0  # not the mean of 1 and 4
    found = measure("t", "m", items([1.0, 8.0], [1.0, 2.0]), scale="exp", better="lower")
    assert found.value == pytest.approx(math.exp(3))
    assert (found.better, found.count) == ("lower", 2)


def test_shares_have_wilsons_interval_also_where_all_are_right():
    """Reference values of Wilson's interval for 20 of 20 and 8 of 10."""
    found = measure("t", "m", items([1.0] * 20))
    assert (found.low, found.high) == (pytest.approx(0.8389, abs=1e-4), 1.0)
    found = measure("t", "m", items([1.0] * 8 + [0.0] * 2))
    assert (found.low, found.high) == (
        pytest.approx(0.4902, abs=1e-4),
        pytest.approx(0.9433, abs=1e-4),
    )


def test_the_bootstrap_agrees_with_the_normal_approximation():
    """Of a mean of many values both must say the same, whatever draws them."""
    values = np.random.default_rng(3).exponential(2.0, size=800)
    found = measure("t", "m", items(values.tolist()))
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.low == pytest.approx(values.mean() - half, abs=0.25 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.25 * half)


def test_long_documents_count_by_their_tokens():
    """Ten documents of 1 token at 9 nats weigh as much as one of ten tokens at 1 nat."""
    one = items([9.0] * 10 + [10.0] * 10, [1.0] * 10 + [10.0] * 10)
    assert measure("t", "m", one).value == pytest.approx(190 / 110)


def test_the_same_items_are_drawn_for_both_models():
    """A model that is better by 1 on every item is better by 1 in every resample."""
    values = [0.3, 5.0, 2.2, 9.1]
    first, second = (resampled(items([v + add for v in values])) for add in (0.0, 1.0))
    assert second - first == pytest.approx(np.ones(2000))
    assert first.std() > 0.1


def test_one_item_has_no_interval():
    found = measure("t", "m", items([2.5]))
    assert found.value == 2.5 and math.isnan(found.low) and math.isnan(found.high)


@pytest.mark.parametrize("scale", ["mean", "exp"])
@pytest.mark.parametrize("values", [[math.nan] * 3, [math.nan, 1.0, 2.0]])
def test_what_has_no_value_has_no_interval(values, scale):
    """A diverged model must not end the run that it is measured in, nor look measured."""
    found = measure("t", "m", items(values), scale=scale)
    assert all(math.isnan(one) for one in (found.value, found.low, found.high))


def test_a_perplexity_beyond_all_numbers_stays_within_its_interval():
    found = measure("t", "m", items([2000.0, 2000.0, 600.0]), scale="exp")
    assert found.low <= found.value <= found.high < math.inf


def test_resamples_without_tokens_are_left_out():
    found = measure("t", "m", items([3.0, 0.0], [1.0, 0.0]))
    assert (found.value, found.low, found.high) == (3.0, 3.0, 3.0)


def test_results_come_back_from_json_as_they_were():
    answers = [Answer("t", "a", "Why?", "So.", "Because.", {"acc": 1.0}, stopped=True)]
    own = measure("t", "acc", Items(["a", "b"], [1.0, 0.0], [1.0, 1.0], ["x", "y"]), chance=0.5)
    result = TaskResult("t", "facts", [own], answers, settings={"limit": 2}, seconds=1.5)
    back = task_from_dict(json.loads(json.dumps(results_to_dict(result))))
    assert back == result
