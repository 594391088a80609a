"""Diagnoses of PPO: each is provoked, and healthy runs, however noisy, provoke none."""

import math
import random
import re
from dataclasses import fields

import pytest

from lit_llm.evaluation.ppo_health import HealthLimits, diagnose
from lit_llm.modules.ppo_config import PPOConfig


def healthy(count, noise=0.0, seed=0):
    """A run that learns: scores and judge rise, entropy falls somewhat, KL settles at 6 nats.

    The noise of an iteration is that of 16 responses times ``noise``: a share p of them has the
    deviation sqrt(p (1 - p) / 16), a KL of k nats one of sqrt(2 k / 16).
    """
    draw = random.Random(seed)

    def about(value, deviation):
        return value + noise * draw.gauss(0, deviation)

    def share(value):
        return min(1.0, max(0.0, about(value, math.sqrt(value * (1 - value) / 16))))

    rows = []
    for i in range(count):
        learned = 1 - math.exp(-i / 20)
        kl = 6 * learned
        rows.append(
            {
                "iteration": i + 1,
                "objective/kl": about(kl, math.sqrt(2 * kl / 16)),
                "objective/scores": about(-0.5 + 2 * learned, 0.25),
                "objective/scores_std": abs(about(1.0, 0.18)),
                "objective/rlhf_reward": about(-0.5 + 1.7 * learned, 0.25),
                "objective/entropy": about(2.5 - 0.8 * learned, 0.1),
                "objective/kl_coef": 0.05,
                "policy/approxkl": abs(about(0.01, 0.01)) + 2.0 * (draw.random() < 0.03) * noise,
                "policy/clipfrac": share(0.12),
                "policy/ratio_mean": 1.0,
                "policy/ratio_max": about(3.0, 1.0),
                "policy/first_ratio_error": 1e-6,
                "loss/policy": about(-0.02, 0.02),
                "loss/value": abs(about(0.3, 0.2)),
                "value/explained_variance": about(0.5 * learned - 0.2 * (1 - learned), 0.3),
                "rollout/response_length": about(40 + 5 * learned, 5.0),
                "rollout/eos_rate": share(0.7 + 0.1 * learned),
                "rollout/repetition": share(0.05 + 0.03 * learned),
                "scores/reward": about(-0.5 + 2 * learned, 0.25),
                "judge/held_out": about(-0.2 + 0.5 * learned, 0.25),
            }
        )
    return rows


def changed(rows, **metrics):
    """The rows with metrics (``objective__kl``) in place of theirs: numbers, or f(iteration)."""
    result = []
    for row in rows:
        new = {
            name.replace("__", "/"): value(row["iteration"]) if callable(value) else value
            for name, value in metrics.items()
        }
        result.append(row | new)
    return result


def names(rows, limits=None):
    return [found.name for found in diagnose(rows, limits)]


def the_one(rows, name, limits=None):
    """The only diagnosis; its text has all its parts."""
    (found,) = diagnose(rows, limits)
    assert found.name == name
    assert re.search(r"iterations? \d", found.text, re.IGNORECASE), "evidence: when"
    assert "Usual cause: " in found.text and "Cure: " in found.text
    return found


# ----- healthy runs -------------------------------------------------------------------------------


def test_a_healthy_run_is_left_alone_from_its_first_iteration_to_its_last():
    assert diagnose([]) == []
    rows = healthy(120)
    for count in range(1, len(rows) + 1):
        assert names(rows[:count]) == []


@pytest.mark.parametrize("seed", range(12))
def test_the_noise_of_small_iterations_cries_no_wolf(seed):
    rows = healthy(150, noise=1.0, seed=seed)
    assert any(row["value/explained_variance"] < 0 for row in rows[50:]), "noisy indeed"
    assert any(row["policy/approxkl"] > 1 for row in rows)
    found = [(count, names(rows[:count])) for count in range(1, len(rows) + 1)]
    assert [one for one in found if one[1]] == []


@pytest.mark.parametrize("seed", range(6))
def test_a_run_that_learns_nothing_is_not_slandered(seed):
    """All metrics noise about a constant, KL about 0: the estimates fall below it as often."""
    draw = random.Random(seed)
    rows = changed(
        healthy(1) * 150,
        objective__kl=lambda _: draw.gauss(0.02, 0.05),
        objective__scores=lambda _: draw.gauss(0, 0.25),
        judge__held_out=lambda _: draw.gauss(0, 0.25),
        rollout__eos_rate=lambda _: sum(draw.random() < 0.5 for _ in range(16)) / 16,
        rollout__response_length=lambda _: draw.gauss(40, 8),
        rollout__repetition=lambda _: abs(draw.gauss(0.1, 0.05)),
        value__explained_variance=lambda _: draw.gauss(0.1, 0.3),
    )
    rows = [row | {"iteration": number} for number, row in enumerate(rows, start=1)]
    assert min(row["objective/kl"] for row in rows) < -0.05
    assert [names(rows[:count]) for count in range(1, 151) if names(rows[:count])] == []


