"""Formulas of policy gradients."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KLKind = Literal["k1", "k2", "k3"]

# A token that the policy has sampled and the reference finds e^20 times as likely: exp() of more
# would soon be infinite.
_LARGEST_LOG_RATIO = 20.0


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
    wide = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
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
