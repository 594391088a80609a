"""The fused loss against F.cross_entropy on full logits in float64, and its memory law."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_llm.functional import linear_cross_entropy, token_log_probs, token_statistics

N, D, V = 23, 8, 37


@pytest.fixture(autouse=True)
def _softmax_in_blocks_of_three_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_llm.functional.linear_head._BLOCK_ELEMENTS", 3 * V)


def _operands(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(V, (N,), generator=generator)
    targets[[0, 5, N - 1]] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def _bias(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(-1, 1, V, dtype=dtype).requires_grad_()


def _reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, z: float = 0.0
) -> Tensor:
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    loss = F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    log_z = logits[targets != -100].exp().sum(-1).log()
    return loss + z * (log_z**2).sum()


@pytest.mark.parametrize("chunk_size", [None, 1, 4, N, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_cross_entropy_on_full_logits(
    chunk_size: int | None, z_loss: float, with_bias: bool
) -> None:
    hidden, weight, targets = _operands()
    bias = _bias() if with_bias else None
    inputs = [hidden, weight] + ([bias] if bias is not None else [])
    expected = _reference(hidden, weight, targets, bias, z_loss)
    expected_grads = torch.autograd.grad(expected, inputs)

    result = linear_cross_entropy(
        hidden, weight, targets, bias=bias, z_loss=z_loss, chunk_size=chunk_size
    )
    grads = torch.autograd.grad(result.loss, inputs)

    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=1e-12)
    pure = _reference(hidden, weight, targets, bias).detach()
    torch.testing.assert_close(result.nll, pure, rtol=1e-12, atol=1e-12)
    assert not result.nll.requires_grad
    assert result.num_targets.item() == N - 3
    for grad, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, targets = _operands()
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, targets, bias=b, z_loss=0.1, chunk_size=7).loss,
        (hidden, weight, _bias()),
    )


def test_float32_loss_is_float32_and_close_to_float64() -> None:
    hidden, weight, targets = _operands(torch.float32)
    result = linear_cross_entropy(hidden, weight, targets, chunk_size=5)
    expected = _reference(hidden.double(), weight.double(), targets)
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("how", ["autocast", "bf16 operands"])
def test_bfloat16_errs_no_more_than_full_logits_do(how: str) -> None:
    hidden, weight, targets = _operands(torch.float32)
    with torch.no_grad():  # exactly representable operands: only the arithmetic differs
        hidden.copy_(hidden.bfloat16())
        weight.copy_(weight.bfloat16())
    exact = torch.autograd.grad(
        _reference(hidden.double(), weight.double(), targets), [hidden, weight]
    )
    if how == "autocast":
        h, w = hidden, weight
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = linear_cross_entropy(h, w, targets, chunk_size=5)
            full = F.cross_entropy(F.linear(h, w).float(), targets, reduction="sum")
    else:
        h = hidden.detach().bfloat16().requires_grad_()
        w = weight.detach().bfloat16().requires_grad_()
        result = linear_cross_entropy(h, w, targets, chunk_size=5)
        full = F.cross_entropy(F.linear(h, w).float(), targets, reduction="sum")
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result.loss, full, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(result.loss, [h, w])
    plain = torch.autograd.grad(full, [h, w])
    for mine, theirs, operand, truth in zip(ours, plain, [h, w], exact, strict=True):
        assert mine.dtype == operand.dtype
        error = (mine.double() - truth).norm() / truth.norm()
        assert error <= 1.2 * (theirs.double() - truth).norm() / truth.norm() + 1e-4
        assert error < 1e-2


def test_weight_gradient_of_many_bf16_chunks_is_summed_in_float32() -> None:
    # 512 equal rows: each adds 1/512 of the total, less than bf16 can add to the running sum.
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(512, dtype=torch.long)
    loss = linear_cross_entropy(hidden, weight, targets, chunk_size=1).loss
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad.flatten().tolist() == [-256.0, 256.0]


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_frozen_operands_get_no_gradient_and_cost_no_product(frozen: str) -> None:
    hidden, weight, targets = _operands()
    want_h, want_w = torch.autograd.grad(_reference(hidden, weight, targets), [hidden, weight])
    h = hidden.detach().requires_grad_(frozen == "weight")
    w = weight.detach().requires_grad_(frozen == "hidden")
    with _Recorder() as recorder:
        loss = linear_cross_entropy(h, w, targets, chunk_size=N).loss
    assert recorder.products() == (1 if frozen == "both" else 2)
    if frozen == "both":
        assert not loss.requires_grad
        return
    loss.backward()
    if frozen == "hidden":
        assert h.grad is None
        torch.testing.assert_close(w.grad, want_w)
    else:
        assert w.grad is None
        torch.testing.assert_close(h.grad, want_h)


def test_no_grad_computes_no_gradient() -> None:
    hidden, weight, targets = _operands()
    with torch.no_grad(), _Recorder() as recorder:
        result = linear_cross_entropy(hidden, weight, targets, chunk_size=N)
    assert recorder.products() == 1
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, _reference(hidden, weight, targets).detach())


def test_tied_embedding_receives_both_gradients() -> None:
    _, weight, targets = _operands()
    tokens = torch.arange(N) % V
    expected = torch.autograd.grad(_reference(weight[tokens].tanh(), weight, targets), weight)
    loss = linear_cross_entropy(weight[tokens].tanh(), weight, targets, chunk_size=6).loss
    torch.testing.assert_close(torch.autograd.grad(loss, weight), expected)


def test_scaled_and_repeated_backward() -> None:
    hidden, weight, targets = _operands()
    expected = torch.autograd.grad(_reference(hidden, weight, targets) / 7, [hidden, weight])
    loss = linear_cross_entropy(hidden, weight, targets, chunk_size=6).loss
    for _ in range(2):  # a second backward must not see grads scaled by the first
        grads = torch.autograd.grad(loss / 7, [hidden, weight], retain_graph=True)
        torch.testing.assert_close(grads, expected)


def test_impossible_target_is_infinite_and_not_nan() -> None:
    hidden, weight, targets = torch.ones(1, 1), torch.zeros(2, 1), torch.tensor([0])
    bias = torch.tensor([-torch.inf, 0.0])
    assert linear_cross_entropy(hidden, weight, targets, bias=bias).loss == torch.inf
    assert token_log_probs(hidden, weight, targets, bias=bias).tolist() == [-torch.inf]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_ignored_rows_do_not_leak(value: float) -> None:
    hidden, weight, targets = _operands()
    expected = torch.autograd.grad(_reference(hidden, weight, targets), [hidden, weight])
    with torch.no_grad():
        hidden[targets == -100] = value
    result = linear_cross_entropy(hidden, weight, targets, z_loss=0.1, chunk_size=4)
    assert result.loss.isfinite()
    loss = linear_cross_entropy(hidden, weight, targets, chunk_size=4).loss
    grads = torch.autograd.grad(loss, [hidden, weight])
    torch.testing.assert_close(grads, expected)
    assert grads[0][targets == -100].eq(0).all()
    log_probs = token_log_probs(hidden, weight, targets, chunk_size=4)
    torch.testing.assert_close(log_probs.sum(), -loss)
    assert all(g.isfinite().all() for g in torch.autograd.grad(log_probs.sum(), [hidden, weight]))


@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_to_learn_is_zero_with_zero_gradients(rows: int) -> None:
    hidden = torch.randn(rows, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    targets = torch.full((rows,), -100)
    result = linear_cross_entropy(hidden, weight, targets, z_loss=0.1)
    result.loss.backward()
    assert (result.loss.item(), result.nll.item(), result.num_targets.item()) == (0.0, 0.0, 0)
    assert hidden.grad is not None and hidden.grad.shape == (rows, D) and hidden.grad.eq(0).all()
    assert weight.grad is not None and weight.grad.eq(0).all()
    assert token_log_probs(hidden, weight, targets).tolist() == [0.0] * rows
    nll, correct = token_statistics(hidden, weight, targets)
    assert nll.tolist() == [0.0] * rows and correct.tolist() == [False] * rows


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_log_probs(chunk_size: int | None, temperature: float) -> None:
    hidden, weight, targets = _operands()
    bias = _bias()
    real = targets != -100
    logits = (hidden @ weight.T + bias) / temperature
    expected = torch.zeros(N, dtype=torch.float64)
    picked = logits[real, targets[real]] - logits[real].exp().sum(-1).log()
    expected = expected.masked_scatter(real, picked)
    upstream = torch.linspace(-2, 3, N, dtype=torch.float64)
    want = torch.autograd.grad((expected * upstream).sum(), [hidden, weight, bias])

    result = token_log_probs(
        hidden, weight, targets, bias=bias, temperature=temperature, chunk_size=chunk_size
    )
    torch.testing.assert_close(result, expected)
    got = torch.autograd.grad((result * upstream).sum(), [hidden, weight, bias])
    torch.testing.assert_close(got, want)


def test_token_log_probs_gradcheck_and_frozen_weight() -> None:
    hidden, weight, targets = _operands()
    assert torch.autograd.gradcheck(
        lambda h, w: token_log_probs(h, w, targets, temperature=0.8, chunk_size=7),
        (hidden, weight),
    )
    weight.requires_grad_(False)
    token_log_probs(hidden, weight, targets).sum().backward()
    assert weight.grad is None and hidden.grad is not None


def test_token_log_probs_under_autocast_are_float32() -> None:
    hidden, weight, targets = _operands(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = token_log_probs(hidden, weight, targets, chunk_size=4)
        full = F.linear(hidden, weight).float().log_softmax(-1)
    expected = full.gather(1, targets.clamp(min=0)[:, None])[:, 0] * (targets != -100)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected)


def test_token_statistics() -> None:
    hidden, weight, targets = _operands()
    logits = (hidden @ weight.T).detach()
    targets[3] = logits[3].argmax()
    nll, correct = token_statistics(hidden, weight, targets, chunk_size=4)
    expected = F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    torch.testing.assert_close(nll, expected)
    assert torch.equal(correct, (logits.argmax(-1) == targets) & (targets != -100))
    assert correct[3] and not correct.all()
    assert not nll.requires_grad


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((4, 3), (5, 2), (4,)), {}, "weight"),
        (((4, 3), (5, 3), (3,)), {}, "targets"),
        (((2, 4, 3), (5, 3), (4,)), {}, "hidden"),
        (((4, 3), (5, 3), (4,)), {"chunk_size": 0}, "chunk_size"),
        (((4, 3), (5, 3), (4,)), {"bias": torch.zeros(4)}, "bias"),
    ],
)
def test_wrong_shapes_are_named(shapes: Any, options: dict[str, Any], message: str) -> None:
    hidden, weight, targets = (torch.zeros(shape) for shape in shapes)
    for function in (linear_cross_entropy, token_log_probs, token_statistics):
        with pytest.raises(ValueError, match=message):
            function(hidden, weight, targets.long(), **options)
    with pytest.raises(ValueError, match="temperature"):
        token_log_probs(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1).long(), temperature=0)


class _Recorder(TorchDispatchMode):
    """Names and sizes of everything computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def products(self) -> int:
        return sum(name.startswith(("aten.mm.", "aten.addmm")) for name in self.names)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("which", ["loss", "log_probs", "statistics", "full logits"])
