"""Log-probabilities with entropies against autograd on the whole matrix of logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_llm.functional import (
    logits_log_probs_and_entropy,
    token_log_probs,
    token_log_probs_and_entropy,
)

N, D, V = 23, 8, 37
KEPT = torch.ones(N, dtype=torch.bool).index_fill(0, torch.tensor([0, 5, N - 1]), False)


@pytest.fixture(autouse=True)
def _softmax_in_blocks_of_three_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_llm.functional.linear_head._BLOCK_ELEMENTS", 3 * V)


def _operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias and targets; three rows are ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.linspace(-1, 1, V, dtype=torch.float64).to(dtype)
    targets = torch.randint(V, (N,), generator=generator).masked_fill(~KEPT, -100)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), targets


def _reference(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """By torch's own distribution; 0 in rows that are ignored."""
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    zero = logits.new_zeros(())
    return (
        torch.where(KEPT, distribution.log_prob(targets.clamp(min=0)), zero),
        torch.where(KEPT, distribution.entropy(), zero),
    )


def _loss(results: tuple[Tensor, Tensor], which: str = "both") -> Tensor:
    """Another slope for each row and result."""
    logprobs, entropy = results
    slopes = torch.linspace(-2, 3, N, dtype=logprobs.dtype)
    loss = torch.zeros((), dtype=logprobs.dtype)
    if which != "entropy":
        loss = loss + (slopes * logprobs).sum()
    if which != "logprobs":
        loss = loss + (slopes.flip(0).square() * entropy).sum()
    return loss


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("which", ["both", "logprobs", "entropy"])
def test_equals_autograd_on_full_logits(
    chunk_size: int | None, temperature: float, with_bias: bool, which: str
) -> None:
    hidden, weight, bias, targets = _operands()
    inputs = [hidden, weight, bias] if with_bias else [hidden, weight]
    given = bias if with_bias else None
    expected = _reference(F.linear(hidden, weight, given), targets, temperature)
    expected_grads = torch.autograd.grad(_loss(expected, which), inputs)

    found = token_log_probs_and_entropy(
        hidden, weight, targets, bias=given, temperature=temperature, chunk_size=chunk_size
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    grads = torch.autograd.grad(_loss(found, which), inputs)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("which", ["both", "logprobs", "entropy"])
@pytest.mark.parametrize("rows", [4, 1000])
def test_from_logits(which: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_llm.functional.linear_head._CHUNK_BYTES", rows * V * 8)
    hidden, weight, bias, targets = _operands()
    logits = F.linear(hidden, weight, bias).detach().requires_grad_()
    before = logits.detach().clone()
    expected = _reference(logits, targets, 0.7)
    (expected_grad,) = torch.autograd.grad(_loss(expected, which), logits)
    found = logits_log_probs_and_entropy(logits, targets, temperature=0.7)
    (grad,) = torch.autograd.grad(_loss(found, which), logits)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-11)
    assert torch.equal(logits, before)  # a model's own output is left as it is


def test_gradcheck() -> None:
    hidden, weight, bias, targets = _operands()
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_log_probs_and_entropy(
            h, w, targets, bias=b, temperature=0.8, chunk_size=7
        ),
        (hidden, weight, bias),
        fast_mode=True,
    )


def test_by_hand() -> None:
    # Probabilities 1/2, 1/4, 1/4: entropy (ln 2) / 2 + 2 (ln 4) / 4 = 1.5 ln 2.
    # d entropy / d logit = -p (ln p + entropy): -1/2 * 0.5 ln 2, and -1/4 * -0.5 ln 2 twice.
    logits = torch.tensor([[math.log(2), 0.0, 0.0]], requires_grad=True)
    logprobs, entropy = logits_log_probs_and_entropy(logits, torch.tensor([1]))
    assert logprobs.item() == pytest.approx(-2 * math.log(2), rel=1e-6)
    assert entropy.item() == pytest.approx(1.5 * math.log(2), rel=1e-6)
    (grad,) = torch.autograd.grad(entropy.sum(), logits)
    expected = [-math.log(2) / 4, math.log(2) / 8, math.log(2) / 8]
    assert grad[0].tolist() == pytest.approx(expected, rel=1e-5)
    # Temperature 1/2 doubles the logits: 2/3, 1/6, 1/6.
    cold = logits_log_probs_and_entropy(logits, torch.tensor([1]), temperature=0.5)[1]
    assert cold.item() == pytest.approx(2 / 3 * math.log(1.5) + math.log(6) / 3, rel=1e-6)


