"""PPO learns what is rewarded, as far as the price of a nat lets it, and nothing else."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from lit_llm.models.adapters import AdapterConfig
from tests.modules.ppo_world import fit, module

SIZES = {"rollout_batch_size": 32, "minibatch_size": 16, "num_ppo_epochs": 2, "kl_coef": 0.0}
CHANCE = 1 / 24
KINDS: dict[str, dict[str, Any]] = {
    "gae": {"vf_coef": 0.5},
    "shared": {"vf_coef": 0.5, "value_model": "shared"},
    "grpo": {"advantage": "grpo", "group_size": 8},
    "rloo": {"advantage": "rloo", "group_size": 8, "normalise_scores": "running"},
}


def learned(
    ppo: dict[str, Any],
    iterations: int = 24,
    *,
    rate: float = 1e-2,
    reward: str = "share_of_wanted",
    adapter: AdapterConfig | None = None,
) -> list[dict[str, float]]:
    """What the iterations of a run knew. The score of a response is the share of a token in it."""
    made = module(
        SIZES | ppo,
        reward=reward,
        vocabulary=24,
        max_new_tokens=8,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=rate, eps=1e-5, weight_decay=0.0),
        adapter=adapter,
    )
    return fit(made, iterations).metrics


def last(metrics: list[dict[str, float]], name: str, count: int = 4) -> float:
    return statistics.fmean(row[name] for row in metrics[-count:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_rewarded_token_takes_over(kind: str) -> None:
    metrics = learned(KINDS[kind])
    assert metrics[0]["objective/scores"] < 3 * CHANCE
    assert last(metrics, "objective/scores") > 0.5
    assert last(metrics, "objective/entropy") < 0.8 * metrics[0]["objective/entropy"]
    if "advantage" not in KINDS[kind]:  # the critic has learned what to expect
        # One that still promised nothing would miss by 0.5 x 0.5^2 or more.
        assert last(metrics, "loss/value") < 0.06
    assert max(row["policy/first_ratio_error"] for row in metrics) == 0


def test_adapters_learn_it_too() -> None:
    adapter = AdapterConfig(r=8, modules_to_save=["lm_head"])
    metrics = learned(KINDS["gae"], adapter=adapter)
    assert metrics[0]["objective/scores"] < 3 * CHANCE
    assert last(metrics, "objective/scores") > 0.5


@pytest.mark.parametrize(
    "control", [{"rate": 0.0}, {"reward": "shuffled_share"}], ids=["rate 0", "reward shuffled"]
)
def test_nothing_is_learned_of_nothing(control: dict[str, Any]) -> None:
    """What the tests above see comes from the updates, and from whose score is whose."""
    metrics = learned(KINDS["rloo"], **control)
    assert last(metrics, "objective/scores") < 0.25
    if "rate" in control:
        assert {row["objective/kl"] for row in metrics} == {0.0}


def test_a_high_price_holds_the_policy_to_its_reference() -> None:
    free, held = (
        learned(KINDS["gae"] | {"kl_coef": coefficient}, 16) for coefficient in (0.0, 2.0)
    )
    assert last(free, "objective/kl") > 2
    assert abs(last(held, "objective/kl")) < 0.5
    assert max(abs(row["objective/kl"]) for row in held) < 1
    assert last(held, "objective/scores") < 0.5 * last(free, "objective/scores")


def test_a_controller_holds_its_target() -> None:
    """From a price that is far too low, to the KL that was asked for."""
    target = 2.0
    settings = KINDS["gae"] | {"kl_coef": 0.01}
    held = learned(settings | {"kl_target": target, "kl_horizon": 32}, 32)
    without = learned(settings, 16)
    assert last(without, "objective/kl") > 3 * target
    assert target / 2 < last(held, "objective/kl", 8) < 2 * target
    assert held[-1]["objective/kl_coef"] > 3 * 0.01
    assert {row["objective/kl_coef"] for row in without} == {0.01}
