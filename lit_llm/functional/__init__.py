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
from lit_llm.functional.policy_gradient import kl_estimate
from lit_llm.functional.preference import (
    DPOLoss,
    PreferenceLoss,
    bradley_terry_loss,
    dpo_loss,
)

__all__ = [
    "IGNORE_INDEX",
    "DPOLoss",
    "LinearCrossEntropy",
    "PreferenceLoss",
    "block_diagonal_causal_mask",
    "bradley_terry_loss",
    "dpo_loss",
    "kl_estimate",
    "linear_cross_entropy",
    "logits_cross_entropy",
    "logits_statistics",
    "neftune_noise",
    "segment_lengths",
    "shift_labels",
    "token_log_probs",
    "token_statistics",
]