def test_full_logits_never_exist(which: str, autocast: bool) -> None:
    rows, vocabulary, chunk = 64, 4096, 8
    hidden = torch.randn(rows, D, requires_grad=True)
    weight = torch.randn(vocabulary, D, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,))
    with _Recorder() as recorder, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        if which == "loss":
            linear_cross_entropy(
                hidden, weight, targets, z_loss=1e-4, chunk_size=chunk
            ).loss.backward()
        elif which == "log_probs":
            token_log_probs(hidden, weight, targets, chunk_size=chunk).sum().backward()
        elif which == "statistics":
            token_statistics(hidden, weight, targets, chunk_size=chunk)
        else:
            F.cross_entropy(F.linear(hidden, weight), targets).backward()
    if which == "full logits":  # the recorder does see them
        assert recorder.largest >= rows * vocabulary
    else:
        assert recorder.largest == max(chunk, D) * vocabulary


def test_default_chunk_follows_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_llm.functional.linear_head._CHUNK_BYTES", 32 * V)
    for dtype, rows in ((torch.float32, 8), (torch.bfloat16, 16)):
        hidden, weight = torch.randn(64, 2, dtype=dtype), torch.randn(V, 2, dtype=dtype)
        with _Recorder() as recorder:
            linear_cross_entropy(hidden, weight, torch.zeros(64, dtype=torch.long))
        assert recorder.largest == rows * V