def test_what_is_not_measured_is_not_judged():
    """Critic-free training has no value metrics; a history may lack nearly everything."""
    rows = [{k: v for k, v in row.items() if "value" not in k} for row in healthy(40)]
    assert names(rows) == []
    assert names([{"objective/kl": 3.0} for _ in range(40)]) == []
    assert names([{} for _ in range(40)]) == []


def test_a_metric_that_is_over_is_not_judged():
    rows = changed(healthy(20), objective__kl=80.0)
    assert names(rows) == ["kl_growth"]
    assert names([*rows, {"objective/entropy": 1.7}]) == []


# ----- each diagnosis -----------------------------------------------------------------------------


def test_nan_is_told_at_once_with_its_metrics():
    rows = healthy(7)
    rows[-1] |= {"loss/policy": math.nan, "policy/ratio_max": math.inf}
    found = the_one(rows, "nan")
    assert found.severity == "error"
    assert "In iteration 7" in found.text
    assert "loss/policy (nan)" in found.text and "policy/ratio_max (inf)" in found.text
    assert "objective/kl" not in found.text
    assert names([*rows, healthy(8)[-1]]) == [], "over"


def test_explained_variance_may_be_undefined():
    assert names(changed(healthy(30), value__explained_variance=math.nan)) == []


def test_a_policy_that_is_not_the_one_that_sampled_is_told_at_once():
    (first,) = diagnose(changed(healthy(1), policy__first_ratio_error=0.21))
    assert (first.name, first.severity) == ("off_policy_start", "error")
    assert "iteration 1 " in first.text and "0.21" in first.text
    assert "model.base.dropout" in first.text
    error = the_one(changed(healthy(9), policy__first_ratio_error=0.004), "off_policy_start")
    assert error.severity == "warning", "rounding"
    assert "5 times in iterations 5 to 9" in error.text and "limit 0.001" in error.text
    assert names(changed(healthy(9), policy__first_ratio_error=0.0009)) == []
    assert names(changed(healthy(9), policy__first_ratio_error=lambda i: 0.5 * (i < 9))) == []


def test_a_negative_kl_is_told_when_it_cannot_be_chance():
    found = the_one(changed(healthy(12), objective__kl=-0.15), "negative_kl")
    assert found.severity == "error" and "-0.15 nats" in found.text
    assert "iterations 8 to 12" in found.text and "model.generation.top_p" in found.text
    # One iteration far below 0 is enough, and a little below 0 never is.
    assert names(changed(healthy(1), objective__kl=-0.6)) == ["negative_kl"]
    assert names(changed(healthy(1), objective__kl=-0.4)) == []
    assert names(changed(healthy(12), objective__kl=-0.09)) == []
    assert names(changed(healthy(12), objective__kl=lambda i: -0.3 if i == 12 else 0.0)) == []


def test_a_kl_above_the_limit_is_an_error():
    far = changed(healthy(12), objective__kl=40.0, rollout__response_length=50.0)
    found = the_one(far, "kl_growth")
    assert found.severity == "error"
    assert "40 nats a response, 0.8 a token (median over iterations 8 to 12" in found.text
    assert "limit 30" in found.text and "model.ppo.kl_coef" in found.text
    assert names(changed(healthy(3), objective__kl=40.0)) == ["kl_growth"], "soon"
    assert names(changed(healthy(2), objective__kl=40.0)) == []
    assert names(changed(healthy(12), objective__kl=29.0)) == []
    assert names(changed(healthy(12), objective__kl=40.0), HealthLimits(kl=50)) == []
    # One response that runs away is no drift: mean 44 over the window, median 5.
    assert names(changed(healthy(12), objective__kl=lambda i: 200.0 if i == 11 else 5.0)) == []


