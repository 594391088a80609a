"""Ready-made architectures: transformers configs as plain tables.

A preset named after its family and size (``llama-5m``) takes the vocabulary of the tokenizer and
as many positions as the sequence length; the size counts the parameters without token and position
embeddings, as in scaling laws. A preset of a published model (``llama-135m``, ``qwen3-600m``,
``gpt2-124m``) fixes both as published, and the size counts every parameter.
"""

from __future__ import annotations

import copy
import difflib
from typing import Any

from lit_llm.errors import UserError


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }


def _qwen3(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int) -> dict[str, Any]:
    llama = _llama(hidden, layers, heads, kv_heads, mlp)
    return llama | {"model_type": "qwen3", "head_dim": hidden // heads, "rms_norm_eps": 1e-6}


def _gpt2(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": True,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "llama-1m": _llama(128, 6, 4, 2, 320),
    "llama-5m": _llama(256, 7, 4, 2, 688),
    "llama-15m": _llama(384, 10, 6, 2, 960),
    "llama-60m": _llama(640, 13, 10, 5, 1760),
    # SmolLM2-135M (https://huggingface.co/HuggingFaceTB/SmolLM2-135M)
    "llama-135m": _llama(576, 30, 9, 3, 1536)
    | {
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "initializer_range": 0.041666666666666664,
    },
    "qwen3-1m": _qwen3(128, 6, 4, 2, 320),
    "qwen3-5m": _qwen3(256, 7, 4, 2, 688),
    "qwen3-15m": _qwen3(384, 10, 6, 2, 960),
    # Qwen3-0.6B (https://huggingface.co/Qwen/Qwen3-0.6B)
    "qwen3-600m": _qwen3(1024, 28, 16, 8, 3072)
    | {
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "gpt2-1m": _gpt2(128, 5, 4),
    "gpt2-5m": _gpt2(256, 6, 4),
    "gpt2-15m": _gpt2(384, 8, 6),
    # GPT-2 (https://huggingface.co/openai-community/gpt2), without its dropout
    "gpt2-124m": _gpt2(768, 12, 12) | {"vocab_size": 50257, "n_positions": 1024},
}


def preset_config(name: str) -> dict[str, Any]:
    """The transformers config of a preset, as a dict of the caller's own.

    Raises:
        UserError: There is no such preset; the nearest names are offered.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3) or list(PRESETS)
        raise UserError(f"there is no model preset {name!r}; did you mean {', '.join(near)}?")
    return copy.deepcopy(PRESETS[name])
