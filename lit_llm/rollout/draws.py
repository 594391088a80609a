"""Drawing tokens, each row with random numbers of its own.

Legend: B batch, R response, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llm.errors import UserError
from lit_llm.rollout.generation import GenerationConfig

_BLOCK = 256  # tokens whose probabilities are summed first
_BELOW_ONE = 1 - 2.0**-40  # times a sum it stays below the sum, whatever is rounded


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """Random numbers (B, count) in [0, 1), float64; row i depends on ``seeds[i]`` only.

    The first numbers of a row are the same whatever ``count`` is.
    """
    rows = torch.empty(len(seeds), count, dtype=torch.float64)
    generator = torch.Generator()
    for row, seed in zip(rows, seeds, strict=True):
        generator.manual_seed(seed)
        torch.rand(count, dtype=torch.float64, generator=generator, out=row)
    return rows.clamp_(max=_BELOW_ONE)


def choose(logits: Tensor, config: GenerationConfig, uniform: Tensor) -> Tensor:
    """The token of each row at a point of its cumulative distribution.

    Args:
        logits: (B, V).
        config: Temperature, ``top_k`` and ``top_p``.
        uniform: (B, 1) the points, as :func:`uniforms` makes them.

    Returns:
        (B,) token ids; never one of probability 0.

    Raises:
        UserError: A logit is NaN or infinite.
    """
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    weights = _weights(logits, config)
    # Two steps, since a sum over the vocabulary, one by one, is slow: the block of tokens that
    # holds the point, then the token in it. Each is the first whose cumulative weight exceeds the
    # point, so its own weight is not 0.
    short = -weights.shape[1] % _BLOCK
    weights = F.pad(weights, (0, short)) if short else weights
    blocks = weights.unflatten(1, (-1, _BLOCK))
    edges = blocks.sum(dim=2).cumsum(dim=1, dtype=torch.float64)
    if not bool(edges[:, -1].isfinite().all()):
        raise UserError(
            "rollout: the policy's logits are no finite numbers, so its weights are broken; go on "
            "from an earlier checkpoint (--resume PATH) with a lower learning rate "
            "(model.optimizer.init_args.lr) and trainer.gradient_clip_val 1.0"
        )
    point = uniform * edges[:, -1:]
    block = torch.searchsorted(edges, point, right=True)
    index = block[:, :, None].expand(-1, -1, _BLOCK)
    inner = blocks.gather(1, index).squeeze(1).cumsum(dim=1, dtype=torch.float64)
    # Counted from the block's end: its two sums may differ in the last digits.
    point = (inner[:, -1:] - (edges.gather(1, block) - point)).clamp_(min=0.0)
    within = torch.searchsorted(inner, point, right=True)
    return (block * _BLOCK + within).squeeze(1)


def _weights(logits: Tensor, config: GenerationConfig) -> Tensor:
    """Probabilities (B, V), float32; 0 outside ``top_k`` and ``top_p``, and then not normalised."""
    if config.temperature != 1:
        logits = logits.float() / config.temperature
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32)
    if config.top_k is not None and config.top_k < weights.shape[1]:
        top = weights.topk(config.top_k, dim=-1)
        weights = torch.zeros_like(weights).scatter_(1, top.indices, top.values)
    if config.top_p < 1:
        ranked, order = weights.sort(dim=-1, descending=True)
        total = ranked.cumsum(dim=-1, dtype=torch.float64)
        ranked = ranked.masked_fill(total - ranked >= config.top_p * total[:, -1:], 0.0)
        weights = torch.zeros_like(weights).scatter_(1, order, ranked)
    return weights