def test_a_kl_that_doubles_within_a_window_is_a_warning():
    rows = changed(healthy(20), objective__kl=lambda i: 1.2**i / 2)
    found = the_one(rows, "kl_growth")
    assert found.severity == "warning"
    before = sum(1.2**i / 2 for i in range(11, 16)) / 5
    now = sum(1.2**i / 2 for i in range(16, 21)) / 5
    assert f"from {before:.3g} nats a response in iterations 11 to 15" in found.text
    assert f"to {now:.3g} in iterations 16 to 20" in found.text
    assert names(changed(healthy(20), objective__kl=lambda i: 1.2**i / 20)) == [], "still small"
    assert names(changed(healthy(20), objective__kl=lambda i: 0.5 * i)) == [], "steady"


def test_an_entropy_that_collapses_is_an_error():
    rows = changed(healthy(30), objective__entropy=lambda i: 2.5 * math.exp(-i / 15))
    found = the_one(rows, "entropy_collapse")
    assert found.severity == "error"
    assert "in iterations 1 to 5" in found.text and "in iterations 26 to 30" in found.text
    assert "model.ppo.ent_coef" in found.text
    assert names(rows[:9]) == [], "windows overlap"
    halved = changed(healthy(30), objective__entropy=lambda i: 2.5 if i < 15 else 1.25)
    assert names(halved) == []
    assert names(halved, HealthLimits(entropy_share=0.6)) == ["entropy_collapse"]


def test_a_policy_that_is_clipped_much_is_told():
    found = the_one(changed(healthy(10), policy__clipfrac=0.45), "clipping")
    assert "0.45 (median over iterations 6 to 10; limit 0.3)" in found.text
    assert "model.ppo.clip_range" in found.text and "model.ppo.num_ppo_epochs" in found.text
    assert names(changed(healthy(10), policy__clipfrac=lambda i: 0.9 * (i > 8))) == [], "2 of 5"
    assert names(changed(healthy(10), policy__clipfrac=0.29)) == []


def test_steps_that_are_too_large_are_told():
    found = the_one(changed(healthy(10), policy__approxkl=0.3), "large_step")
    assert "policy/approxkl was 0.3 " in found.text and "init_args.lr" in found.text
    assert names(changed(healthy(10), policy__approxkl=lambda i: 5.0 * (i == 10))) == [], "a spike"
    assert names(changed(healthy(10), policy__approxkl=0.09)) == []


def test_steps_ten_times_too_large_are_an_error_after_two_iterations():
    found = the_one(changed(healthy(2), policy__approxkl=1.2), "large_step")
    assert found.severity == "error" and "1.2 nats" in found.text
    assert names(changed(healthy(1), policy__approxkl=1.2)) == [], "an accident"


def test_a_critic_that_stays_blind_is_told():
    rows = changed(healthy(40), value__explained_variance=lambda i: -0.1 if i % 15 else 0.05)
    found = the_one(rows, "blind_critic")
    assert "14 times in iterations 26 to 40" in found.text and "model.ppo.vf_coef" in found.text
    assert names(rows[:14]) == [], "too soon"
    seeing = changed(healthy(40), value__explained_variance=lambda i: -0.1 if i % 5 else 0.05)
    assert names(seeing) == [], "3 of 15"


def test_responses_that_never_stop_are_told():
    found = the_one(changed(healthy(4), rollout__eos_rate=0.0), "no_stop")
    assert "0.0% over iterations 1 to 4" in found.text
    assert "model.ppo.missing_eos_penalty" in found.text
    assert "model.generation.max_new_tokens" in found.text
    assert names(changed(healthy(40), rollout__eos_rate=0.05)) == [], "so from the start"


def test_a_policy_that_unlearns_to_stop_is_told():
    rows = changed(healthy(30), rollout__eos_rate=lambda i: max(0.15, 0.8 - 0.03 * i))
    found = the_one(rows, "no_stop")
    assert "fell from 71% of the responses in iterations 1 to 5" in found.text
    assert "to 15% in iterations 26 to 30" in found.text
    # From 30 % to 13 % on average, but within the noise of this run.
    noisy = [0.6, 0.0, 0.6, 0.3, 0.0, 0.3, 0.0, 0.3, 0.0, 0.05]
    assert names(changed(healthy(10), rollout__eos_rate=lambda i: noisy[i - 1])) == []


@pytest.mark.parametrize(("factor", "word"), [(2.0, "grow"), (0.5, "shrink")])
def test_responses_that_drift_in_length_are_told(factor, word):
    rows = changed(healthy(30), rollout__response_length=lambda i: 40 * factor ** (i / 20))
    found = the_one(rows, "length_drift")
    assert f"responses {word}" in found.text and "model.ppo.missing_eos_penalty" in found.text
    first = sum(40 * factor ** (i / 20) for i in range(1, 6)) / 5
    assert f"from {first:.3g} tokens in iterations 1 to 5" in found.text
    slight = changed(healthy(30), rollout__response_length=lambda i: 40 * factor ** (i / 60))
    assert names(slight) == []
    # As large a change, but within noise.
    noisy = [5, 100, 5, 100, 5, 100, 100, 5, 100, 90]
    assert names(changed(healthy(10), rollout__response_length=lambda i: noisy[i - 1])) == []


