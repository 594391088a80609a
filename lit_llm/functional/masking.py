"""Targets and attention masks for language modelling.

Legend: B batch, T sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_llm.functional.language_model import IGNORE_INDEX


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
