"""Rewards, GAE, group advantages and whitening, against sums written out and numbers by hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

from lit_llm.functional import explained_variance, gae, group_advantages, token_rewards, whiten

LENGTHS = (5, 1, 7, 0, 4)
B, R = len(LENGTHS), 7
BAD = [math.nan, math.inf, -math.inf]


def _mask(lengths: tuple[int, ...] = LENGTHS, columns: int = R) -> Tensor:
    return (torch.arange(columns) < torch.tensor(lengths)[:, None]).long()


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _spoilt(values: Tensor, mask: Tensor, bad: float) -> Tensor:
    return values.masked_fill(mask == 0, bad)


def _gae_by_sums(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Of the paper's equation 16: every advantage a sum of its own over the TD errors to come."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for row in range(len(values)):
        steps = [t for t in range(values.shape[1]) if mask[row, t]]
        v = [values[row, t].item() for t in steps] + [0.0]
        r = [rewards[row, t].item() for t in steps]
        for t, column in enumerate(steps):
            advantages[row, column] = sum(
                (gamma * lam) ** k * (r[t + k] + gamma * v[t + k + 1] - v[t + k])
                for k in range(len(steps) - t)
            )
            returns[row, column] = advantages[row, column] + v[t]
    return advantages, returns


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
def test_gae_is_the_discounted_sum_of_td_errors(gamma: float, lam: float) -> None:
    rewards, values = _random(B, R), _random(B, R, seed=1)
    found = gae(rewards, values, _mask(), gamma=gamma, gae_lambda=lam)
    expected = _gae_by_sums(rewards, values, _mask(), gamma, lam)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gae_defaults_are_those_of_language_models() -> None:
    rewards, values = _random(B, R), _random(B, R, seed=1)
    expected = _gae_by_sums(rewards, values, _mask(), 1.0, 0.95)
    torch.testing.assert_close(gae(rewards, values, _mask()), expected)


def test_gae_by_hand() -> None:
    # One response of three tokens and a column of padding; gamma 0.5, lambda 0.5.
    #   delta_2 = 8 + 0.5 * 0 - 2  = 6      A_2 = 6
    #   delta_1 = -1 + 0.5 * 2 - 4 = -4     A_1 = -4 + 0.25 * 6    = -2.5
    #   delta_0 = 0 + 0.5 * 4 - 1  = 1      A_0 = 1 + 0.25 * -2.5  = 0.375
    # and returns are these plus (1, 4, 2).
    rewards = torch.tensor([[0.0, -1.0, 8.0, 99.0]])
    values = torch.tensor([[1.0, 4.0, 2.0, 99.0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[0.375, -2.5, 6.0, 0.0]]
    assert returns.tolist() == [[1.375, 1.5, 8.0, 0.0]]
    assert advantages.dtype == returns.dtype == torch.float32


def test_with_lambda_1_returns_are_the_rewards_to_come_whatever_the_critic_says() -> None:
    rewards = _random(B, R)
    expected = torch.zeros(B, R, dtype=torch.float64)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            expected[row, t] = sum(0.9**k * rewards[row, t + k] for k in range(length - t))
    for seed in (1, 2):
        _, returns = gae(rewards, _random(B, R, seed=seed), _mask(), gamma=0.9, gae_lambda=1.0)
        torch.testing.assert_close(returns, expected)


def test_holes_and_padding_on_the_left_are_stepped_over() -> None:
    dense = torch.tensor([[1, 1, 1]])
    holey = torch.tensor([[0, 1, 0, 0, 1, 1, 0]])
    rewards, values = _random(1, 3), _random(1, 3, seed=1)
    spread = [
        torch.full((1, 7), math.nan, dtype=torch.float64).masked_scatter(holey.bool(), x)
        for x in (rewards, values)
    ]
    for found, expected in zip(gae(*spread, holey), gae(rewards, values, dense), strict=True):
        torch.testing.assert_close(found[holey.bool()][None], expected)
        assert found[~holey.bool()].eq(0).all()


@pytest.mark.parametrize("bad", BAD)
def test_padding_changes_nothing(bad: float) -> None:
    """More columns, and anything in them: the same rewards, advantages and statistics."""
    mask, wide_mask = _mask(), _mask(columns=R + 3)
    scores, kl = _random(B), _random(B, R, seed=1)
    values = _random(B, R, seed=2)
    padding = torch.full((B, 3), bad, dtype=torch.float64)

    def padded(x: Tensor) -> Tensor:
        return _spoilt(torch.cat([x, padding], 1), wide_mask, bad)

    def all_of(kl: Tensor, values: Tensor, mask: Tensor) -> list[Tensor]:
        rewards = token_rewards(scores, kl, mask, 0.1)
        advantages, returns = gae(rewards, values, mask)
        return [
            *(rewards, advantages, returns, whiten(values, mask)),
            whiten(values, mask, shift_mean=False),
            explained_variance(values, _spoilt(returns, mask, bad), mask),
        ]

    plain = all_of(kl, values, mask)
    for found, expected in zip(all_of(padded(kl), padded(values), wide_mask), plain, strict=True):
        if expected.dim():
            assert found[:, R:].eq(0).all()
            assert found[wide_mask == 0].eq(0).all()
            found = found[:, :R]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_score_goes_on_the_last_token_and_the_penalty_on_all() -> None:
    # Score + -0.5 * KL at the last token of each row. The third row is full, the fourth is empty.
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])
    kl = torch.tensor([[2.0, -4.0, 9.0], [6.0, 9.0, 9.0], [0.0, 2.0, 4.0], [9.0, 9.0, 9.0]])
    found = token_rewards(torch.tensor([10.0, 20.0, 30.0, math.nan]), kl, mask, 0.5)
    assert found.tolist() == [[-1.0, 12.0, 0.0], [17.0, 0.0, 0.0], [0.0, -1.0, 28.0], [0.0] * 3]
    assert found.dtype == torch.float32


def test_rewards_of_a_row_sum_to_its_score_less_its_penalty() -> None:
    scores, kl = _random(B), _random(B, R, seed=1)
    found = token_rewards(scores, kl, _mask(), 0.3)
    for row, length in enumerate(LENGTHS):
        expected = scores[row] - 0.3 * kl[row, :length].sum() if length else torch.tensor(0.0)
        assert found[row].sum().item() == pytest.approx(expected.item())


def test_nothing_carries_a_gradient_and_half_precision_is_widened() -> None:
    values = _random(B, R, dtype=torch.bfloat16).requires_grad_()
    scores = _random(B, dtype=torch.bfloat16).requires_grad_()
    mask = _mask()
    results = [
        token_rewards(scores, values, mask, 0.1),
        *gae(values, values, mask),
        group_advantages(scores, 5, "grpo"),
        whiten(values, mask),
        explained_variance(values, values, mask),
    ]
    for result in results:
        assert result.dtype == torch.float32
        assert not result.requires_grad


def test_rloo_by_hand() -> None:
    # 1 - (2 + 6) / 2 = -3, 2 - (1 + 6) / 2 = -1.5, 6 - (1 + 2) / 2 = 4.5; equal rewards 0.
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.1, 0.1, 0.1])
    found = group_advantages(rewards, 3, "rloo")
    assert found[:3].tolist() == pytest.approx([-3.0, -1.5, 4.5])
    assert found[3:].tolist() == [0.0] * 3


def test_grpo_by_hand() -> None:
    # Mean 3; squares 4 + 1 + 9 = 14, so the deviation is sqrt(14 / 2) = sqrt(7); equal rewards 0.
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.1, 0.1, 0.1])
    found = group_advantages(rewards, 3, "grpo")
    std = math.sqrt(7) + 1e-4
    assert found[:3].tolist() == pytest.approx([-2 / std, -1 / std, 3 / std], rel=1e-6)
    assert found[3:].tolist() == [0.0] * 3
    # A pair: mean 0.5, deviation sqrt(0.5).
    pair = group_advantages(torch.tensor([1.0, 0.0]), 2, "grpo").tolist()
    assert pair == pytest.approx([0.5 / (math.sqrt(0.5) + 1e-4), -0.5 / (math.sqrt(0.5) + 1e-4)])


def test_groups_do_not_see_each_other() -> None:
    rewards = _random(12)
    for kind in ("rloo", "grpo"):
        whole = group_advantages(rewards, 4, kind)
        for start in (0, 4, 8):
            alone = group_advantages(rewards[start : start + 4], 4, kind)
            assert torch.equal(whole[start : start + 4], alone)
            assert alone.sum().item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_is_that_of_the_list_of_all_values(shift_mean: bool) -> None:
    values, mask = 3 * _random(B, R) + 5, _mask()
    kept = values[mask.bool()].tolist()
    mean, std = statistics.fmean(kept), statistics.stdev(kept)
    expected = [(x - mean) / std + (0 if shift_mean else mean) for x in kept]
    found = whiten(values, mask, shift_mean=shift_mean)
    assert found[mask.bool()].tolist() == pytest.approx(expected, rel=1e-7)
    assert found[mask == 0].eq(0).all()


def test_whitening_by_hand() -> None:
    # 1, 3, 5: mean 3, variance (4 + 0 + 4) / 2 = 4.
    values, mask = torch.tensor([[1.0, 3.0], [5.0, 100.0]]), torch.tensor([[1, 1], [1, 0]])
    assert whiten(values, mask).tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    assert whiten(values, mask, shift_mean=False).tolist() == [[2.0, 3.0], [4.0, 0.0]]


@pytest.mark.parametrize("value", [0.1, -1e6])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_whitening_of_nothing_of_one_value_and_of_equal_values(count: int, value: float) -> None:
    values = torch.full((1, 6), value)
    mask = _mask((count,), 6)
    assert whiten(values, mask).tolist() == [[0.0] * 6]
    kept = whiten(values, mask, shift_mean=False)[0].tolist()
    assert kept == [torch.tensor(value).item()] * count + [0.0] * (6 - count)


def test_a_large_mean_does_not_swallow_the_deviation() -> None:
    # 2^23 + k is a float32; its square, and a sum of such squares, is none.
    values = torch.tensor([[0.0, 1.0, 2.0, 3.0]]) + 2**23
    std = math.sqrt(5 / 3)
    expected = [-1.5 / std, -0.5 / std, 0.5 / std, 1.5 / std]
    assert whiten(values, torch.ones(1, 4))[0].tolist() == pytest.approx(expected, rel=1e-6)


class _Ranks:
    """Runs one function a rank, whose sums go over all of them as all_reduce would."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._barrier = Barrier(count, timeout=20)
        self._given: list[Tensor] = [torch.empty(0)] * count

    def run(self, function: Callable[[int, Callable[[Tensor], Tensor]], Tensor]) -> list[Tensor]:
        def all_sum(rank: int, here: Tensor) -> Tensor:
            assert here.dtype == torch.float64
            self._given[rank] = here
            self._barrier.wait()
            total = torch.stack(self._given).sum(0)
            self._barrier.wait()
            return total

        with ThreadPoolExecutor(self.count) as pool:
            tasks = [
                pool.submit(lambda rank=rank: function(rank, lambda x: all_sum(rank, x)))
                for rank in range(self.count)
            ]
            return [task.result() for task in tasks]


