"""Log-probabilities of given tokens and entropies, without the (N, V) matrix of probabilities.

From hidden states the logits are made a chunk of rows at a time, and once more in the backward pass
where they are more than one chunk. From logits nothing of their size is made but their gradient.

Legend: N tokens (batch and time flattened), C rows of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_llm.functional.language_model import IGNORE_INDEX
from lit_llm.functional.linear_head import (
    LinearHead,
    accumulation_dtype,
    add_at,
    check_operands,
    chunks,
    compute_dtype,
    log_prob_blocks,
    no_autocast,
    rows_per_chunk,
)

# exp() of it is 0, in float64 too: an impossible token adds 0 * -1e4 to the entropy, not 0 * -inf.
_IMPOSSIBLE = -1e4


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probability of each target under ``softmax(logits / temperature)``.

    Differentiable in ``hidden``, ``weight`` and ``bias``; where the logits are more than one chunk,
    the backward pass computes them a second time instead of keeping them.

    Args:
        hidden: (N, D) hidden states after the final norm.
        weight: (V, D) output projection.
        targets: (N,) long, the token scored by each row.
        bias: (V,) bias of the output projection.
        temperature: Sampling temperature the logits are divided by.
        ignore_index: Target value of rows that are skipped; their log-probability is 0.
        chunk_size: Rows of logits held at once; by default as many as take 64 MB.

    Returns:
        (N,) float32 log-probabilities in nats (float64 for float64 operands).

    Raises:
        ValueError: Shapes that do not fit together, a chunk size below 1, or a temperature that is
            not positive.
    """
    logprobs, _ = _from_hidden(
        hidden, weight, bias, targets, temperature, ignore_index, chunk_size, with_entropy=False
    )
    return logprobs


def token_log_probs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`token_log_probs`, and the entropy of the distribution each target was drawn from.

    The log-probabilities are those of :func:`token_log_probs` to the last bit. Both results are
    differentiable; an entropy that is only looked at costs the backward pass nothing. Tokens of
    probability 0 add nothing to the entropy.

    Args:
        hidden: (N, D) hidden states after the final norm.
        weight: (V, D) output projection.
        targets: (N,) long, the token scored by each row.
        bias: (V,) bias of the output projection.
        temperature: Sampling temperature the logits are divided by.
        ignore_index: Target value of rows that are skipped; both their results are 0.
        chunk_size: Rows of logits held at once; by default as many as take 64 MB.

    Returns:
        Log-probabilities (N,) and entropies (N,) of ``softmax(logits / temperature)``, float32 in
        nats (float64 for float64 operands).

    Raises:
        ValueError: As for :func:`token_log_probs`.
    """
    logprobs, entropy = _from_hidden(
        hidden, weight, bias, targets, temperature, ignore_index, chunk_size, with_entropy=True
    )
    assert entropy is not None
    return logprobs, entropy


def logits_log_probs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Tensor, Tensor]:
    """The same two from full logits, for models whose logits are no plain projection.

    Args:
        logits: (N, V) logits, before the division by the temperature.
        targets: (N,) long, the token scored by each row.
        temperature: Sampling temperature the logits are divided by.
        ignore_index: Target value of rows that are skipped; both their results are 0.

    Returns:
        Log-probabilities (N,) and entropies (N,), as :func:`token_log_probs_and_entropy`.

    Raises:
        ValueError: Shapes that do not fit together, or a temperature that is not positive.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be (N, V) and targets (N,), not {tuple(logits.shape)} "
            f"and {tuple(targets.shape)}"
        )
    _check_temperature(temperature)
    rows = rows_per_chunk(logits.shape[1], logits.dtype, None)
    logprobs, entropy = _FromLogits.apply(  # type: ignore[no-untyped-call]
        logits, targets, ignore_index, temperature, rows
    )
    return logprobs, entropy


