"""Schedules: hand-computed factors, and no update with learning rate 0."""

import math

import pytest

from lit_llm.errors import UserError
from lit_llm.modules.schedules import Schedule


def test_wsd_by_hand() -> None:
    schedule = Schedule("wsd", warmup_steps=4, decay_steps=5, min_factor=0.1)
    factors = [schedule.factor(step, 20) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:16] == [1.0] * 12  # the decay starts at 15, with progress 0
    assert factors[16:] == pytest.approx([0.82, 0.64, 0.46, 0.28])


def test_cosine_by_hand() -> None:
    schedule = Schedule("cosine", warmup_steps=0, min_factor=0.0)
    assert schedule.factor(0, 100) == 1.0
    assert schedule.factor(25, 100) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert schedule.factor(50, 100) == pytest.approx(0.5)
    assert schedule.factor(100, 100) == pytest.approx(0.0)


def test_linear_ends_at_min_factor_and_stays() -> None:
    schedule = Schedule("linear", warmup_steps=0, min_factor=0.2)
    assert schedule.factor(50, 100) == pytest.approx(0.6)
    assert schedule.factor(100, 100) == schedule.factor(1000, 100) == pytest.approx(0.2)


def test_shares_of_the_run_are_steps() -> None:
    shares = Schedule("wsd", warmup_steps=0.1, decay_steps=0.2)
    steps = Schedule("wsd", warmup_steps=20, decay_steps=40)
    for step in range(200):
        assert shares.factor(step, 200) == steps.factor(step, 200)


@pytest.mark.parametrize("name", ["wsd", "cosine", "linear", "constant"])
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_no_update_is_thrown_away(name: str, total: int) -> None:
    schedule = Schedule(name, warmup_steps=0.5)  # type: ignore[arg-type]
    assert all(schedule.factor(step, total) > 0 for step in range(total))


@pytest.mark.parametrize(
    "kwargs", [{"warmup_steps": -1}, {"decay_steps": -0.1}, {"min_factor": 1.5}]
)
def test_impossible_numbers_are_refused(kwargs: dict[str, float]) -> None:
    with pytest.raises(UserError, match="schedule: "):
        Schedule("wsd", **kwargs)  # type: ignore[arg-type]
