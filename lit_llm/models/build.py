"""Builds or loads the transformers model that a :class:`BaseModelConfig` describes."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lit_llm.errors import UserError
from lit_llm.models.attention import BLOCKED, register_blocked_attention
from lit_llm.models.buffers import keep_buffer_dtypes
from lit_llm.models.config import BaseModelConfig
from lit_llm.models.presets import preset_config

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

    Returns:
        The model in train mode on the CPU (or the default device).

    Raises:
        UserError: The model cannot be built, found or loaded, does not fit the tokenizer or the
            sequence length, or lacks what the config asks for.
    """
    hf_config = resolve_config(
        config,
        vocab_size=vocab_size,
        pad_token_id=pad_token_id,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        seq_len=seq_len,
    )
    if config.attn_implementation == BLOCKED:
        register_blocked_attention()
    options = {
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": config.attn_implementation,
        "trust_remote_code": config.trust_remote_code,
    }
    model = _load(config, hf_config, options) if config.pretrained else _create(hf_config, options)
    rows = cast("nn.Embedding", model.get_input_embeddings()).weight.shape[0]
    if vocab_size is not None and rows < vocab_size:
        raise UserError(
            f"the tokenizer has {vocab_size} tokens, but the embedding of {_name(config)} only "
            f"{rows} rows; use the tokenizer that came with the model."
        )
    _set_special_ids(model, pad_token_id, bos_token_id, eos_token_id)
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


def resolve_config(
    config: BaseModelConfig,
    *,
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    seq_len: int | None = None,
) -> PretrainedConfig:
    """The transformers config of the model that :func:`build_model` would build, without weights.

    Args:
        config: What to build or load.
        vocab_size: Token ids the tokenizer can produce.
        pad_token_id: Id of the padding token.
        bos_token_id: Id of the token that begins a text.
        eos_token_id: Id of the token that ends a text.
        seq_len: Longest sequence to be fed.

    Returns:
        A config of the caller's own.

    Raises:
        UserError: As for :func:`build_model`, as far as it shows without weights.
    """
    config.validate()
    if config.pretrained:
        hf_config = _pretrained_config(config, config.pretrained)
    else:
        values = dict(config.config or {})
        if config.preset and "model_type" not in values:
            values = preset_config(config.preset) | values
        ids = {
            "pad_token_id": pad_token_id,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
        }
        if vocab_size is not None:  # the defaults of transformers belong to another tokenizer
            values = ids | {"vocab_size": vocab_size} | values
        hf_config = _config_from_dict(values, seq_len)
    if vocab_size is not None and hf_config.get_text_config().vocab_size < vocab_size:
        raise UserError(
            f"the tokenizer has {vocab_size} tokens, but {_name(config)} a vocabulary of only "
            f"{hf_config.get_text_config().vocab_size}; "
            + (
                "use the tokenizer that came with the model."
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
    return hf_config


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
        raise UserError(f"the config of {model_type} is not valid: {_one_line(error)}") from error


def _pretrained_config(config: BaseModelConfig, name: str) -> PretrainedConfig:
    from transformers import AutoConfig

    _check_folder(name)
    try:
        return AutoConfig.from_pretrained(
            _expand(name), revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise _loading_error(name, error) from error


def _create(hf_config: PretrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(hf_config, **options)
    except (ValueError, ImportError, TypeError, RuntimeError, AssertionError) as error:
        raise _attention_error(hf_config.model_type, options, error) or UserError(
            f"transformers cannot build this {hf_config.model_type} model: {_one_line(error)}"
        ) from error


def _load(
    config: BaseModelConfig, hf_config: PretrainedConfig, options: dict[str, Any]
) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    name = str(config.pretrained)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            _expand(name),
            config=hf_config,
            revision=config.revision,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        attention = _attention_error(hf_config.model_type, options, error)
        raise attention or _loading_error(name, error) from error
    model: PreTrainedModel = loaded[0]
    lacking = sorted(loaded[1]["missing_keys"])
    if lacking:  # transformers would leave them random and only warn
        raise UserError(
            f"the weights of {name!r} lack {len(lacking)} tensors that {type(model).__name__} "
            f"needs, such as {lacking[0]!r}; it is not the checkpoint of a causal language model."
        )
    return model


def _check_folder(name: str) -> None:
    """Says what a local folder lacks before transformers mistakes it for a name on the Hub."""
    folder = Path(_expand(name))
    if not folder.exists():
        if name.count("/") > 1 or name.startswith((".", "~", "/")) or "\\" in name:
            raise UserError(f"the model folder {name!r} does not exist.")
        return
    if not folder.is_dir():
        raise UserError(f"the model {name!r} is a file; give the folder that holds it.")
    missing = []
    if not (folder / "config.json").is_file():
        missing.append("config.json")
    patterns = ("*.safetensors", "pytorch_model*.bin")
    if not any(path for pattern in patterns for path in folder.glob(pattern)):
        missing.append("weights (*.safetensors)")
    if (folder / "adapter_config.json").is_file() and missing:
        raise UserError(
            f"{name!r} holds a peft adapter, not a model; merge it into its base first."
        )
    if missing:
        raise UserError(f"{name!r} is no Hugging Face model folder: no {' and no '.join(missing)}.")


def _loading_error(name: str, error: Exception) -> UserError:
    if "custom code" in str(error):
        return UserError(
            f"the model {name!r} brings Python code of its own; read it, and set trust_remote_code "
            "only if you trust it."
        )
    if Path(_expand(name)).exists():
        return UserError(f"the model in {name!r} cannot be loaded: {_one_line(error)}")
    return UserError(
        f"there is no folder {name!r}, and the Hugging Face Hub does not hand out a model of that "
        f"name: check the name and the network, or give a local folder. ({_one_line(error)})"
    )


def _attention_error(
    model_type: str, options: dict[str, Any], error: Exception
) -> UserError | None:
    attention = options["attn_implementation"]
    known = ("attention implementation", "attn_implementation", "scaled_dot_product", "flash")
    if attention == "eager" or not any(word in str(error).lower() for word in known):
        return None
    return UserError(
        f"{model_type} cannot run with attn_implementation={attention} here; "
        f"use attn_implementation=eager. ({_one_line(error)})"
    )


def _set_dropout(hf_config: PretrainedConfig, dropout: float) -> None:
    fields = [
        name for name in _DROPOUT_FIELDS if isinstance(getattr(hf_config, name, None), int | float)
    ]
    if not fields:
        raise UserError(f"{hf_config.model_type} models have no dropout; leave dropout out.")
    for name in fields:
        setattr(hf_config, name, dropout)


def _set_special_ids(
    model: PreTrainedModel, pad: int | None, bos: int | None, eos: int | None
) -> None:
    """Writes the tokenizer's ids where generation and training read them."""
    for target in (model.config, model.generation_config):
        for name, value in (("pad", pad), ("bos", bos), ("eos", eos)):
            old = getattr(target, f"{name}_token_id", None)
            # A chat model may stop at several tokens; the tokenizer knows only one of them.
            if value is not None and not (isinstance(old, list) and value in old):
                setattr(target, f"{name}_token_id", value)
    embedding = cast("nn.Embedding", model.get_input_embeddings())
    if embedding.padding_idx is not None and embedding.padding_idx in (bos, eos):
        # Otherwise a token that is more than padding gets no gradient.
        embedding.padding_idx = None


def _expand(name: str) -> str:
    return os.path.expanduser(name)


def _name(config: BaseModelConfig) -> str:
    if config.pretrained:
        return f"the model {config.pretrained!r}"
    return "the model's config" if config.config else f"the preset {config.preset}"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
