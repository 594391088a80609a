"""Forward passes of causal language models that never build all logits.

Legend: B batch, T sequence, D width, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_llm.errors import UserError
from lit_llm.functional import (
    IGNORE_INDEX,
    LinearCrossEntropy,
    block_diagonal_causal_mask,
    linear_cross_entropy,
    logits_cross_entropy,
    logits_log_probs_and_entropy,
    logits_statistics,
    shift_labels,
    token_log_probs,
    token_statistics,
)
from lit_llm.models.adapters import unwrap
from lit_llm.models.padding_free import PaddingFree, without_padding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Config fields that change the logits after (or the hidden states before) the output projection,
# with the values that change nothing. Gemma, Cohere, Granite, Falcon-H1, RecurrentGemma, xLSTM,
# MiniCPM3, HyperCLOVA, Inkling; a router's balancing loss is added by the model's own forward.
_HEAD_FIELDS: dict[str, tuple[Any, ...]] = {
    "final_logit_softcapping": (None,),
    "logits_soft_cap": (None,),
    "output_logit_soft_cap": (None,),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "lm_head_multiplier": (None, 1.0),
    "logits_mup_width_multiplier": (None, 1.0),
    "unpadded_vocab_size": (None,),
    "output_router_logits": (None, False),
}


def supports_fused_head(model: nn.Module) -> bool:
    """Whether the logits are exactly ``hidden_states @ weight.T + bias``.

    They are not where a model caps or scales its logits, adds a router loss, puts more than one
    layer after the backbone, adapts the output projection (LoRA on it) or brings its own code.
    Those models take the path over full logits.
    """
    base = unwrap(model)
    head = getattr(base, "lm_head", None)
    layer = getattr(head, "original_module", head)  # of a head that peft trains whole
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
        return False
    if head is not base.get_output_embeddings() or base.base_model is base:
        return False
    # Asked of the function, since strategies put classes of their own on top of transformers'.
    if not type(base).forward.__module__.startswith("transformers."):
        return False
    if _is_prompt_learning(model):
        return False
    text_config = base.config.get_text_config()
    return all(getattr(text_config, name, None) in ok for name, ok in _HEAD_FIELDS.items())


def output_head(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (V, D) and bias (V,) of the output projection; the weight may be the embedding."""
    head = unwrap(model).get_output_embeddings()
    return head.weight, head.bias


