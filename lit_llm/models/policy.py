"""What a policy and its critic say about sampled responses.

Legend: B rows, T prompt and response, R response, D width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from lit_llm.functional import (
    IGNORE_INDEX,
    logits_log_probs_and_entropy,
    token_log_probs_and_entropy,
)
from lit_llm.models.forward import (
    full_logits,
    hidden_states,
    output_head,
    supports_fused_head,
)


class PolicyOutput(NamedTuple):
    """A policy's view of responses, one value a sampled token; 0 elsewhere.

    Attributes:
        logprobs: (B, R) float32 log-probability of each token, in nats.
        entropy: (B, R) float32 entropy of the distribution it was sampled from, in nats.
        hidden: (B, R, D) hidden states that each token was sampled from; of no meaning where there
            is no token.
    """

    logprobs: Tensor
    entropy: Tensor
    hidden: Tensor


def policy_output(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    *,
    temperature: float = 1.0,
) -> PolicyOutput:
    """Log-probabilities and entropies of sampled responses; differentiable.

    Only the positions that predict a sampled token go through the output head.

    Args:
        model: A transformers causal language model, possibly wrapped by peft.
        input_ids: (B, T) prompts padded on the left, then responses padded on the right.
        attention_mask: (B, T), 1 for real tokens.
        response_mask: (B, R), 1 for sampled tokens, the one that ends a response included. The
            response is the last R of the T columns.
        temperature: Sampling temperature the logits are divided by.

    Returns:
        The policy's view of the R columns.
    """
    width = response_mask.shape[1]
    targets = input_ids[:, -width:].masked_fill(response_mask == 0, IGNORE_INDEX)
    rows = targets.flatten()
    if supports_fused_head(model):
        hidden = _before_tokens(hidden_states(model, input_ids, attention_mask), width)
        weight, bias = output_head(model)
        logprobs, entropy = token_log_probs_and_entropy(
            hidden.flatten(0, 1), weight, rows, bias=bias, temperature=temperature
        )
    else:
        logits, states = full_logits(model, input_ids, attention_mask)
        hidden = _before_tokens(states, width)
        logits = _before_tokens(logits, width).flatten(0, 1)
        logprobs, entropy = logits_log_probs_and_entropy(logits, rows, temperature=temperature)
    return PolicyOutput(logprobs.view_as(targets), entropy.view_as(targets), hidden)


def _before_tokens(values: Tensor, width: int) -> Tensor:
    """The columns that predict the last ``width`` tokens."""
    return values[:, -width - 1 : -1]
