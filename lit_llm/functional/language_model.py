"""Next-token loss and statistics straight from hidden states, without the (N, V) logits.

The logits of a language model are its largest tensor: at 2,048 tokens and 49,152 entries they take
400 MB in float32, and their gradient as much again. Every function here goes through the output
projection ``chunk`` rows at a time, so at most (chunk, V) exists at once.

Legend: N tokens (batch and time flattened), D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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

IGNORE_INDEX = -100
"""Label of a token without loss (the Hugging Face convention)."""


class LinearCrossEntropy(NamedTuple):
    """Sums over the target tokens; divide by a token count of your own choice.

    Attributes:
        loss: 0-dim, differentiable: negative log-likelihood plus z-loss, in nats.
        nll: 0-dim, detached: the negative log-likelihood alone, in nats.
        num_targets: 0-dim long: how many targets were not ignored.
    """

    loss: Tensor
    nll: Tensor
    num_targets: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> LinearCrossEntropy:
    """Summed cross entropy of ``hidden @ weight.T + bias`` against ``targets``.

    Equals ``F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")`` plus the
    z-loss of PaLM (https://arxiv.org/abs/2204.02311, section 5), ``z_loss * logsumexp(logits)^2``
    per token. Gradients are computed chunk by chunk in the forward pass, so the logits are neither
    kept nor computed twice. Products run in the autocast dtype when autocast is on, else in the
    operands' own; softmax, loss and the gradient of ``weight`` accumulate in float32 (float64 for
    float64 operands). Ignored rows take no part at all: even NaN in them does not show.

    Args:
        hidden: (N, D) hidden states after the final norm.
        weight: (V, D) output projection; may be the tied embedding.
        targets: (N,) long, the token each row is to predict.
        bias: (V,) bias of the output projection.
        ignore_index: Target value that marks a row without loss.
        z_loss: Coefficient of the z-loss; 1e-4 in PaLM.
        chunk_size: Rows of logits held at once; by default as many as take 64 MB.

    Returns:
        Loss, pure negative log-likelihood and number of targets; all 0 when every row is ignored.

    Raises:
        ValueError: Shapes that do not fit together, or a chunk size below 1.
    """
    check_operands(hidden, weight, targets, bias, chunk_size)
    recording = torch.is_grad_enabled()
    needs = tuple(
        recording and operand is not None and operand.requires_grad
        for operand in (hidden, weight, bias)
    )
    dtype = compute_dtype(hidden)
    rows = rows_per_chunk(len(weight), dtype, chunk_size)
    loss, nll, num_targets = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, ignore_index, z_loss, rows, dtype, needs
    )
    return LinearCrossEntropy(loss, nll, num_targets)


@torch.no_grad()
def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each target and whether it is the most likely token.

    Args:
        hidden: (N, D) hidden states after the final norm.
        weight: (V, D) output projection.
        targets: (N,) long, the token each row is to predict.
        bias: (V,) bias of the output projection.
        ignore_index: Target value of rows that are skipped.
        chunk_size: Rows of logits held at once; by default as many as take 64 MB.

    Returns:
        ``nll`` (N,) float32 in nats and ``correct`` (N,) bool; 0 and False in ignored rows.

    Raises:
        ValueError: Shapes that do not fit together, or a chunk size below 1.
    """
    check_operands(hidden, weight, targets, bias, chunk_size)
    dtype = compute_dtype(hidden)
    nll = hidden.new_zeros(targets.shape, dtype=accumulation_dtype(dtype))
    correct = torch.zeros_like(targets, dtype=torch.bool)
    with no_autocast(hidden):
        head = LinearHead(weight, bias, dtype)
        for index in chunks(targets, ignore_index, rows_per_chunk(len(weight), dtype, chunk_size)):
            logits = head.logits(hidden[index].to(dtype))
            for rows, log_probs in log_prob_blocks(logits):
                chosen = targets[index[rows]]
                nll[index[rows]] = -log_probs.gather(1, chosen[:, None]).squeeze(1)
                correct[index[rows]] = log_probs.argmax(dim=1) == chosen
    return nll, correct


def logits_cross_entropy(
    logits: Tensor, targets: Tensor, *, ignore_index: int = IGNORE_INDEX, z_loss: float = 0.0
) -> LinearCrossEntropy:
    """The same sums from full logits, for models whose logits are no plain projection.

    Args:
        logits: (N, V) logits.
        targets: (N,) long, the token each row is to predict.
        ignore_index: Target value that marks a row without loss.
        z_loss: Coefficient of the z-loss.

    Returns:
        Loss, pure negative log-likelihood and number of targets.
    """
    kept = (targets != ignore_index).nonzero().squeeze(1)
    logits = logits[kept].to(accumulation_dtype(logits.dtype))
    nll = F.cross_entropy(logits, targets[kept], reduction="sum")
    z = z_loss * logits.logsumexp(-1).square().sum() if z_loss else 0.0
    return LinearCrossEntropy(nll + z, nll.detach(), torch.tensor(len(kept), device=logits.device))


@torch.no_grad()
def logits_statistics(
    logits: Tensor, targets: Tensor, *, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """:func:`token_statistics` from full logits (N, V); see there."""
    wide = logits.to(accumulation_dtype(logits.dtype))
    nll = F.cross_entropy(wide, targets, reduction="none", ignore_index=ignore_index)
    return nll, (logits.argmax(dim=1) == targets) & (targets != ignore_index)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        z_loss: float,
        chunk_rows: int,
        dtype: torch.dtype,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = accumulation_dtype(dtype)
        nll, squares = hidden.new_zeros(2, dtype=wide).unbind()
        grad_hidden = torch.zeros_like(hidden) if needs[0] else None
        with no_autocast(hidden):
            head = LinearHead(weight, bias, dtype, needs)
            for index in chunks(targets, ignore_index, chunk_rows):
                h, target = hidden[index].to(dtype), targets[index][:, None]
                logits = head.logits(h)
                for rows, log_probs in log_prob_blocks(logits):
                    chosen = log_probs.gather(1, target[rows])
                    nll -= chosen.sum()
                    if z_loss:  # log-sum-exp = logit - log-probability, of any token
                        log_z = logits[rows].gather(1, target[rows]) - chosen
                        squares += log_z.square().sum()
                    if any(needs):  # the gradient p - onehot takes the place of the logits
                        grad = log_probs.exp_()
                        if z_loss:
                            grad *= 1 + 2 * z_loss * log_z
                        logits[rows] = add_at(grad, target[rows], -1.0)
                if any(needs):
                    grad_h = head.backward(h, logits)
                    if grad_hidden is not None and grad_h is not None:
                        grad_hidden[index] = grad_h.to(grad_hidden.dtype)
        ctx.save_for_backward(grad_hidden, *head.gradients())
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        num_targets = (targets != ignore_index).sum()
        ctx.mark_non_differentiable(nll, num_targets)
        return nll + z_loss * squares if z_loss else nll.clone(), nll, num_targets

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else grad_hidden * grad_loss.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_loss).to(weight_dtype),
            None if grad_bias is None else (grad_bias * grad_loss).to(bias_dtype),
            *(None,) * 6,
        )
