"""Noise on token embeddings, against overfitting in fine-tuning.

Legend: B batch, T sequence, D width, L tokens of a sample.
"""

from __future__ import annotations

import torch
from torch import Tensor


def neftune_noise(embeddings: Tensor, lengths: Tensor, alpha: float) -> Tensor:
    """Embeddings with uniform noise: NEFTune, Jain et al. 2023, https://arxiv.org/abs/2310.05914.

    ``embeddings + alpha / sqrt(L D) * U(-1, 1)``, drawn from torch's global generator. L is the
    length of the token's own sample, so neither padding nor what shares the row changes the noise.

    Args:
        embeddings: (B, T, D).
        lengths: (B, T) long, L of each token's sample; 0 at padding, which gets no noise.
        alpha: Strength of the noise, 5 in most of the paper.

    Returns:
        (B, T, D) in the dtype of ``embeddings``, with gradient 1 towards them.

    Raises:
        ValueError: When ``lengths`` is not (B, T).
    """
    if lengths.shape != embeddings.shape[:2]:
        raise ValueError(
            f"lengths must be {tuple(embeddings.shape[:2])}, not {tuple(lengths.shape)}"
        )
    # In half precision a uniform number has few values, and 1 / sqrt(L D) is inexact.
    wide = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    sizes = (lengths * embeddings.shape[2]).to(wide)
    scale = torch.where(lengths > 0, alpha * sizes.clamp(min=1).rsqrt(), 0.0)
    noise = torch.empty_like(embeddings, dtype=wide).uniform_(-1, 1)
    return embeddings + (noise * scale[..., None]).to(embeddings.dtype)