@pytest.mark.parametrize("shift_mean", [True, False])
def test_statistics_go_over_all_ranks(shift_mean: bool) -> None:
    """The fourth row is empty: its rank has nothing to add, and takes part."""
    values, returns, mask = 3 * _random(B, R) + 5, _random(B, R, seed=1), _mask()
    whole = whiten(values, mask, shift_mean=shift_mean)
    parts = [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)]
    found = _Ranks(4).run(
        lambda rank, all_sum: whiten(
            values[parts[rank]], mask[parts[rank]], shift_mean=shift_mean, all_sum=all_sum
        )
    )
    torch.testing.assert_close(torch.cat(found), whole, rtol=1e-12, atol=1e-12)
    alone = whiten(values[parts[0]], mask[parts[0]], shift_mean=shift_mean)
    assert not torch.allclose(found[0], alone, rtol=0.1)

    shares = _Ranks(4).run(
        lambda rank, all_sum: explained_variance(
            values[parts[rank]], returns[parts[rank]], mask[parts[rank]], all_sum
        )
    )
    expected = explained_variance(values, returns, mask)
    for share in shares:
        torch.testing.assert_close(share, expected, rtol=1e-12, atol=1e-12)


def test_explained_variance_is_that_of_the_lists() -> None:
    values, returns, mask = _random(B, R), _random(B, R, seed=1), _mask().bool()
    missed = (returns - values)[mask].tolist()
    expected = 1 - statistics.variance(missed) / statistics.variance(returns[mask].tolist())
    assert explained_variance(values, returns, mask).item() == pytest.approx(expected)


