"""Targets and attention masks for language modelling, and sums under a mask.

Legend: B batch, T sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_llm.functional.language_model import IGNORE_INDEX
from lit_llm.functional.linear_head import accumulation_dtype


def shift_labels(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """The target of each position: the label one to its right.

    Labels follow the Hugging Face convention (aligned with the inputs), so this is the one place
    where they are shifted.

    Args:
        labels: (B, T) long, aligned with the input tokens.
        ignore_index: Target of the last position, which has nothing to predict.

    Returns:
        (B, T) long targets.
    """
    targets = torch.full_like(labels, ignore_index)
    targets[:, :-1] = labels[:, 1:]
    return targets


def block_diagonal_causal_mask(document_ids: Tensor) -> Tensor:
    """Attention mask that lets each token see earlier tokens of its own document only.

    Resetting the positions alone does not isolate packed documents: attention still reaches across.
    Every token sees itself, padding included, so no row of the softmax is empty (an empty one gives
    NaN in scaled dot-product attention).

    Args:
        document_ids: (B, T) long; equal neighbours belong to one document. Any value marks padding
            as long as no document uses it.

    Returns:
        (B, 1, T, T) bool, True where the query (third axis) may attend to the key (fourth).
    """
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same.tril()


def segment_lengths(segments: Tensor) -> Tensor:
    """How many tokens of its row share each token's segment.

    Args:
        segments: (B, T) long, from 0 on; negative marks padding.

    Returns:
        (B, T) long, 0 at padding.
    """
    real = segments >= 0
    index = segments.clamp(min=0)
    size = int(index.max()) + 1 if index.numel() else 1
    counts = torch.zeros(len(segments), size, dtype=torch.long, device=segments.device)
    counts.scatter_add_(1, index, real.long())
    return counts.gather(1, index) * real


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the values where the mask is not 0.

    What lies outside the mask takes no part at all, not even NaN or infinity: they would survive a
    product with 0, in the sum and in its gradient.

    Args:
        values: Any shape.
        mask: The same shape, bool or numbers.
        dim: Axis to sum over; by default all.

    Returns:
        float32 (float64 for float64 values); 0 where the mask is empty.

    Raises:
        ValueError: Shapes that differ.
    """
    if values.shape != mask.shape:
        raise ValueError(
            f"values and mask must have one shape, not {tuple(values.shape)} and "
            f"{tuple(mask.shape)}"
        )
    kept = torch.where(mask.bool(), values.to(accumulation_dtype(values.dtype)), 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the values where the mask is not 0; see :func:`masked_sum`.

    Args:
        values: Any shape.
        mask: The same shape, bool or numbers.
        dim: Axis to take the mean over; by default all.

    Returns:
        float32 (float64 for float64 values); 0 where the mask is empty.

    Raises:
        ValueError: Shapes that differ.
    """
    total = masked_sum(values, mask, dim)
    counted = mask.bool()
    count = counted.sum() if dim is None else counted.sum(dim)
    return total / count.clamp(min=1)
