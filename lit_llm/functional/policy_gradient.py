"""Formulas of policy gradients.

Legend: B rows (responses), R response.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_llm.functional.linear_head import accumulation_dtype
from lit_llm.functional.masking import masked_sum

KLKind = Literal["k1", "k2", "k3"]

# A token that the policy has sampled and the reference finds e^20 times as likely: exp() of more
# would soon be infinite.
_LARGEST_LOG_RATIO = 20.0

# Of the adaptive coefficient: how far off the target one rollout may count as.
_LARGEST_ERROR = 0.2


class PolicyLoss(NamedTuple):
    """Sums over the sampled tokens; divide by a token count of your own choice.

    Attributes:
        loss: 0-dim, differentiable: the clipped surrogate loss.
        clipped: 0-dim, detached: how many tokens the clip keeps from being pushed further.
        approxkl: 0-dim, detached: k3 estimates of KL(old policy || new policy), in nats.
        ratio: 0-dim, detached: new over old probability.
        ratio_max: 0-dim, detached: the largest ratio; not a sum. 0 without tokens.
        ratio_error: 0-dim, detached: the largest distance of a ratio from 1; not a sum. 0 on the
            first minibatch after a rollout, up to rounding.
    """

    loss: Tensor
    clipped: Tensor
    approxkl: Tensor
    ratio: Tensor
    ratio_max: Tensor
    ratio_error: Tensor


class ValueLoss(NamedTuple):
    """Sums over the sampled tokens; divide by a token count of your own choice.

    Attributes:
        loss: 0-dim, differentiable: half the squared error.
        clipped: 0-dim, detached: for how many tokens the clipped error is the larger one.
    """

    loss: Tensor
    clipped: Tensor


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLKind = "k1") -> Tensor:
    """Estimates KL(policy || reference) from tokens that the policy has sampled.

    J. Schulman, "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html, with
    r = log reference - log policy: ``k1 = -r`` (unbiased, also below 0), ``k2 = r^2 / 2`` (biased,
    little variance), ``k3 = exp(r) - 1 - r`` (unbiased, never below 0). The mean over samples is
    the estimate. As losses they have other gradients than the KL itself: a penalty in the reward is
    k1. Mask before, not after: padding may hold infinite log-probabilities.

    Args:
        logprobs: Log-probabilities under the policy of the tokens it sampled, in nats, any shape.
        ref_logprobs: Those of the same tokens under the reference.
        kind: ``k1``, ``k2`` or ``k3``.

    Returns:
        One estimate a token, float32 (float64 for float64 log-probabilities).

    Raises:
        ValueError: Shapes that differ, or a kind that does not exist.
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(
            f"logprobs and ref_logprobs must have one shape, not {tuple(logprobs.shape)} and "
            f"{tuple(ref_logprobs.shape)}"
        )
    wide = accumulation_dtype(logprobs.dtype)
    log_ratio = ref_logprobs.to(wide) - logprobs.to(wide)
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind != "k3":
        raise ValueError(f"kind must be 'k1', 'k2' or 'k3', not {kind!r}")
    log_ratio = log_ratio.clamp(max=_LARGEST_LOG_RATIO)
    # expm1, since exp(r) - 1 - r has no correct digit where the two policies almost agree.
    return torch.expm1(log_ratio) - log_ratio


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
) -> PolicyLoss:
    """The clipped surrogate loss of PPO, https://arxiv.org/abs/1707.06347, equation 7.

    ``max(-A r, -A clip(r, 1 - c, 1 + c))`` for every token, where r is the new over the old
    probability. Tokens that have become more than e^20 times as likely count as e^20, without a
    gradient: the loss stays finite. Computed in float32 (float64 for float64 log-probabilities).

    Args:
        logprobs: (B, R) log-probabilities of the sampled tokens under the policy, in nats.
        old_logprobs: (B, R) those of the policy that sampled them.
        advantages: (B, R) A.
        mask: (B, R), 1 for sampled tokens; nothing outside it shows, not even NaN.
        clip_range: c.

    Returns:
        The summed loss, and what tells how far the policy has moved.

    Raises:
        ValueError: Shapes that differ, or a range that is not positive.
    """
    _check(mask, clip_range, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    mask = mask.bool()
    wide = accumulation_dtype(logprobs.dtype)
    # Masked before exp: an infinite ratio times 0 is NaN, and so is its gradient.
    log_ratio = torch.where(mask, logprobs.to(wide) - old_logprobs.detach().to(wide), 0.0)
    ratio = log_ratio.clamp(max=_LARGEST_LOG_RATIO).exp()
    advantages = torch.where(mask, advantages.detach().to(wide), 0.0)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(plain, clipped).sum()

    log_ratio, ratio = log_ratio.detach(), ratio.detach()
    # Tokens of the old policy, so k3 of KL(old || new).
    approxkl = kl_estimate(torch.zeros_like(log_ratio), log_ratio, "k3")
    return PolicyLoss(
        loss=loss,
        clipped=(clipped > plain).sum().to(wide),
        approxkl=approxkl.sum(),
        ratio=masked_sum(ratio, mask),
        ratio_max=_largest(torch.where(mask, ratio, 0.0)),
        ratio_error=_largest((ratio - 1).abs()),
    )


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip_range: float | None,
) -> ValueLoss:
    """Half the squared error of a critic, which may move away from its old values by so much only.

    ``max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2) / 2`` for every token: a value that has
    moved further than c towards its return is left alone. From the code of PPO's authors,
    https://github.com/openai/baselines; without a range the plain squared error. Computed in
    float32 (float64 for float64 values).

    Args:
        values: (B, R) v.
        old_values: (B, R) v_old, the critic's values when the responses were sampled.
        returns: (B, R) R, advantages plus old values before whitening.
        mask: (B, R), 1 for sampled tokens; nothing outside it shows, not even NaN.
        clip_range: c; ``None`` for no clipping.

    Returns:
        The summed loss, and how often the clip binds.

    Raises:
        ValueError: Shapes that differ, or a range that is not positive.
    """
    _check(mask, clip_range, values=values, old_values=old_values, returns=returns)
    mask = mask.bool()
    wide = accumulation_dtype(values.dtype)
    values, old_values, returns = (
        torch.where(mask, tensor.to(wide), 0.0)
        for tensor in (values, old_values.detach(), returns.detach())
    )
    losses = 0.5 * (values - returns).square()
    if clip_range is None:
        return ValueLoss(losses.sum(), losses.new_zeros(()))
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    clipped = 0.5 * (near - returns).square()
    binds = (clipped > losses).sum().to(wide)
    return ValueLoss(torch.maximum(losses, clipped).sum(), binds)


