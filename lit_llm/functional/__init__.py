"""Formulas: tensors in, tensors out. Imports torch only."""

from lit_llm.functional.language_model import (
    IGNORE_INDEX,
    LinearCrossEntropy,
    linear_cross_entropy,
    logits_cross_entropy,
    logits_statistics,
    token_log_probs,
    token_statistics,
)
from lit_llm.functional.masking import (
    block_diagonal_causal_mask,
    segment_lengths,
    shift_labels,
)
from lit_llm.functional.noise import neftune_noise

__all__ = [
    "IGNORE_INDEX",
    "LinearCrossEntropy",
    "block_diagonal_causal_mask",
    "linear_cross_entropy",
    "logits_cross_entropy",
    "logits_statistics",
    "neftune_noise",
    "segment_lengths",
    "shift_labels",
    "token_log_probs",
    "token_statistics",
]