def test_responses_that_repeat_themselves_are_told():
    rows = changed(healthy(30), rollout__repetition=lambda i: 0.05 + 0.01 * i)
    found = the_one(rows, "repetition")
    assert "from 8% in iterations 1 to 5 to 33% in iterations 26 to 30" in found.text
    assert names(changed(healthy(30), rollout__repetition=0.6)) == [], "so from the start"
    assert names(changed(healthy(30), rollout__repetition=lambda i: 0.05 + 0.003 * i)) == []


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_judge_that_falls_while_the_reward_rises_is_an_error(noise):
    draw = random.Random(3)
    rows = changed(
        healthy(60),
        objective__scores=lambda i: 0.05 * i + draw.gauss(0, noise),
        judge__held_out=lambda i: (
            (0.04 * min(i, 25) - 0.04 * max(0, i - 25)) + draw.gauss(0, noise)
        ),
        judge__other=lambda i: 0.01 * i,
    )
    found = the_one(rows, "over_optimisation")
    assert found.severity == "error"
    # Quarters of 60 iterations; the judge's best is the second.
    assert "judge/held_out fell from" in found.text and "in iterations 16 to 30" in found.text
    assert "in iterations 46 to 60, while objective/scores rose" in found.text
    assert "judge/other" not in found.text and "model.ppo.kl_target" in found.text
    assert names(rows[:25]) == [], "both rise"


def test_a_judge_that_falls_with_the_reward_or_does_not_rise_with_it_is_another_matter():
    both = changed(healthy(60), objective__scores=lambda i: -i, judge__held_out=lambda i: -i)
    assert names(both) == []
    flat = changed(healthy(60), objective__scores=lambda i: i, judge__held_out=0.5)
    assert names(flat) == []


def test_scores_that_are_all_the_same_are_told():
    rows = changed(healthy(9), objective__scores_std=0.0, objective__scores=0.0)
    found = the_one(rows, "no_signal")
    assert "iterations 5 to 9" in found.text and "model.ppo.rollout_batch_size" in found.text
    assert names(rows[:4]) == [], "a rare success may take a while"
    assert names(changed(rows, objective__scores_std=lambda i: 0.2 * (i == 6))) == []
    large = changed(rows, objective__scores_std=1e-4, objective__scores=1e4)
    assert names(large) == ["no_signal"], "rounding"
    assert names(changed(rows, objective__scores_std=1e-4)) == [], "small, but a signal"


def test_errors_come_before_warnings():
    rows = changed(
        healthy(30), policy__clipfrac=0.5, rollout__repetition=lambda i: i / 30, objective__kl=90.0
    )
    assert names(rows) == ["kl_growth", "clipping", "repetition"]
    rows = changed(healthy(30), policy__first_ratio_error=0.01, objective__kl=90.0)
    assert names(rows) == ["kl_growth", "off_policy_start"]


# ----- what it stands on --------------------------------------------------------------------------


def test_cures_name_settings_that_there_are():
    broken = {
        "policy/first_ratio_error": 0.2,
        "objective/kl": -1.0,
        "objective/scores_std": 0.0,
        "policy/clipfrac": 0.9,
        "policy/approxkl": 0.9,
        "value/explained_variance": -1.0,
        "rollout/eos_rate": 0.0,
        "loss/policy": math.nan,
    }
    drift = {
        "objective/entropy": lambda i: 1 / i,
        "rollout/response_length": lambda i: 100 / i,
        "rollout/repetition": lambda i: i / 40,
        "judge/held_out": lambda i: -i,
        "objective/scores": lambda i: i,
    }
    one = [{"iteration": i} | broken | {k: f(i) for k, f in drift.items()} for i in range(1, 41)]
    two = changed(one, objective__kl=80.0, rollout__response_length=lambda i: i)
    found = diagnose(one) + diagnose(two)
    assert len({diagnosis.name for diagnosis in found}) == 13
    text = " ".join(diagnosis.text for diagnosis in found)
    told = set(re.findall(r"model\.ppo\.(\w+)", text))
    assert len(told) > 12
    assert told <= {field.name for field in fields(PPOConfig)}
