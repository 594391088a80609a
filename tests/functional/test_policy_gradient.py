"""KL estimators against the exact KL of two distributions, and the penalty that adapts to it."""

import math

import pytest
import torch

from lit_llm.functional import adapted_kl_coef, kl_estimate

POLICY = torch.tensor([0.7, 0.2, 0.05, 0.05], dtype=torch.float64)
REFERENCE = torch.tensor([0.05, 0.05, 0.1, 0.8], dtype=torch.float64)


def _kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_mean_over_samples_is_the_kl_of_the_policy_from_the_reference(kind: str) -> None:
    exact, reversed_kl = _kl(POLICY, REFERENCE), _kl(REFERENCE, POLICY)
    assert abs(exact - reversed_kl) > 0.1
    torch.manual_seed(0)
    tokens = torch.multinomial(POLICY, 400_000, replacement=True)
    estimates = kl_estimate(POLICY.log()[tokens], REFERENCE.log()[tokens], kind)
    error = 5 * estimates.std().item() / len(tokens) ** 0.5
    assert error < 0.02
    assert estimates.mean().item() == pytest.approx(exact, abs=error)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_expectation_is_exact(kind: str) -> None:
    """No sampling: weighted by the policy, both are unbiased."""
    estimates = kl_estimate(POLICY.log(), REFERENCE.log(), kind)
    assert (POLICY * estimates).sum().item() == pytest.approx(_kl(POLICY, REFERENCE), rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # log policy - log reference = ln 2
        ("k1", math.log(2)),
        ("k2", math.log(2) ** 2 / 2),
        ("k3", 0.5 - 1 + math.log(2)),
    ],
)
def test_golden_numbers(kind: str, expected: float) -> None:
    logprobs = torch.tensor([[-1.0, -5.0]]) + math.log(2)
    found = kl_estimate(logprobs, torch.tensor([[-1.0, -5.0]]), kind)
    assert found.shape == (1, 2)
    assert found.flatten().tolist() == pytest.approx([expected] * 2, rel=1e-5)


def test_little_variance_is_why_there_is_more_than_k1() -> None:
    near = torch.log_softmax(POLICY.log() + torch.tensor([0.1, -0.1, 0.05, 0.0]), 0)
    exact = _kl(POLICY, near.exp())
    for kind in ("k2", "k3"):
        estimates = kl_estimate(POLICY.log(), near, kind)
        assert (POLICY * estimates).sum().item() == pytest.approx(exact, rel=0.1)
        spread = (POLICY * (estimates - exact).square()).sum()
        assert spread < 0.1 * (POLICY * (POLICY.log() - near - exact).square()).sum()


def test_k3_is_never_negative_and_exact_where_policies_almost_agree() -> None:
    torch.manual_seed(0)
    log_ratio = torch.randn(100_000) * 10 ** (-7 * torch.rand(100_000))
    found = kl_estimate(torch.zeros_like(log_ratio), log_ratio, "k3")
    assert found.dtype == torch.float32
    assert (found >= 0).all()
    # exp(1e-3) - 1 - 1e-3 in float32 would be off by a tenth.
    small = kl_estimate(torch.zeros(1), torch.tensor([1e-3]), "k3").item()
    assert small == pytest.approx(1e-6 / 2 + 1e-9 / 6, rel=1e-3)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_stay_finite(kind: str, dtype: torch.dtype) -> None:
    ends = torch.tensor([0.0, -1e4, -1e9], dtype=dtype)
    logprobs = ends.requires_grad_()
    for reference in (torch.zeros(3), torch.full((3,), -1e4)):
        found = kl_estimate(logprobs, reference, kind)
        (grad,) = torch.autograd.grad(found.sum(), logprobs)
        assert found.dtype == torch.float32
        assert found.isfinite().all()
        assert grad.isfinite().all()
        assert kind == "k1" or (found >= 0).all()


def test_gradients_differ_between_the_kinds() -> None:
    for kind, slope in (("k1", 1.0), ("k2", 0.5), ("k3", 1 - math.exp(-0.5))):
        logprobs = torch.tensor([-1.0], requires_grad=True)
        kl_estimate(logprobs, torch.tensor([-1.5]), kind).sum().backward()
        assert logprobs.grad is not None
        assert logprobs.grad.item() == pytest.approx(slope, rel=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2,\) and \(2, 1\)"):
        kl_estimate(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="'k4'"):
        kl_estimate(torch.zeros(2), torch.zeros(2), "k4")


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        # 256 samples of a horizon of 1024: a quarter of the relative error, of 0.2 at most.
        (6.0, 0.5),
        (6.6, 0.5 * 1.025),
        (5.4, 0.5 * 0.975),
        (60.0, 0.5 * 1.05),
        (math.inf, 0.5 * 1.05),
        (0.0, 0.5 * 0.95),
        (-3.0, 0.5 * 0.95),  # k1 may fall below 0
        (math.nan, 0.5),
    ],
)
def test_the_coefficient_follows_the_error_by_hand(kl: float, expected: float) -> None:
    found = adapted_kl_coef(0.5, kl, target=6.0, horizon=1024, num_samples=256)
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_coefficient_never_moves_by_more_than_a_fifth() -> None:
    for num_samples in (1, 100, 1000, 10**6):
        for kl, bound in ((1e9, 1.2), (0.0, 0.8)):
            found = adapted_kl_coef(1.0, kl, target=6.0, horizon=1000, num_samples=num_samples)
            assert abs(found - 1) == pytest.approx(0.2 * min(num_samples / 1000, 1))
            assert (found - 1) * (bound - 1) > 0


@pytest.mark.parametrize("start", [0.01, 30.0])
def test_the_controller_holds_its_target(start: float) -> None:
    """A policy whose KL falls as the penalty grows ends where its KL is the target, and stays."""
    coefficient = start
    for _ in range(600):
        kl = 3 / coefficient  # the target is reached at 0.5
        coefficient = adapted_kl_coef(coefficient, kl, target=6.0, horizon=1000, num_samples=100)
        assert coefficient > 0
    assert coefficient == pytest.approx(0.5, rel=1e-3)
    assert adapted_kl_coef(0.5, 6.0, target=6.0, horizon=1000, num_samples=100) == 0.5


@pytest.mark.parametrize(("target", "horizon"), [(0.0, 100.0), (6.0, 0.0), (math.nan, 100.0)])
def test_a_controller_without_a_target_is_refused(target: float, horizon: float) -> None:
    with pytest.raises(ValueError, match="target and horizon"):
        adapted_kl_coef(0.1, 6.0, target=target, horizon=horizon, num_samples=16)