def test_extremes() -> None:
    """Even logits have entropy ln V, a certain token 0; neither has a slope."""
    flat, certain = torch.zeros(1, V), torch.zeros(1, V).index_fill(1, torch.tensor([3]), 1e4)
    logits = torch.cat([flat, certain]).requires_grad_()
    _, entropy = logits_log_probs_and_entropy(logits, torch.tensor([3, 3]))
    assert entropy.tolist() == pytest.approx([math.log(V), 0.0], rel=1e-6)
    (grad,) = torch.autograd.grad(entropy.sum(), logits)
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_tokens_add_nothing(dtype: torch.dtype) -> None:
    """Logits of -inf, as models give entries that are no tokens: as if these were not there."""
    hidden, weight, bias, targets = _operands(dtype)
    possible = V - 7
    targets = torch.where(KEPT, targets % possible, targets)
    masked = bias.detach().clone().index_fill(0, torch.arange(possible, V), -math.inf)
    short = token_log_probs_and_entropy(
        hidden, weight[:possible], targets, bias=bias[:possible], chunk_size=4
    )
    expected = torch.autograd.grad(_loss(short), hidden)
    found = token_log_probs_and_entropy(hidden, weight, targets, bias=masked, chunk_size=4)
    torch.testing.assert_close(found, short)
    torch.testing.assert_close(torch.autograd.grad(_loss(found), hidden), expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_log_probs_are_those_without_entropy_to_the_last_bit(
    autocast: bool, chunk_size: int | None
) -> None:
    hidden, weight, bias, targets = _operands(torch.float32)
    settings: dict[str, Any] = {"bias": bias, "temperature": 0.7, "chunk_size": chunk_size}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        alone = token_log_probs(hidden, weight, targets, **settings)
        logprobs, entropy = token_log_probs_and_entropy(hidden, weight, targets, **settings)
    assert torch.equal(alone, logprobs)
    inputs = [hidden, weight, bias]
    slopes = torch.linspace(-1, 2, N)
    grads = torch.autograd.grad((slopes * logprobs).sum(), inputs)  # the entropy is looked at only
    for one, other in zip(torch.autograd.grad((slopes * alone).sum(), inputs), grads, strict=True):
        assert torch.equal(one, other)
    assert logprobs.dtype == entropy.dtype == torch.float32


@pytest.mark.parametrize("how", ["float32", "autocast", "bf16 operands", "bf16 logits"])
def test_lower_precision_errs_no_more_than_full_logits_do(how: str) -> None:
    operands = _operands(torch.float32)
    with torch.no_grad():  # exactly representable operands: only the arithmetic differs
        for operand in operands[:3]:
            operand.copy_(operand.bfloat16())
    targets = operands[3]
    exact_inputs = [x.detach().double().requires_grad_() for x in operands[:3]]
    dtype = torch.bfloat16 if how.startswith("bf16") else torch.float32
    inputs = [x.detach().to(dtype).requires_grad_() for x in operands[:3]]
    settings: dict[str, Any] = {"temperature": 0.7}

    def full(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(hidden, weight, bias)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        if how == "bf16 logits":
            found = logits_log_probs_and_entropy(full(*inputs), targets, **settings)
        else:
            hidden, weight, bias = inputs
            found = token_log_probs_and_entropy(
                hidden, weight, targets, bias=bias, chunk_size=5, **settings
            )
        plain = _reference(full(*inputs).float(), targets, 0.7)
    exact = _reference(full(*exact_inputs), targets, 0.7)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    for which in ("both", "logprobs", "entropy"):
        ours = torch.autograd.grad(_loss(found, which), inputs, retain_graph=True)
        theirs = torch.autograd.grad(_loss(plain, which), inputs, retain_graph=True)
        truths = torch.autograd.grad(_loss(exact, which), exact_inputs, retain_graph=True)
        for mine, other, operand, truth in zip(ours, theirs, inputs, truths, strict=True):
            assert mine.dtype == operand.dtype
            error = (mine.double() - truth).norm() / truth.norm()
            allowed = (other.double() - truth).norm() / truth.norm()
            assert error <= 1.2 * allowed + (1e-6 if how == "float32" else 1e-3)
            assert error < (1e-5 if how == "float32" else 2e-2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_ignored_rows_do_not_leak(bad: float, chunk_size: int | None) -> None:
    hidden, weight, bias, targets = _operands()
    expected = token_log_probs_and_entropy(hidden, weight, targets, bias=bias)
    expected_grads = torch.autograd.grad(_loss(expected), [hidden, weight, bias])
    with torch.no_grad():
        hidden[~KEPT] = bad
    found = token_log_probs_and_entropy(hidden, weight, targets, bias=bias, chunk_size=chunk_size)
    grads = torch.autograd.grad(_loss(found), [hidden, weight, bias])
    torch.testing.assert_close((found, grads), (expected, expected_grads))
    assert all(result[~KEPT].eq(0).all() for result in found)

    logits = F.linear(hidden, weight, bias).detach().requires_grad_()
    (grad,) = torch.autograd.grad(_loss(logits_log_probs_and_entropy(logits, targets)), logits)
    assert grad[~KEPT].eq(0).all() and grad[KEPT].isfinite().all()


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_a_second_backward_pass_finds_what_the_first_found(
    chunk_size: int | None, with_entropy: bool
) -> None:
    """The first one overwrites the logits that the forward pass has kept."""
    hidden, weight, bias, targets = _operands()
    settings: dict[str, Any] = {"bias": bias, "chunk_size": chunk_size}
    if with_entropy:
        loss = _loss(token_log_probs_and_entropy(hidden, weight, targets, **settings))
    else:
        loss = token_log_probs(hidden, weight, targets, **settings).sum()
    first, second = (
        torch.autograd.grad(loss, [hidden, weight, bias], retain_graph=True) for _ in range(2)
    )
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_to_score_is_zero_with_zero_gradients(rows: int) -> None:
    hidden, weight = torch.randn(rows, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    targets = torch.full((rows,), -100)
    for results in (
        token_log_probs_and_entropy(hidden, weight, targets),
        logits_log_probs_and_entropy(hidden @ weight.T, targets),
    ):
        assert [x.tolist() for x in results] == [[0.0] * rows] * 2
        for grad in torch.autograd.grad(sum(results).sum(), [hidden, weight]):
            assert grad.eq(0).all()


class _Recorder(TorchDispatchMode):
    """Counts the products of matrices, and finds the largest tensor computed."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += str(func).startswith(("aten.mm.", "aten.addmm"))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


@pytest.mark.parametrize("autocast", [False, True])
def test_full_logits_never_exist(autocast: bool) -> None:
    rows, vocabulary, chunk = 64, 4096, 8
    hidden = torch.randn(rows, D, requires_grad=True)
    weight = torch.randn(vocabulary, D, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,))
    with _Recorder() as recorder, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logprobs, entropy = token_log_probs_and_entropy(hidden, weight, targets, chunk_size=chunk)
        (logprobs + entropy).sum().backward()
    assert recorder.largest == max(chunk, D) * vocabulary


@pytest.mark.parametrize(("chunk_size", "products"), [(None, 3), (N - 3, 3), (10, 4 * 2)])
def test_one_chunk_of_logits_is_made_once(chunk_size: int | None, products: int) -> None:
    """Forward and two gradients; of more chunks than one, the logits once more."""
    hidden, weight, _, targets = _operands()
    with _Recorder() as recorder:
        token_log_probs(hidden, weight, targets, chunk_size=chunk_size).sum().backward()
    assert recorder.products == products


def test_without_gradients_nothing_is_kept() -> None:
    hidden, weight, _, targets = _operands()
    with torch.no_grad():
        results = token_log_probs_and_entropy(hidden, weight, targets)
    assert not any(result.requires_grad for result in results)


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, _, targets = _operands()
    with pytest.raises(ValueError, match="targets"):
        token_log_probs_and_entropy(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match="weight"):
        token_log_probs_and_entropy(hidden, weight[:, 1:], targets)
    with pytest.raises(ValueError, match=r"logits .* \(23, 37\) and \(22,\)"):
        logits_log_probs_and_entropy(hidden @ weight.T, targets[1:])
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            token_log_probs_and_entropy(hidden, weight, targets, temperature=temperature)
        with pytest.raises(ValueError, match="temperature"):
            logits_log_probs_and_entropy(hidden @ weight.T, targets, temperature=temperature)
