"""What the diagnoses of PPO stand on: stretches of a metric, its noise, the limits."""

import math
import random
from dataclasses import replace

import pytest

from lit_llm.errors import UserError
from lit_llm.evaluation.ppo_history import Series, Stretch, series
from lit_llm.evaluation.ppo_limits import HealthLimits


def test_noise_is_that_about_the_trend():
    draw = random.Random(0)
    values = [0.01 * i + draw.gauss(0, 0.5) for i in range(4000)]
    assert Series(range(4000), values).noise == pytest.approx(0.5, rel=0.05)
    # (1 + 9 + 4) / 2 / 3
    assert Series(range(4), [0.0, 1.0, -2.0, 0.0]).noise == pytest.approx(math.sqrt(14 / 6))


def test_a_rise_counts_standard_errors():
    found = Series(range(1, 5), [0.0, 1.0, -2.0, 0.0])
    # Means 0.5 and -1; the standard error of their difference is noise * sqrt(1/2 + 1/2).
    rise = found.rise(found.part(0, 2), found.part(2))
    assert rise == pytest.approx(-1.5 / math.sqrt(14 / 6))
    still = Series((1, 2), (3.0, 3.0))
    assert still.rise(still.part(0, 1), still.part(1)) == 0.0


def test_stretches_tell_their_iterations_and_middle():
    assert Stretch((4, 5, 6), (9.0, 1.0, 2.0)).median == 2.0
    assert Stretch((4, 5, 6, 7), (9.0, 1.0, 2.0, 4.0)).median == 3.0
    assert Stretch((4, 5), (1.0, 2.0)).when == "iterations 4 to 5"
    assert Stretch((4,), (1.0,)).when == "iteration 4"


def test_a_series_takes_numbers_from_rows_or_places():
    rows = [{"a": 1.0}, {"b": 2.0}, {"a": math.nan}, {"a": 3.0}]
    assert series(rows, "a") == Series((1, 4), (1.0, 3.0))
    assert series([{"iteration": 7.0, "a": 1.0}], "a") == Series((7,), (1.0,))
    assert series(rows, "b") is None and series(rows, "c") is None
    assert series(rows[:3], "a") is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 1}, "window must be at least 2, got 1"),
        ({"critic_iterations": 0}, "critic_iterations must be at least 2"),
        ({"kl_growth": 1.0}, "kl_growth is a factor above 1, got 1.0"),
        ({"length_factor": 0.5}, "length_factor is a factor above 1"),
        ({"clipfrac": -0.1}, "clipfrac must not be negative, got -0.1"),
        ({"noise": math.nan}, "noise must not be negative"),
    ],
)
def test_limits_that_make_no_sense_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        replace(HealthLimits(), **values)
