"""Settings of PPO: what they mean, and that each mistake is one sentence."""

from __future__ import annotations

import math

import pytest

from lit_llm.errors import UserError
from lit_llm.modules.ppo_config import PPOConfig

GRPO = {"advantage": "grpo", "group_size": 4}

REFUSED = [
    ({"rollout_batch_size": 0}, "rollout_batch_size must be at least 1, got 0"),
    ({"minibatch_size": -4}, "minibatch_size must be at least 1, got -4"),
    ({"num_ppo_epochs": 0}, "num_ppo_epochs must be at least 1"),
    ({"group_size": 0}, "group_size must be at least 1"),
    ({"micro_batch_size": 0}, "micro_batch_size must be at least 1"),
    ({"micro_batch_size": -1}, "micro_batch_size must be at least 1"),
    ({"minibatch_size": 48}, "rollout_batch_size 64 must be a multiple of minibatch_size 48"),
    ({"group_size": 3}, "rollout_batch_size 64 must be a multiple of group_size 3"),
    ({"advantage": "grpo"}, "advantage grpo compares the responses to one prompt"),
    ({"advantage": "rloo", "group_size": 1}, "give model.ppo.group_size, at least 2"),
    ({"clip_range": 0.0}, "clip_range must be above 0, got 0.0"),
    ({"value_clip_range": -0.2}, "value_clip_range must be above 0"),
    ({"kl_horizon": 0}, "kl_horizon must be above 0"),
    ({"kl_target": 0.0}, "kl_target must be above 0"),
    ({"score_clip": 0.0}, "score_clip must be above 0"),
    ({"target_approxkl": -1.0}, "target_approxkl must be above 0"),
    ({"value_lr_factor": 0.0}, "value_lr_factor must be above 0"),
    ({"kl_coef": -0.1}, "kl_coef must not be negative, got -0.1"),
    ({"kl_coef": math.nan}, "kl_coef must not be negative, got nan"),
    ({"vf_coef": -1.0}, "vf_coef must not be negative"),
    ({"ent_coef": -1.0}, "ent_coef must not be negative"),
    ({"ptx_coef": -1.0}, "ptx_coef must not be negative"),
    ({"missing_eos_penalty": -1.0}, "missing_eos_penalty must not be negative"),
    ({"gamma": 1.01}, "gamma must lie in [0, 1], got 1.01"),
    ({"gae_lambda": -0.1}, "gae_lambda must lie in [0, 1]"),
    ({"gae_lambda": math.nan}, "gae_lambda must lie in [0, 1]"),
    (
        {"missing_eos_penalty": 1.0, "missing_eos_score": -1.0},
        "give missing_eos_penalty or missing_eos_score, not both",
    ),
    ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_target moves kl_coef by factors"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_sentence(settings, message: str) -> None:
    with pytest.raises(UserError) as caught:
        PPOConfig(**settings)
    told = str(caught.value)
    assert message in told
    assert told.startswith("model.ppo: ")
    assert "\n" not in told
    assert not told.endswith(".") and ". " not in told


def test_the_largest_and_smallest_that_make_sense() -> None:
    PPOConfig(gamma=0.0, gae_lambda=1.0, kl_coef=0.0, vf_coef=0.0, value_clip_range=None)
    PPOConfig(rollout_batch_size=1, minibatch_size=1, micro_batch_size=1, num_ppo_epochs=1)
    PPOConfig(missing_eos_score=-1.0)
    PPOConfig(advantage="rloo", group_size=2)


def test_a_critic_and_whitening_go_with_gae() -> None:
    for settings, critic, whitens in [
        ({}, True, True),
        ({"whiten_advantages": False}, True, False),
        (GRPO, False, False),
        (GRPO | {"whiten_advantages": True}, False, True),
        (GRPO | {"advantage": "rloo"}, False, False),
    ]:
        config = PPOConfig(**settings)
        assert (config.has_critic, config.whitens_advantages) == (critic, whitens), settings


def test_devices_share_an_iteration_evenly() -> None:
    config = PPOConfig(rollout_batch_size=64, minibatch_size=16, group_size=4, advantage="rloo")
    assert tuple(config.batches(1)) == (16, 16, 1)
    assert tuple(config.batches(4)) == (16, 4, 1)
    small = PPOConfig(rollout_batch_size=64, minibatch_size=16, micro_batch_size=2)
    assert tuple(small.batches(1)) == (64, 2, 8)
    assert tuple(small.batches(4)) == (64, 2, 2)
    for settings, devices, message in [
        ({"micro_batch_size": 3}, 1, "must be a multiple of micro_batch_size x devices (3 x 1)"),
        ({"micro_batch_size": 8}, 4, "must be a multiple of micro_batch_size x devices (8 x 4)"),
        ({}, 3, "must be a multiple of micro_batch_size x devices (5 x 3)"),
        ({}, 32, "must be a multiple of micro_batch_size x devices (1 x 32)"),
        (GRPO | {"rollout_batch_size": 16}, 8, "the 4 prompts of an iteration"),
    ]:
        with pytest.raises(UserError) as caught:
            PPOConfig(**settings).batches(devices)
        assert message in str(caught.value), settings
        assert "\n" not in str(caught.value)
