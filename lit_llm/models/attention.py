"""Makes ``attn_implementation: blocked`` known to transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_llm.functional.attention import blocked_causal_attention

BLOCKED = "blocked"
"""Name of the implementation in a transformers config."""


def register_blocked_attention() -> None:
    """Register the implementation, and with it SDPA's masks; may be called again."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(BLOCKED, blocked_attention)
    AttentionMaskInterface.register(BLOCKED, sdpa_mask)


def blocked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Blocked attention where it is the faster one, transformers' SDPA everywhere else.

    It is faster in training in bfloat16 on a CPU, without a mask (isolated documents and padding
    have one) and without dropout.

    Args:
        module: The attention layer.
        query: (B, H, T, D).
        key: (B, K, S, D).
        value: (B, K, S, D).
        attention_mask: Mask of transformers; ``None`` where plain causal attention is meant.
        dropout: Probability of dropout on the attention weights.
        scaling: Factor of the scores.
        is_causal: Overrides the layer's own ``is_causal``.
        **kwargs: What transformers hands to every implementation.

    Returns:
        Output (B, T, H, D), and no attention weights.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    if (
        causal
        and attention_mask is None
        and dropout == 0.0
        and torch.is_grad_enabled()
        and query.device.type == "cpu"
        and dtype == torch.bfloat16
        and key.shape == value.shape
        and query.shape[2:] == key.shape[2:]
    ):
        out = blocked_causal_attention(
            query.to(dtype), key.to(dtype), value.to(dtype), scale=scaling
        )
        return out.transpose(1, 2), None

    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    result: tuple[Tensor, None] = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )
    return result