def adapted_kl_coef(
    kl_coef: float, kl: float, *, target: float, horizon: float, num_samples: int
) -> float:
    """The next coefficient of the KL penalty: more where the policy is further away than wanted.

    Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2: the coefficient is
    multiplied by ``1 + e num_samples / horizon``, with e the relative error of the KL, at most 0.2
    either way. A rollout of more samples than the horizon counts as the horizon, so the
    coefficient changes by no more than a fifth and never turns negative. A KL that is NaN leaves it
    as it is.

    Args:
        kl_coef: The coefficient so far.
        kl: KL of the policy from the reference, in nats: summed over the tokens of a response,
            mean over the responses of a rollout.
        target: The KL to hold, in nats.
        horizon: Samples over which the full error counts once.
        num_samples: Responses of the rollout, over all ranks.

    Returns:
        The new coefficient.

    Raises:
        ValueError: A target or a horizon that is not positive.
    """
    if not target > 0 or not horizon > 0:
        raise ValueError(f"target and horizon must be positive, not {target} and {horizon}")
    if math.isnan(kl):
        return kl_coef
    error = min(max(kl / target - 1, -_LARGEST_ERROR), _LARGEST_ERROR)
    return kl_coef * (1 + error * min(num_samples / horizon, 1.0))


def _largest(values: Tensor) -> Tensor:
    return values.max() if values.numel() else values.new_zeros(())


def _check(mask: Tensor, clip_range: float | None, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(
                f"{name} and mask must have one shape, not {tuple(tensor.shape)} and "
                f"{tuple(mask.shape)}"
            )
    if clip_range is not None and not clip_range > 0:
        raise ValueError(f"clip_range must be positive, not {clip_range}")
