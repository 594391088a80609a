"""The clipped losses of PPO against loops over tokens in plain Python, and numbers by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lit_llm.functional import policy_loss, value_loss

LENGTHS = (5, 1, 7, 0, 4)
B, R = len(LENGTHS), 7
MASK = (torch.arange(R) < torch.tensor(LENGTHS)[:, None]).long()
BAD = [math.nan, math.inf, -math.inf]


def _random(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(B, R, generator=generator, dtype=torch.float64)).to(dtype)


def _tokens(*tensors: Tensor) -> list[tuple[float, ...]]:
    """What the tensors hold at each token of the mask, one after the other."""
    places = [(row, t) for row in range(B) for t in range(R) if MASK[row, t]]
    return [tuple(float(tensor[place]) for tensor in tensors) for place in places]


def _old_and_new() -> tuple[Tensor, Tensor]:
    old = _random(0) - 3
    return old, old + _random(1, 0.3)


def _padded(x: Tensor, bad: float) -> Tensor:
    """Three more columns, and these and the padding hold ``bad``."""
    return torch.cat([x.masked_fill(MASK == 0, bad), x.new_full((B, 3), bad)], 1)


def test_policy_loss_is_that_of_a_loop_over_tokens() -> None:
    old, new = _old_and_new()
    advantages = _random(2)
    loss, clipped, approxkl, ratios = 0.0, 0, 0.0, []
    for p, q, a in _tokens(new, old, advantages):
        ratio = math.exp(p) / math.exp(q)
        bound = min(max(ratio, 0.8), 1.2)
        loss += max(-a * ratio, -a * bound)
        # The clip binds where the policy has already gone too far the way it is pushed.
        clipped += (a > 0 and ratio > 1.2) or (a < 0 and ratio < 0.8)
        approxkl += ratio - 1 - math.log(ratio)
        ratios.append(ratio)
    assert 0 < clipped < sum(not 0.8 < ratio < 1.2 for ratio in ratios)

    found = policy_loss(new, old, advantages, MASK, clip_range=0.2)
    assert found.loss.item() == pytest.approx(loss, rel=1e-12)
    assert found.clipped.item() == clipped
    assert found.approxkl.item() == pytest.approx(approxkl, rel=1e-12)
    assert found.ratio.item() == pytest.approx(sum(ratios), rel=1e-12)
    assert found.ratio_max.item() == pytest.approx(max(ratios), rel=1e-12)
    furthest = max(abs(ratio - 1) for ratio in ratios)
    assert found.ratio_error.item() == pytest.approx(furthest, rel=1e-12)
    for value in found:
        assert value.dim() == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "binds"),
    [
        # max(-A r, -A clip(r, 0.8, 1.2)); its slope in log p is -A r where the first is larger.
        (1.5, 2.0, -2.4, 0.0, 1),  # max(-3, -2.4): enough of a good thing
        (0.5, 2.0, -1.0, -1.0, 0),  # max(-1, -1.6): a good token made rare is brought back
        (1.5, -2.0, 3.0, 3.0, 0),  # max(3, 2.4): a bad token made likely is brought back
        (0.5, -2.0, 1.6, 0.0, 1),  # max(1, 1.6)
        (1.1, 2.0, -2.2, -2.2, 0),
        (1.5, 0.0, 0.0, 0.0, 0),
    ],
)
def test_policy_loss_by_hand(
    ratio: float, advantage: float, loss: float, slope: float, binds: int
) -> None:
    old = torch.tensor([[-1.0]], dtype=torch.float64)
    new = (old + math.log(ratio)).requires_grad_()
    advantages = torch.tensor([[advantage]], dtype=torch.float64)
    found = policy_loss(new, old, advantages, torch.ones(1, 1), clip_range=0.2)
    (grad,) = torch.autograd.grad(found.loss, new)
    assert found.loss.item() == pytest.approx(loss)
    assert grad.item() == pytest.approx(slope)
    assert found.clipped.item() == binds
    assert found.ratio_max.item() == pytest.approx(ratio)


def test_approxkl_is_kl_old_new() -> None:
    """Weighted by the policy that sampled, the mean is exact; the reverse is another number."""
    old = torch.tensor([0.7, 0.2, 0.05, 0.05], dtype=torch.float64)
    new = torch.tensor([0.05, 0.05, 0.1, 0.8], dtype=torch.float64)
    exact = (old * (old / new).log()).sum().item()
    assert abs(exact - (new * (new / old).log()).sum().item()) > 0.05
    each = [
        policy_loss(
            new[i].log().view(1, 1), old[i].log().view(1, 1), *torch.ones(2, 1, 1), clip_range=0.2
        ).approxkl.item()
        for i in range(4)
    ]
    assert sum(p * kl for p, kl in zip(old.tolist(), each, strict=True)) == pytest.approx(exact)


def test_at_ratio_1_the_gradient_is_that_of_reinforce() -> None:
    """-A grad log p, of a softmax over 11 tokens; nothing is clipped and nothing has moved."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, R, 11, generator=generator, dtype=torch.float64).requires_grad_()
    tokens = torch.randint(11, (B, R, 1), generator=generator)
    logprobs = logits.log_softmax(-1).gather(2, tokens).squeeze(2)
    advantages = _random(2)
    found = policy_loss(logprobs, logprobs, advantages, MASK, clip_range=0.2)
    (grad,) = torch.autograd.grad(found.loss, logits)
    onehot = torch.zeros_like(logits).scatter(2, tokens, 1.0)
    expected = -(advantages * MASK)[:, :, None] * (onehot - logits.softmax(-1))
    torch.testing.assert_close(grad, expected.detach())
    count = float(sum(LENGTHS))
    assert found.ratio.item() == count
    assert [x.item() for x in found[1:]] == [0.0, 0.0, count, 1.0, 0.0]