def test_explained_variance_by_hand() -> None:
    mask = torch.tensor([[1, 1, 1, 0]])
    returns = torch.tensor([[1.0, 2.0, 3.0, 50.0]])
    for values, expected in (
        ([1.0, 2.0, 3.0, 0.0], 1.0),
        ([6.0, 7.0, 8.0, 0.0], 1.0),  # always 5 too high, and yet it knows which is better
        ([4.0, 4.0, 4.0, 0.0], 0.0),  # a constant
        ([3.0, 2.0, 1.0, 0.0], -3.0),  # missed by -2, 0, 2: variance 4, of returns 1
    ):
        assert explained_variance(torch.tensor([values]), returns, mask).item() == expected
    same = torch.full((1, 4), 0.1)
    assert explained_variance(returns, same, mask).item() == 0.0
    assert explained_variance(returns, returns, torch.zeros(1, 4)).item() == 0.0


def test_a_rollout_without_columns_is_no_crash() -> None:
    empty = torch.zeros(2, 0)
    assert token_rewards(torch.ones(2), empty, empty, 0.1).shape == (2, 0)
    assert [x.shape for x in gae(empty, empty, empty)] == [(2, 0), (2, 0)]
    assert whiten(empty, empty).shape == (2, 0)


def test_what_does_not_fit_is_refused() -> None:
    square, mask = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"scores must be \(2,\), not \(3,\)"):
        token_rewards(torch.zeros(3), square, mask, 0.1)
    with pytest.raises(ValueError, match=r"kl and mask .* \(2, 1\) and \(2, 3\)"):
        token_rewards(torch.zeros(2), square[:, :1], mask, 0.1)
    with pytest.raises(ValueError, match="values and mask"):
        gae(square, square[:1], mask)
    with pytest.raises(ValueError, match="values and mask"):
        whiten(square[:1], mask)
    with pytest.raises(ValueError, match="returns and mask"):
        explained_variance(square, square[:1], mask)
    with pytest.raises(ValueError, match="multiple of 2"):
        group_advantages(torch.zeros(3), 2, "rloo")
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.zeros(3), 1, "rloo")
    with pytest.raises(ValueError, match="'ppo'"):
        group_advantages(torch.zeros(4), 2, "ppo")