def _from_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    ignore_index: int,
    chunk_size: int | None,
    *,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    check_operands(hidden, weight, targets, bias, chunk_size)
    _check_temperature(temperature)
    dtype = compute_dtype(hidden)
    rows = rows_per_chunk(len(weight), dtype, chunk_size)
    logprobs, entropy = _FromHidden.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, ignore_index, temperature, rows, dtype, with_entropy
    )
    return logprobs, entropy


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        temperature: float,
        chunk_rows: int,
        dtype: torch.dtype,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        logprobs = hidden.new_zeros(targets.shape, dtype=accumulation_dtype(dtype))
        entropy = torch.zeros_like(logprobs) if with_entropy else None
        pieces = list(chunks(targets, ignore_index, chunk_rows))
        with no_autocast(hidden):
            head = LinearHead(weight, bias, dtype)
            for index in pieces:
                logits = head.logits(hidden[index].to(dtype))
                _measure(logits, targets, temperature, index, logprobs, entropy)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy)
        ctx.settings = (ignore_index, temperature, chunk_rows, dtype)
        # The backward pass holds a chunk of logits too: a single one need not be made twice.
        ctx.logits = logits if len(pieces) == 1 else None
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropy = ctx.saved_tensors
        ignore_index, temperature, chunk_rows, dtype = ctx.settings
        kept, ctx.logits = ctx.logits, None  # about to be overwritten
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        with no_autocast(hidden):
            head = LinearHead(weight, bias, dtype, ctx.needs_input_grad[:3])
            for index in chunks(targets, ignore_index, chunk_rows):
                h = hidden[index].to(dtype)
                logits = head.logits(h) if kept is None else kept
                _differentiate(logits, targets, temperature, index, entropy, *grads)
                grad_h = head.backward(h, logits)
                if grad_hidden is not None and grad_h is not None:
                    grad_hidden[index] = grad_h.to(grad_hidden.dtype)
        grad_weight, grad_bias = head.gradients()
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 6,
        )


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        ignore_index: int,
        temperature: float,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        logprobs = logits.new_zeros(targets.shape, dtype=accumulation_dtype(logits.dtype))
        entropy = torch.zeros_like(logprobs)
        for index in chunks(targets, ignore_index, chunk_rows):
            _measure(logits[index], targets, temperature, index, logprobs, entropy)
        ctx.save_for_backward(logits, targets, entropy)
        ctx.settings = (ignore_index, temperature, chunk_rows)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, entropy = ctx.saved_tensors
        ignore_index, temperature, chunk_rows = ctx.settings
        grad_logits = torch.zeros_like(logits)
        for index in chunks(targets, ignore_index, chunk_rows):
            some = logits[index]
            _differentiate(some, targets, temperature, index, entropy, *grads)
            grad_logits[index] = some
        return (grad_logits, *(None,) * 4)


def _measure(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    index: Tensor,
    logprobs: Tensor,
    entropy: Tensor | None,
) -> None:
    """Writes the results of the rows ``index``, whose logits (C, V) are given."""
    for rows, log_probs in log_prob_blocks(logits, temperature):
        place = index[rows]
        logprobs[place] = log_probs.gather(1, targets[place, None]).squeeze(1)
        if entropy is not None:
            log_probs.clamp_(min=_IMPOSSIBLE)
            entropy[place] = -log_probs.exp().mul_(log_probs).sum(dim=1)


def _differentiate(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    index: Tensor,
    entropy: Tensor | None,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """Puts the gradient of the logits (C, V) of the rows ``index`` in their place."""
    for rows, log_probs in log_prob_blocks(logits, temperature):
        place = index[rows]
        slope: Tensor | None = None
        if entropy is not None and grad_entropy is not None:
            # d entropy / d logits = -p (log p + entropy) / temperature
            slope = log_probs.clamp(min=_IMPOSSIBLE).add_(entropy[place, None])
        probs = log_probs.exp_()
        if slope is not None and grad_entropy is not None:
            slope.mul_(probs).mul_(grad_entropy[place, None] / -temperature)
        if grad_logprobs is not None:
            # d log p(target) / d logits = (onehot - p) / temperature
            grad = add_at(probs.neg_(), targets[place, None], 1.0)
            grad.mul_(grad_logprobs[place, None] / temperature)
            slope = grad if slope is None else slope.add_(grad)
        logits[rows] = slope if slope is not None else 0.0