@pytest.mark.parametrize("bad", BAD)
def test_padding_changes_neither_values_nor_gradients_of_the_policy_loss(bad: float) -> None:
    old, new = _old_and_new()
    new.requires_grad_()
    advantages = _random(2)
    plain = policy_loss(new, old, advantages, MASK, clip_range=0.2)
    (expected,) = torch.autograd.grad(plain.loss, new)

    wide = _padded(new.detach(), bad).requires_grad_()
    others = [_padded(x, bad) for x in (old, advantages)]
    found = policy_loss(wide, *others, torch.cat([MASK, MASK.new_zeros(B, 3)], 1), clip_range=0.2)
    (grad,) = torch.autograd.grad(found.loss, wide)
    for one, other in zip(found, plain, strict=True):
        assert one.item() == pytest.approx(other.item(), rel=1e-12)
    torch.testing.assert_close(grad[:, :R], expected)
    assert grad[:, R:].eq(0).all() and expected[MASK == 0].eq(0).all()


def test_only_the_new_log_probabilities_learn() -> None:
    new, old, advantages = (_random(seed).requires_grad_() for seed in range(3))
    found = policy_loss(new, old, advantages, MASK, clip_range=0.2)
    found.loss.backward()
    assert new.grad is not None and new.grad.ne(0).any()
    assert old.grad is None and advantages.grad is None
    assert [x.requires_grad for x in found] == [True, False, False, False, False, False]


@pytest.mark.parametrize("log_ratio", [90.0, 1e4, math.inf])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_beyond_all_measure_is_no_nan(log_ratio: float, advantage: float) -> None:
    new = torch.tensor([[log_ratio - 1, -2.0]], requires_grad=True)
    old, advantages = torch.tensor([[-1.0, -2.0]]), torch.tensor([[advantage, 1.0]])
    found = policy_loss(new, old, advantages, torch.ones(1, 2), clip_range=0.2)
    (grad,) = torch.autograd.grad(found.loss, new)
    assert found.loss.isfinite() and grad.isfinite().all()
    assert grad[0, 1].item() == -1.0
    assert found.ratio_max.item() == pytest.approx(math.exp(20), rel=1e-5)
    # The further the policy went, the larger: a limit on the KL is certainly passed.
    assert found.approxkl.item() > 1e8


def test_half_precision_is_widened() -> None:
    """Sums of bfloat16 numbers would keep two digits: 300 tokens of 1 / 256 and more."""
    new = torch.zeros(1, 300, dtype=torch.bfloat16, requires_grad=True)
    ones = torch.ones(1, 300, dtype=torch.bfloat16)
    found = policy_loss(new, torch.zeros_like(ones), ones, ones, clip_range=0.2)
    assert (found.loss.dtype, found.loss.item(), found.ratio.item()) == (torch.float32, -300, 300)
    found.loss.backward()
    assert new.grad is not None and new.grad.dtype == torch.bfloat16
    values = torch.full((1, 300), 1.0, dtype=torch.bfloat16)
    error = value_loss(values, values, torch.zeros_like(values), ones, clip_range=None).loss
    assert (error.dtype, error.item()) == (torch.float32, 150.0)


