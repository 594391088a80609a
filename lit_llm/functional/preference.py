"""Losses of preferences: one answer is better than another one.

Legend: N answers, P pairs of them, H heads of a reward model.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PreferenceKind = Literal["sigmoid", "ipo"]


class PreferenceLoss(NamedTuple):
    """What a reward model's scores say about the pairs.

    Attributes:
        loss: 0-dim, differentiable: the weighted sum over the pairs.
        correct: (P,) detached: 1 where the better answer has the higher score, 0.5 at a tie, else
            0.
    """

    loss: Tensor
    correct: Tensor


class DPOLoss(NamedTuple):
    """What a policy's log-probabilities say about the pairs.

    Attributes:
        loss: 0-dim, differentiable: the weighted sum over the pairs.
        rewards: (N,) detached: the reward that the policy implies for each answer.
        correct: (P,) detached: 1 where the better answer has the higher reward, 0.5 at a tie, else
            0.
        margins: (P,) detached: reward of the better answer less that of the worse one.
    """

    loss: Tensor
    rewards: Tensor
    correct: Tensor
    margins: Tensor


def bradley_terry_loss(
    scores: Tensor,
    pairs: Tensor,
    *,
    weights: Tensor | None = None,
    margins: Tensor | None = None,
    label_smoothing: float = 0.0,
    centring: float = 0.0,
) -> PreferenceLoss:
    """Negative log-likelihood of the preferences under the model of Bradley and Terry, in nats.

    ``-(1 - e) logsigmoid(d - m) - e logsigmoid(-(d - m)) + c (better + worse)^2`` for every pair,
    where d is the score of the better answer less that of the worse one. With a weight of one over
    its number of pairs, a prompt of K ranked answers counts as in InstructGPT
    (https://arxiv.org/abs/2203.02155, equation 1). Margins: Llama 2, https://arxiv.org/abs/2307.09288.
    Centring keeps the scores near 0, where the loss alone leaves their mean open: Eisenstein et al.
    2023, https://arxiv.org/abs/2312.09244. Several heads are so many reward models: the loss is
    their mean, and the mean of their scores decides what is correct. Computed in float32 (float64
    for float64 scores).

    Args:
        scores: (N,), or (N, H) of several heads.
        pairs: (P, 2) long, rows of the better and of the worse answer.
        weights: (P,) factor of each pair in the loss; 1 by default.
        margins: (P,) m, how much better the better answer is to be; 0 by default.
        label_smoothing: e, how often a preference is taken to be the wrong way round.
        centring: c, strength of the pull towards 0.

    Returns:
        The summed loss, and which pairs are correct (margins do not matter to that).

    Raises:
        ValueError: Shapes that do not fit together, or a smoothing outside [0, 0.5).
    """
    if scores.dim() not in (1, 2):
        raise ValueError(f"scores must be (N,) or (N, H), not {tuple(scores.shape)}")
    _check(pairs, label_smoothing, weights=weights, margins=margins)
    scores = _wide(scores if scores.dim() == 2 else scores[:, None])
    better, worse = scores[pairs[:, 0]], scores[pairs[:, 1]]
    difference = better - worse
    target = difference if margins is None else difference - margins[:, None]
    losses = _log_loss(target, label_smoothing)
    if centring:
        losses = losses + centring * (better + worse).square()
    return PreferenceLoss(_sum(losses.mean(1), weights), _correct(difference.detach().mean(1)))


def dpo_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    pairs: Tensor,
    *,
    beta: float,
    kind: PreferenceKind = "sigmoid",
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    lengths: Tensor | None = None,
) -> DPOLoss:
    """Loss of a policy whose own log-probabilities are its reward model.

    The reward of an answer is ``beta (log policy - log reference)``. ``sigmoid`` is DPO
    (https://arxiv.org/abs/2305.18290), with smoothing the conservative DPO of its authors; ``ipo``
    (https://arxiv.org/abs/2310.12036) draws the difference of the log-ratios to 1 / (2 beta) by a
    squared error. Computed in float32 (float64 for float64 log-probabilities).

    Args:
        logprobs: (N,) log-probability of each whole answer under the policy, in nats.
        ref_logprobs: (N,) the same under the reference, without gradient.
        pairs: (P, 2) long, rows of the better and of the worse answer.
        beta: How strongly the policy is held to the reference.
        kind: ``sigmoid`` or ``ipo``.
        label_smoothing: How often a preference is taken to be the wrong way round; ``sigmoid``
            only.
        weights: (P,) factor of each pair in the loss; 1 by default.
        lengths: (N,) tokens of each answer, to take means over tokens in place of sums, as the
            authors of IPO do; ``ipo`` only. The rewards are means over tokens too then.

    Returns:
        The summed loss; rewards, and what follows from them, for people.

    Raises:
        ValueError: Shapes that do not fit together, a kind that does not exist, a beta that is not
            positive, a smoothing outside [0, 0.5), or an option of the other kind.
    """
    if kind not in ("sigmoid", "ipo"):
        raise ValueError(f"kind must be 'sigmoid' or 'ipo', not {kind!r}")
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    if logprobs.dim() != 1 or ref_logprobs.shape != logprobs.shape:
        raise ValueError(
            f"logprobs and ref_logprobs must be (N,), not {tuple(logprobs.shape)} and "
            f"{tuple(ref_logprobs.shape)}"
        )
    if lengths is not None and (kind != "ipo" or lengths.shape != logprobs.shape):
        raise ValueError("lengths go with kind 'ipo', one for each of logprobs")
    if label_smoothing and kind == "ipo":
        raise ValueError("label_smoothing goes with kind 'sigmoid'")
    _check(pairs, label_smoothing, weights=weights)
    log_ratios = _wide(logprobs) - _wide(ref_logprobs)
    if lengths is not None:
        log_ratios = log_ratios / lengths.clamp(min=1)
    difference = log_ratios[pairs[:, 0]] - log_ratios[pairs[:, 1]]
    if kind == "sigmoid":
        losses = _log_loss(beta * difference, label_smoothing)
    else:
        losses = (difference - 1 / (2 * beta)).square()
    margins = beta * difference.detach()
    return DPOLoss(_sum(losses, weights), beta * log_ratios.detach(), _correct(margins), margins)


def _log_loss(difference: Tensor, label_smoothing: float) -> Tensor:
    """Cross entropy of "the first is better"; log(1 + exp(-d)) itself would overflow."""
    losses = -(1 - label_smoothing) * F.logsigmoid(difference)
    if label_smoothing:
        losses = losses - label_smoothing * F.logsigmoid(-difference)
    return losses


def _sum(losses: Tensor, weights: Tensor | None) -> Tensor:
    return (losses if weights is None else losses * weights).sum()


def _correct(difference: Tensor) -> Tensor:
    return (difference > 0).float() + 0.5 * (difference == 0).float()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check(pairs: Tensor, label_smoothing: float, **of_pairs: Tensor | None) -> None:
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must be (P, 2), not {tuple(pairs.shape)}")
    for name, value in of_pairs.items():
        if value is not None and value.shape != pairs.shape[:1]:
            raise ValueError(f"{name} must be ({len(pairs)},), not {tuple(value.shape)}")
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be at least 0 and below 0.5, not {label_smoothing}")
