"""Tiny models of many families, and a tiny tokenizer."""

from __future__ import annotations

from typing import Any

import pytest

VOCABULARY = 97
_LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_NEOX = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
_TYPES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 8},
    "mistral": _LLAMA | {"sliding_window": 5},
    "gemma2": _LLAMA | {"head_dim": 8, "sliding_window": 5, "final_logit_softcapping": 1.0},
    "gemma3_text": _LLAMA | {"head_dim": 8, "sliding_window": 5},
    "cohere": _LLAMA,
    "granite": _LLAMA | {"logits_scaling": 4.0},
    "minicpm3": _NEOX,
    "phi": _LLAMA,
    "olmo2": _LLAMA,
    "stablelm": _LLAMA,
    "gpt2": _GPT2 | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": _NEOX,
    "gptj": _GPT2 | {"rotary_dim": 4, "resid_pdrop": 0.0},
    "opt": _OPT | {"max_position_embeddings": 64, "word_embed_proj_dim": 16, "dropout": 0.0},
    "mixtral": _LLAMA | {"num_local_experts": 4},
    "qwen3_moe": _LLAMA
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "modernbert-decoder": _NEOX,
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},
}


@pytest.fixture
def tiny_config():
    def make(model_type: str, **changes: Any) -> dict[str, Any]:
        values = {"model_type": model_type, "vocab_size": VOCABULARY} | _TYPES[model_type]
        return values | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | changes

    return make


@pytest.fixture
def tiny_model(tiny_config):
    """Builds a model with weights large enough for errors to show, by transformers alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(model_type: str, attention: str | None = None, **changes: Any):
        torch.manual_seed(0)
        config = AutoConfig.for_model(**tiny_config(model_type, **changes))
        extra = {"attn_implementation": attention} if attention else {}
        model = AutoModelForCausalLM.from_config(config, **extra)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
                else:  # norms and biases off their neutral values
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.fixture
def tokenizer():
    """Byte-level BPE of a few hundred tokens with a chat template, pad distinct from eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template="{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}",
    )