def _value_loop(
    tokens: Sequence[tuple[float, ...]], clip_range: float | None
) -> tuple[float, int, list[float]]:
    loss, clipped, slopes = 0.0, 0, []
    for v, old, target in tokens:
        plain, slope = 0.5 * (v - target) ** 2, v - target
        if clip_range is not None:
            near = min(max(v, old - clip_range), old + clip_range)
            if 0.5 * (near - target) ** 2 > plain:
                plain, slope = 0.5 * (near - target) ** 2, 0.0
                clipped += 1
        loss += plain
        slopes.append(slope)
    return loss, clipped, slopes


@pytest.mark.parametrize("clip_range", [None, 0.2, 1.0])
def test_value_loss_is_that_of_a_loop_over_tokens(clip_range: float | None) -> None:
    old, returns = _random(0), _random(2)
    values = (old + _random(1, 0.5)).requires_grad_()
    tokens = _tokens(values.detach(), old, returns)
    loss, clipped, slopes = _value_loop(tokens, clip_range)
    assert clip_range != 0.2 or 0 < clipped < len(tokens)
    found = value_loss(values, old, returns, MASK, clip_range=clip_range)
    (grad,) = torch.autograd.grad(found.loss, values)
    assert found.loss.item() == pytest.approx(loss, rel=1e-12)
    assert found.clipped.item() == clipped
    assert grad[MASK.bool()].tolist() == pytest.approx(slopes, rel=1e-12)
    assert grad[MASK == 0].eq(0).all()
    assert not found.clipped.requires_grad


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope", "binds"),
    [
        # Old value 1, range 0.5: 0.5 max((v - R)^2, (clip(v, 0.5, 1.5) - R)^2).
        (2.0, 3.0, 1.125, 0.0, 1),  # max(1, 1.5^2) / 2: close enough for this rollout
        (2.0, 0.0, 2.0, 2.0, 0),  # max(4, 1.5^2) / 2: the wrong way, and brought back
        (1.25, 3.0, 1.53125, -1.75, 0),  # 1.75^2 / 2 both ways
    ],
)
def test_value_loss_by_hand(
    value: float, target: float, loss: float, slope: float, binds: int
) -> None:
    values = torch.tensor([[value]], requires_grad=True)
    one = torch.ones(1, 1)
    found = value_loss(values, one, torch.tensor([[target]]), one, clip_range=0.5)
    (grad,) = torch.autograd.grad(found.loss, values)
    assert (found.loss.item(), grad.item(), found.clipped.item()) == (loss, slope, binds)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_padding_changes_neither_values_nor_gradients_of_the_value_loss(
    bad: float, clip_range: float | None
) -> None:
    values, old, returns = _random(0).requires_grad_(), _random(1), _random(2)
    plain = value_loss(values, old, returns, MASK, clip_range=clip_range)
    (expected,) = torch.autograd.grad(plain.loss, values)
    wide = _padded(values.detach(), bad).requires_grad_()
    others = [_padded(x, bad) for x in (old, returns)]
    wide_mask = torch.cat([MASK, MASK.new_zeros(B, 3)], 1)
    found = value_loss(wide, *others, wide_mask, clip_range=clip_range)
    (grad,) = torch.autograd.grad(found.loss, wide)
    for one, other in zip(found, plain, strict=True):
        assert one.item() == pytest.approx(other.item(), rel=1e-12)
    torch.testing.assert_close(grad[:, :R], expected)
    assert grad[:, R:].eq(0).all()


@pytest.mark.parametrize("shape", [(2, 3), (2, 0)])
def test_no_tokens_no_loss(shape: tuple[int, int]) -> None:
    new = torch.full(shape, math.nan, requires_grad=True)
    mask = torch.zeros(shape)
    policy = policy_loss(new, new, new, mask, clip_range=0.2)
    value = value_loss(new, new, new, mask, clip_range=0.2)
    assert [x.item() for x in (*policy, *value)] == [0.0] * 8
    (policy.loss + value.loss).backward()
    assert new.grad is not None and new.grad.eq(0).all()


def test_what_does_not_fit_is_refused() -> None:
    ones = torch.ones(2, 3)
    for place, name in enumerate(("logprobs", "old_logprobs", "advantages")):
        tensors = [ones] * 3
        tensors[place] = ones[:1]
        with pytest.raises(ValueError, match=rf"^{name} and mask .* \(1, 3\) and \(2, 3\)"):
            policy_loss(*tensors, ones, clip_range=0.2)
    with pytest.raises(ValueError, match="returns and mask"):
        value_loss(ones, ones, ones[:1], ones, clip_range=0.2)
    for clip_range in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="clip_range"):
            policy_loss(ones, ones, ones, ones, clip_range=clip_range)
        with pytest.raises(ValueError, match="clip_range"):
            value_loss(ones, ones, ones, ones, clip_range=clip_range)
