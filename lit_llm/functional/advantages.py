"""From scores of responses to the advantage of every token. Nothing here carries a gradient.

Everything is float32 (float64 where float64 comes in), and 0 outside the mask, whatever the tensors
hold there.

Legend: B rows (responses), R response.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lit_llm.functional.linear_head import accumulation_dtype

GroupKind = Literal["grpo", "rloo"]

# Beside a standard deviation, so that equal values are divided by something.
_WHITEN_EPSILON = 1e-8
_GROUP_EPSILON = 1e-4


@torch.no_grad()
def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards of tokens: the penalty on each, and the score on the last one of the response.

    InstructGPT, https://arxiv.org/abs/2203.02155, equation 2, token by token.

    Args:
        scores: (B,) what each response earned.
        kl: (B, R) estimate of the KL from the reference at each token, in nats.
        mask: (B, R), 1 for sampled tokens, the one that ends the response included.
        kl_coef: What a nat costs.

    Returns:
        (B, R) rewards; a row without tokens has none, not even its score.

    Raises:
        ValueError: Shapes that do not fit together.
    """
    _check_mask(mask, kl=kl)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores must be ({len(mask)},), not {tuple(scores.shape)}")
    kl, mask = _wide(kl), mask.bool()
    still_to_come = mask.flip(1).cumsum(1).flip(1)  # this token included
    is_last = mask & (still_to_come == 1)
    penalty = torch.where(mask, -kl_coef * kl, 0.0)
    return penalty + torch.where(is_last, scores[:, None].to(kl.dtype), 0.0)


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, https://arxiv.org/abs/1506.02438, equation 16.

    Nothing comes after the last token of a response: the next value is 0 there, at the row's own
    end and not at the tensor's. So a response that was cut off at the longest length ends like one
    that stopped by itself, with its score as all there is. Tokens outside the mask are stepped
    over, wherever they are.

    Args:
        rewards: (B, R) reward of each token.
        values: (B, R) the critic's value of the state before each token.
        mask: (B, R), 1 for sampled tokens.
        gamma: Discount of a step; 1 leaves a response's tokens equally responsible.
        gae_lambda: 1 trusts the rewards alone, 0 the critic's next value alone.

    Returns:
        Advantages (B, R), not whitened, and returns (B, R), which are advantages plus values.

    Raises:
        ValueError: Shapes that differ.
    """
    _check_mask(mask, rewards=rewards, values=values)
    rewards, values, mask = _wide(rewards), _wide(values), mask.bool()
    advantages = torch.zeros_like(values)
    advantage = next_value = values.new_zeros(len(values))
    for step in reversed(range(values.shape[1])):
        real, value = mask[:, step], values[:, step]
        delta = rewards[:, step] + gamma * next_value - value
        advantage = torch.where(real, delta + gamma * gae_lambda * advantage, advantage)
        next_value = torch.where(real, value, next_value)
        advantages[:, step] = torch.where(real, advantage, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


@torch.no_grad()
def group_advantages(rewards: Tensor, group_size: int, kind: GroupKind) -> Tensor:
    """Advantages of responses over the others to the same prompt, in place of a critic.

    ``rloo`` takes away the mean of the other rewards of the group
    (https://arxiv.org/abs/2402.14740). ``grpo`` takes away the mean of the group and divides by
    its standard deviation (https://arxiv.org/abs/2402.03300, section 4.1.2), which has G - 1 below
    it and 1e-4 beside it, as in TRL. A group of equal rewards has advantages of 0.

    Args:
        rewards: (B,) what each response earned; the rows of a group follow each other.
        group_size: G, responses to a prompt.
        kind: ``grpo`` or ``rloo``.

    Returns:
        (B,) advantages, one for all tokens of a response.

    Raises:
        ValueError: Rows that make no whole groups, a group of one, or a kind that does not exist.
    """
    if kind not in ("grpo", "rloo"):
        raise ValueError(f"kind must be 'grpo' or 'rloo', not {kind!r}")
    if group_size < 2:
        raise ValueError(f"group_size must be at least 2, not {group_size}")
    if rewards.dim() != 1 or len(rewards) % group_size:
        raise ValueError(
            f"rewards must be (B,) with B a multiple of {group_size}, not {tuple(rewards.shape)}"
        )
    # In float64 the mean of equal rewards is that reward itself.
    groups = rewards.double().view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if kind == "rloo":  # r - (sum - r) / (G - 1) = (r - mean) G / (G - 1)
        result = centred * (group_size / (group_size - 1))
    else:
        result = centred / (groups.std(1, keepdim=True) + _GROUP_EPSILON)
    return result.flatten().to(accumulation_dtype(rewards.dtype))


@torch.no_grad()
def whiten(
    values: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    all_sum: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Values brought to mean 0 and standard deviation 1 under the mask, over all rows and tokens.

    The variance is the unbiased one. Values that are all the same are divided by next to nothing,
    and come out as 0; so does a single one.

    Args:
        values: (B, R).
        mask: (B, R), 1 for values that count.
        shift_mean: False puts the mean back after the division. Rewards keep their sign so.
        all_sum: Sums a small float64 tensor over all ranks, to whiten over all of them; called
            twice, on ranks without a value too. By default this rank is all there is.

    Returns:
        (B, R) whitened values.

    Raises:
        ValueError: Shapes that differ.
    """
    _check_mask(mask, values=values)
    mask = mask.bool()
    mean, variance = _moments(values[mask].double()[None], all_sum)
    result = (values.double() - mean) / (variance.sqrt() + _WHITEN_EPSILON)
    if not shift_mean:
        result = result + mean
    return torch.where(mask, result, 0.0).to(accumulation_dtype(values.dtype))


@torch.no_grad()
def explained_variance(
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
    all_sum: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """How much of the returns a critic foresaw: ``1 - Var(returns - values) / Var(returns)``.

    1 is all of it; 0 no more than a constant would; below 0 the critic does harm.

    Args:
        values: (B, R) the critic's values when the responses were sampled.
        returns: (B, R) what came of it.
        mask: (B, R), 1 for sampled tokens.
        all_sum: Sums over all ranks, as for :func:`whiten`.

    Returns:
        0-dim; 0 where the returns do not vary.

    Raises:
        ValueError: Shapes that differ.
    """
    _check_mask(mask, values=values, returns=returns)
    mask = mask.bool()
    seen, came = values[mask].double(), returns[mask].double()
    _, (missed, total) = _moments(torch.stack([came - seen, came]), all_sum)
    share = torch.where(total > 0, 1 - missed / total, 0.0)
    return share.to(accumulation_dtype(values.dtype))


def _moments(samples: Tensor, all_sum: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance (0 of a single sample) of each row, over all ranks."""
    everywhere = all_sum or (lambda here: here)
    count = samples.new_tensor([samples.shape[1]])
    sums = everywhere(torch.cat([samples.sum(1), count]))
    count = sums[-1]
    mean = sums[:-1] / count.clamp(min=1)
    # Squares of differences from the mean of all: E[x^2] - E[x]^2 would cancel.
    squares = everywhere((samples - mean[:, None]).square().sum(1))
    return mean, squares / (count - 1).clamp(min=1)


def _check_mask(mask: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if mask.dim() != 2 or tensor.shape != mask.shape:
            raise ValueError(
                f"{name} and mask must be (B, R), not {tuple(tensor.shape)} and {tuple(mask.shape)}"
            )


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))
