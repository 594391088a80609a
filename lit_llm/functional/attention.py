"""Causal attention in blocks of query rows, as batched matrix products.

On a CPU in bfloat16, torch's fused kernel takes about twice as long as these products do
(docs/performance.md). Memory stays small: the scores of one sequence and one block at a time.

Legend: B batch, H query heads, K key heads (H = G K), T sequence, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def blocked_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    block_rows: int = 256,
) -> Tensor:
    """Softmax attention of every position over itself and those before it.

    Equals ``F.scaled_dot_product_attention(..., is_causal=True, enable_gqa=True)``. Keys after a
    block of queries are skipped, the heads that share a key are one product, and the backward pass
    computes the probabilities a second time instead of keeping them. Scores and probabilities have
    the dtype of the operands; the softmax itself is computed in float32.

    Args:
        query: (B, H, T, D).
        key: (B, K, T, D); H must be a multiple of K.
        value: (B, K, T, D).
        scale: Factor of the scores; ``D ** -0.5`` by default.
        block_rows: Query rows taken at once.

    Returns:
        (B, H, T, D), laid out in memory as (B, T, H, D).

    Raises:
        ValueError: Shapes that do not fit together.
    """
    if query.shape[1] % key.shape[1] or key.shape != value.shape or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} "
            "do not fit together"
        )
    if scale is None:
        scale = query.shape[-1] ** -0.5
    result: Tensor = _attention(query, key, value, scale, block_rows)
    return result


def _blocks(query: Tensor, key: Tensor, block_rows: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Query rows, the keys they may see, and the mask (1, G rows, keys) added to their scores."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    for start in range(0, length, block_rows):
        end = min(length, start + block_rows)
        row = torch.arange(start, end, device=query.device)[:, None]
        column = torch.arange(end, device=query.device)
        mask = query.new_zeros(end - start, end).masked_fill_(column > row, float("-inf"))
        yield slice(start, end), slice(end), mask.repeat(groups, 1)[None]


def _stacked(x: Tensor, rows: slice, heads: int) -> Tensor:
    """(H, T, D) -> (K, G rows, D): the heads that share a key, one below the other."""
    return x[:, rows].reshape(heads, -1, x.shape[-1])


def _probabilities(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
    mask = mask.expand(len(query), -1, -1)
    return torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scale).softmax(dim=-1)


def _like(x: Tensor) -> Tensor:
    """Empty, in the layout that the projections around attention read and write."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(
        1, 2
    )


@torch.library.custom_op("lit_llm::blocked_causal_attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float, block_rows: int) -> Tensor:
    out = _like(query)
    for rows, seen, mask in _blocks(query, key, block_rows):
        for o, q, k, v in zip(out, query, key, value, strict=True):
            probs = _probabilities(_stacked(q, rows, len(k)), k[:, seen], mask, scale)
            o[:, rows] = torch.bmm(probs, v[:, seen]).view_as(o[:, rows])
    return out


@torch.library.custom_op("lit_llm::blocked_causal_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, block_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if key.dtype == torch.float64 else torch.float32
    grad_q = _like(query)
    grad_k, grad_v = _like(key).to(wide).zero_(), _like(value).to(wide).zero_()
    for rows, seen, mask in _blocks(query, key, block_rows):
        for index in range(len(query)):
            k, v = key[index, :, seen], value[index, :, seen]
            q, g = _stacked(query[index], rows, len(k)), _stacked(grad[index], rows, len(k))
            probs = _probabilities(q, k, mask, scale)
            grad_probs = torch.bmm(g, v.transpose(1, 2))
            # The same as probs * (grad_probs - (probs * grad_probs).sum(-1)), in one pass.
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            target = grad_q[index, :, rows]
            target.copy_(torch.bmm(grad_scores, k).mul_(scale).view_as(target))
            grad_k[index, :, seen] += torch.bmm(grad_scores.transpose(1, 2), q)
            grad_v[index, :, seen] += torch.bmm(probs.transpose(1, 2), g)
    return grad_q, grad_k.mul_(scale).to(key.dtype), grad_v.to(value.dtype)


@_attention.register_fake
def _attention_fake(
    query: Tensor, key: Tensor, value: Tensor, scale: float, block_rows: int
) -> Tensor:
    return _like(query)


@_attention_backward.register_fake
def _attention_backward_fake(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, block_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(query), _like(key), _like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, ctx.scale, ctx.block_rows = inputs
    ctx.save_for_backward(query, key, value)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.block_rows)
    return (*grads, None, None)


_attention.register_autograd(_gradients, setup_context=_keep)
