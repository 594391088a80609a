"""Builds or loads the transformers model that a :class:`BaseModelConfig` describes."""

from __future__ import annotations

import difflib
import sys
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lit_llm.errors import UserError
from lit_llm.models.attention import BLOCKED, register_blocked_attention
from lit_llm.models.buffers import keep_buffer_dtypes
from lit_llm.models.config import BaseModelConfig
from lit_llm.models.presets import preset_config
from lit_llm.models.pretrained import (
    Quantization,
    attention_error,
    load_config,
    load_model,
    one_line,
)
from lit_llm.models.score_head import (
    ask_for_heads,
    auto_class,
    initialise_head,
    is_classifier_config,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Config fields that hold a dropout probability of the decoder, over all architectures.
_DROPOUT_FIELDS = (
    "attention_dropout",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "resid_dropout",
    "embed_dropout",
    "residual_dropout",
    "embedding_dropout",
    "dropout",
    "activation_dropout",
)
_TOO_SMALL = (
    "use the tokenizer that came with the model, or set resize_embeddings to give the model a row "
    "for each new token."
)
# Keys that transformers reads without having an attribute for them.
_HIDDEN_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor", "head_dim", "auto_map"}


def build_model(
    config: BaseModelConfig,
    *,
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    seq_len: int | None = None,
    quantization: Quantization | None = None,
    heads: int | None = None,
) -> PreTrainedModel:
    """The model of ``config``, fitted to a tokenizer and a sequence length.

    Random weights come from torch's global generator: seed it before. ``config.compile`` is left
    to :func:`lit_llm.models.compile_blocks`, since strategies wrap the blocks first.

    Args:
        config: What to build or load.
        vocab_size: Token ids the tokenizer can produce (see :func:`vocabulary_of`). Decides the
            embedding of a preset or config that names no size; otherwise it must fit in.
        pad_token_id: Id of the padding token, written to the config and the generation config.
        bos_token_id: Id of the token that begins a text, written likewise.
        eos_token_id: Id of the token that ends a text, written likewise.
        seq_len: Longest sequence to be fed.
        quantization: Load pretrained weights in 4 bits, to train adapters on; a CUDA device only.
        heads: How many scores of a whole text the model gives, in place of the logits of tokens
            (see :func:`lit_llm.models.build_reward_model`); ``None`` for a language model.

    Returns:
        The model in train mode on the CPU (or the default device).

    Raises:
        UserError: The model cannot be built, found or loaded, does not fit the tokenizer or the
            sequence length, or lacks what the config asks for.
    """
    ids = {"pad": pad_token_id, "bos": bos_token_id, "eos": eos_token_id}
    hf_config = _loaded_config(config, vocab_size, ids, seq_len, heads)
    new_head = heads is not None and not (config.pretrained and is_classifier_config(hf_config))
    _keep_bars_out_of_logs()
    if config.attn_implementation == BLOCKED:
        register_blocked_attention()
    options = {
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": config.attn_implementation,
    }
    if config.pretrained:
        model = load_model(config, hf_config, options, quantization, heads is not None)
    elif quantization is not None:
        raise UserError("only a pretrained model can be quantized (method: qlora).")
    else:
        options |= {"trust_remote_code": config.trust_remote_code}
        model = _create(hf_config, options, heads is not None)
    if new_head:
        initialise_head(model)
    rows = cast("nn.Embedding", model.get_input_embeddings()).weight.shape[0]
    if vocab_size is not None and rows < vocab_size:
        if not _may_grow(config):
            raise UserError(
                f"the tokenizer has {vocab_size} tokens, but the embedding of {_name(config)} only "
                f"{rows} rows; {_TOO_SMALL}"
            )
        # New rows near the mean of the old ones: rows of the initialiser's size can take much of
        # the probability (J. Hewitt, "Initializing new word embeddings", 2021).
        model.resize_token_embeddings(vocab_size, mean_resizing=True)
        setattr(model, "grown_embedding", True)  # noqa: B010 - save_adapter keeps the new rows
    _set_special_ids(model, ids)
    keep_buffer_dtypes(model)
    if config.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(
                f"{type(model).__name__} does not support gradient checkpointing; turn "
                "gradient_checkpointing off."
            )
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.x on
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model.train()


def count_parameters(config: BaseModelConfig) -> int:
    """How many parameters the model of a config has; nothing of it is loaded."""
    with torch.device("meta"):
        model = _create(resolve_config(config), {}, classifier=False)
    return int(model.num_parameters())


def _keep_bars_out_of_logs() -> None:
    """Where there is no screen, transformers' progress bars would fill the log."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def resolve_config(
    config: BaseModelConfig,
    *,
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    seq_len: int | None = None,
    heads: int | None = None,
) -> PretrainedConfig:
    """The transformers config of the model that :func:`build_model` would build, without weights.

    Args:
        config: What to build or load.
        vocab_size: Token ids the tokenizer can produce.
        pad_token_id: Id of the padding token.
        bos_token_id: Id of the token that begins a text.
        eos_token_id: Id of the token that ends a text.
        seq_len: Longest sequence to be fed.
        heads: How many scores a reward model gives; ``None`` for a language model.

    Returns:
        A config of the caller's own.

    Raises:
        UserError: As for :func:`build_model`, as far as it shows without weights.
    """
    ids = {"pad": pad_token_id, "bos": bos_token_id, "eos": eos_token_id}
    hf_config = _loaded_config(config, vocab_size, ids, seq_len, heads)
    text_config = hf_config.get_text_config()
    if vocab_size is not None and text_config.vocab_size < vocab_size:
        text_config.vocab_size = vocab_size
    return hf_config


def _loaded_config(
    config: BaseModelConfig,
    vocab_size: int | None,
    ids: dict[str, int | None],
    seq_len: int | None,
    heads: int | None,
) -> PretrainedConfig:
    """The config before the embedding grows, with which the weights of a checkpoint are read."""
    config.validate()
    if config.pretrained:
        hf_config = load_config(config)
    else:
        values = dict(config.config or {})
        if config.preset and "model_type" not in values:
            values = preset_config(config.preset) | values
        if vocab_size is not None:  # the defaults of transformers belong to another tokenizer
            own: dict[str, Any] = {f"{name}_token_id": value for name, value in ids.items()}
            values = own | {"vocab_size": vocab_size} | values
        hf_config = _config_from_dict(values, seq_len)
    known = hf_config.get_text_config().vocab_size
    if vocab_size is not None and known < vocab_size and not _may_grow(config):
        raise UserError(
            f"the tokenizer has {vocab_size} tokens, but {_name(config)} a vocabulary of only "
            f"{known}; "
            + (
                _TOO_SMALL
                if config.pretrained
                else "leave vocab_size out of the model's config, or train a smaller tokenizer."
            )
        )
    positions = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    if seq_len is not None and isinstance(positions, int) and positions < seq_len:
        raise UserError(
            f"the sequence length {seq_len} is above the {positions} positions of {_name(config)}; "
            f"use a sequence length of at most {positions}, or a model with more positions."
        )
    if config.dropout is not None:
        _set_dropout(hf_config.get_text_config(), config.dropout)
    if heads is not None:
        ask_for_heads(hf_config, heads, _name(config))
    elif config.pretrained and is_classifier_config(hf_config):
        # With a tied embedding it has all that a language model needs, and says nothing sensible.
        raise UserError(f"{_name(config)} scores texts; give a causal language model.")
    return hf_config


def config_fields(config: PretrainedConfig) -> dict[str, Any]:
    """A config as plain data that ``BaseModelConfig.config`` takes.

    Published configs hold fields of other programs, which are left out.
    """
    default, values = type(config)(), config.to_dict()
    return {k: v for k, v in values.items() if hasattr(default, k) or k in _HIDDEN_KEYS}


def _config_from_dict(values: dict[str, Any], seq_len: int | None) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    values = dict(values)
    model_type = str(values.pop("model_type", None))
    known = {c.model_type for c in AutoModelForCausalLM._model_mapping if c.model_type}
    if model_type not in known:
        near = difflib.get_close_matches(model_type, sorted(known), n=3)
        raise UserError(
            f"model_type {model_type!r} is no causal language model of transformers; "
            + (f"did you mean {', '.join(near)}?" if near else "use e.g. llama, qwen3 or gpt2.")
        )
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    unknown = [key for key in values if not hasattr(default, key) and key not in _HIDDEN_KEYS]
    if unknown:
        fields = sorted(set(default.to_dict()) | set(default.attribute_map))
        hints = []
        for key in unknown:
            near = difflib.get_close_matches(key, fields, n=1)
            hints.append(f"{key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
        raise UserError(f"the config of {model_type} has no field {', '.join(hints)}.")
    positions = {"max_position_embeddings", default.attribute_map.get("max_position_embeddings")}
    limited = hasattr(default, "max_position_embeddings")
    if seq_len is not None and limited and positions.isdisjoint(values):
        values["max_position_embeddings"] = seq_len
    try:
        return config_class(**values)
    except Exception as error:  # transformers raises many kinds, none of them common
        raise UserError(f"the config of {model_type} is not valid: {one_line(error)}") from error


def _create(
    hf_config: PretrainedConfig, options: dict[str, Any], classifier: bool
) -> PreTrainedModel:
    try:
        created: PreTrainedModel = auto_class(classifier).from_config(hf_config, **options)
        return created
    except (ValueError, ImportError, TypeError, RuntimeError, AssertionError) as error:
        raise attention_error(hf_config.model_type, options, error) or UserError(
            f"transformers cannot build this {hf_config.model_type} model: {one_line(error)}"
        ) from error


def _set_dropout(hf_config: PretrainedConfig, dropout: float) -> None:
    fields = [
        name for name in _DROPOUT_FIELDS if isinstance(getattr(hf_config, name, None), int | float)
    ]
    if not fields and dropout:
        raise UserError(f"{hf_config.model_type} models have no dropout; leave dropout out.")
    for name in fields:
        setattr(hf_config, name, dropout)


def _set_special_ids(model: PreTrainedModel, ids: dict[str, int | None]) -> None:
    """Writes the tokenizer's ids where generation and training read them."""
    targets: list[Any] = [model.config, model.config.get_text_config()]
    if model.can_generate():  # a reward model does not
        targets.append(model.generation_config)
    for target in targets:
        for name, value in ids.items():
            old = getattr(target, f"{name}_token_id", None)
            # A chat model may stop at several tokens; the tokenizer knows only one of them.
            if value is not None and not (isinstance(old, list) and value in old):
                setattr(target, f"{name}_token_id", value)
    embedding = cast("nn.Embedding", model.get_input_embeddings())
    if embedding.padding_idx is not None and embedding.padding_idx in (ids["bos"], ids["eos"]):
        # Otherwise a token that is more than padding gets no gradient.
        embedding.padding_idx = None


def _may_grow(config: BaseModelConfig) -> bool:
    return bool(config.pretrained) and config.resize_embeddings


def _name(config: BaseModelConfig) -> str:
    if config.pretrained:
        return f"the model {config.pretrained!r}"
    return "the model's config" if config.config else f"the preset {config.preset}"