def hidden_states(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Hidden states after the final norm, by the model's backbone.

    Args:
        model: A transformers causal language model, possibly wrapped by peft.
        input_ids: (B, T) token ids.
        attention_mask: (B, T), 1 for real tokens and 0 for padding on either side.
        position_ids: (B, T); by default counted over the real tokens, so that padding on the left
            does not shift them.
        document_ids: (B, T); attention stays within runs of equal ids, and negative ids are
            padding. Needs ``position_ids`` that begin at 0 in every document.

    Returns:
        (B, T, D) hidden states; of no meaning at padding.

    Raises:
        UserError: Documents cannot be isolated in this architecture.
    """
    hidden, packed = _hidden_rows(model, input_ids, attention_mask, position_ids, document_ids)
    return packed.restore(hidden) if packed else hidden.view(*input_ids.shape, -1)


def causal_lm_loss(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> LinearCrossEntropy:
    """Summed next-token loss of a batch; shifts the labels, once.

    Args:
        model: A transformers causal language model, possibly wrapped by peft.
        input_ids: (B, T) token ids.
        labels: (B, T) aligned with ``input_ids``; -100 where there is no loss.
        attention_mask: (B, T), 1 for real tokens.
        position_ids: (B, T) positions.
        document_ids: (B, T) documents to isolate from each other.
        z_loss: Coefficient of the z-loss.
        chunk_size: Rows of logits held at once, where the model allows chunks.

    Returns:
        Sums over the target tokens of the batch, in nats.

    Raises:
        UserError: Documents cannot be isolated in this architecture.
    """
    targets = _targets(labels, attention_mask, document_ids).flatten()
    masks = (attention_mask, position_ids, document_ids)
    if supports_fused_head(model):
        hidden, packed = _hidden_rows(model, input_ids, *masks)
        weight, bias = output_head(model)
        return linear_cross_entropy(
            hidden,
            weight,
            targets[packed.places] if packed else targets,
            bias=bias,
            z_loss=z_loss,
            chunk_size=chunk_size,
        )
    output, packed = _full_output(model, input_ids, *masks)
    targets = targets[packed.places] if packed else targets
    result = logits_cross_entropy(output.logits.flatten(0, 1), targets, z_loss=z_loss)
    aux_loss = getattr(output, "aux_loss", None)
    if aux_loss is not None and model.training:
        # Per token, like the rest: dividing by the tokens gives back transformers' own loss.
        coefficient = unwrap(model).config.get_text_config().router_aux_loss_coef
        result = result._replace(loss=result.loss + coefficient * aux_loss * result.num_targets)
    return result


@torch.no_grad()
def causal_lm_statistics(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Negative log-likelihood and correctness of every next token, for evaluation.

    Args:
        model: A transformers causal language model, possibly wrapped by peft.
        input_ids: (B, T) token ids.
        labels: (B, T) aligned with ``input_ids``; -100 where there is no loss.
        attention_mask: (B, T), 1 for real tokens.
        position_ids: (B, T) positions.
        document_ids: (B, T) documents to isolate from each other.
        chunk_size: Rows of logits held at once, where the model allows chunks.

    Returns:
        ``nll`` (B, T) float32 in nats, ``correct`` (B, T) bool and ``is_target`` (B, T) bool, at
        the position that predicts; 0 and False where there is no target.

    Raises:
        UserError: Documents cannot be isolated in this architecture.
    """
    targets = _targets(labels, attention_mask, document_ids)
    masks = (attention_mask, position_ids, document_ids)
    if supports_fused_head(model):
        hidden, packed = _hidden_rows(model, input_ids, *masks)
        rows = targets.flatten()[packed.places] if packed else targets.flatten()
        weight, bias = output_head(model)
        nll, correct = token_statistics(hidden, weight, rows, bias=bias, chunk_size=chunk_size)
    else:
        output, packed = _full_output(model, input_ids, *masks)
        rows = targets.flatten()[packed.places] if packed else targets.flatten()
        nll, correct = logits_statistics(output.logits.flatten(0, 1), rows)
    if packed:
        nll, correct = packed.restore(nll), packed.restore(correct)
    return nll.view_as(targets), correct.view_as(targets), targets != IGNORE_INDEX


def causal_lm_log_probs(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probability of every next token that ``labels`` choose; differentiable.

    Args:
        model: A transformers causal language model, possibly wrapped by peft.
        input_ids: (B, T) token ids.
        labels: (B, T) aligned with ``input_ids``; -100 where none is asked for.
        attention_mask: (B, T), 1 for real tokens.
        temperature: Sampling temperature the logits are divided by.
        chunk_size: Rows of logits held at once, where the model allows chunks.

    Returns:
        (B, T) float32 in nats, at the position that predicts; 0 where none is asked for.
    """
    targets = _targets(labels, attention_mask, None)
    if supports_fused_head(model):
        hidden, packed = _hidden_rows(model, input_ids, attention_mask, None, None)
        rows = targets.flatten()[packed.places] if packed else targets.flatten()
        weight, bias = output_head(model)
        result = token_log_probs(
            hidden, weight, rows, bias=bias, temperature=temperature, chunk_size=chunk_size
        )
    else:
        output, packed = _full_output(model, input_ids, attention_mask, None, None)
        rows = targets.flatten()[packed.places] if packed else targets.flatten()
        logits = output.logits.flatten(0, 1)
        result, _ = logits_log_probs_and_entropy(logits, rows, temperature=temperature)
    return (packed.restore(result) if packed else result).view_as(targets)


def full_logits(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) and hidden states (B, T, D) of a model whose head is more than a matrix."""
    output, packed = _full_output(
        model, input_ids, attention_mask, None, None, output_hidden_states=True
    )
    logits, hidden = output.logits, output.hidden_states[-1]
    if packed:
        logits, hidden = (packed.restore(value.flatten(0, 1)) for value in (logits, hidden))
    return logits, hidden


def _targets(labels: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None) -> Tensor:
    """(B, T) targets; padding predicts nothing, not even the first token after it."""
    targets = shift_labels(labels)
    if attention_mask is not None:
        targets = targets.masked_fill(attention_mask == 0, IGNORE_INDEX)
    if document_ids is not None:
        targets = targets.masked_fill(document_ids < 0, IGNORE_INDEX)
    return targets


def _hidden_rows(
    model: nn.Module, input_ids: Tensor, *masks: Tensor | None
) -> tuple[Tensor, PaddingFree | None]:
    """Hidden states (B * T, D); or (N, D) of the real tokens, and where those were."""
    backbone = unwrap(model).base_model
    inputs, packed = _inputs(model, backbone, input_ids, *masks)
    return backbone(**inputs)[0].flatten(0, 1), packed


def _full_output(
    model: nn.Module, input_ids: Tensor, *masks: Tensor | None, **wanted: bool
) -> tuple[Any, PaddingFree | None]:
    """The model's own output, for all tokens or for the real ones."""
    base = model if _is_prompt_learning(model) else unwrap(model)
    inputs, packed = _inputs(model, base, input_ids, *masks)
    return base(**inputs, **wanted), packed


def _inputs(
    model: nn.Module,
    callee: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    document_ids: Tensor | None,
) -> tuple[dict[str, Any], PaddingFree | None]:
    if document_ids is not None:
        _check_isolation(unwrap(model), position_ids)
    packed = None
    if _takes_one_row(model):
        packed = _pack(model, input_ids, attention_mask, position_ids, document_ids)
    if packed is not None:
        input_ids, position_ids = packed.input_ids, packed.position_ids
        attention_mask = None
    elif document_ids is not None:
        if attention_mask is not None:  # padding sees itself and is seen by no document
            document_ids = document_ids.masked_fill(attention_mask == 0, -1)
        attention_mask = _isolating_mask(unwrap(model), document_ids)
    elif attention_mask is not None and position_ids is None:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    # A cache would cost memory and switch off transformers' own detection of packed documents.
    inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    if position_ids is not None and _accepts(callee, "position_ids"):
        inputs["position_ids"] = position_ids
    return inputs, packed


def _takes_one_row(model: nn.Module) -> bool:
    """Whether attention knows documents by their positions only, and in a single row only."""
    return "flash" in (unwrap(model).config.get_text_config()._attn_implementation or "")


def _pack(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    document_ids: Tensor | None,
) -> PaddingFree | None:
    """The batch without padding; ``None`` where nothing asks for it or it would mix the rows."""
    if document_ids is None:
        # With positions of the caller's own, transformers takes out the padding in each layer.
        own = attention_mask is None or position_ids is not None
        base = unwrap(model)
        if own or _is_prompt_learning(model) or not _isolates(base):
            return None
        document_ids = torch.zeros_like(input_ids)
    if attention_mask is not None:
        document_ids = document_ids.masked_fill(attention_mask == 0, -1)
    return without_padding(input_ids, document_ids)


def _isolates(model: PreTrainedModel) -> bool:
    return not _carries_state(model) and _accepts(model.base_model, "position_ids")


def _carries_state(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ()) | {"full_attention"}
    stateful = getattr(model, "_is_stateful", False)
    return bool(stateful or layers - {"full_attention", "sliding_attention"})


def _check_isolation(model: PreTrainedModel, position_ids: Tensor | None) -> None:
    name = type(model).__name__
    if _carries_state(model):
        raise UserError(
            f"{name} has layers without attention, which carry their state from one document to "
            "the next; turn isolate_documents off."
        )
    if position_ids is None or not _accepts(model.base_model, "position_ids"):
        raise UserError(
            f"isolating documents needs positions that begin anew in each, which {name} does not "
            "take or was not given; turn isolate_documents off."
        )


def _isolating_mask(model: PreTrainedModel, document_ids: Tensor) -> Tensor | None:
    config = model.config.get_text_config()
    attention = config._attn_implementation
    if "flex" in attention or getattr(config, "sliding_window", None):
        # FlexAttention takes no such mask, and sliding windows need one more: there transformers
        # finds the documents by their positions, in each row.
        _check_mask_is_made(attention)
        return None
    mask = block_diagonal_causal_mask(document_ids)
    if attention != "eager":
        return mask
    # Eager attention adds its mask to the scores.
    lowest = torch.finfo(model.dtype).min
    return torch.zeros_like(mask, dtype=model.dtype).masked_fill_(~mask, lowest)


def _check_mask_is_made(attention: str) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    if attention not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
        raise UserError(
            f"attn_implementation={attention} brings no masks for sliding windows; use sdpa, or "
            "turn isolate_documents off."
        )


def _accepts(module: nn.Module, parameter: str) -> bool:
    return parameter in inspect.signature(module.forward).parameters


def _is_prompt_learning(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))
