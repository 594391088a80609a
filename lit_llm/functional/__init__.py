"""Formulas: tensors in, tensors out. Imports torch only."""

from lit_llm.functional.advantages import (
    explained_variance,
    gae,
    group_advantages,
    token_rewards,
    whiten,
)
from lit_llm.functional.language_model import (
    IGNORE_INDEX,
    LinearCrossEntropy,
    linear_cross_entropy,
    logits_cross_entropy,
    logits_statistics,
    token_statistics,
)
from lit_llm.functional.log_probs import (
    logits_log_probs_and_entropy,
    token_log_probs,
    token_log_probs_and_entropy,
)
from lit_llm.functional.masking import (
    block_diagonal_causal_mask,
    masked_mean,
    masked_sum,
    segment_lengths,
    shift_labels,
)
from lit_llm.functional.noise import neftune_noise
from lit_llm.functional.policy_gradient import (
    PolicyLoss,
    ValueLoss,
    adapted_kl_coef,
    kl_estimate,
    policy_loss,
    value_loss,
)
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
    "PolicyLoss",
    "PreferenceLoss",
    "ValueLoss",
    "adapted_kl_coef",
    "block_diagonal_causal_mask",
    "bradley_terry_loss",
    "dpo_loss",
    "explained_variance",
    "gae",
    "group_advantages",
    "kl_estimate",
    "linear_cross_entropy",
    "logits_cross_entropy",
    "logits_log_probs_and_entropy",
    "logits_statistics",
    "masked_mean",
    "masked_sum",
    "neftune_noise",
    "policy_loss",
    "segment_lengths",
    "shift_labels",
    "token_log_probs",
    "token_log_probs_and_entropy",
    "token_rewards",
    "token_statistics",
    "value_loss",
    "whiten",
]
