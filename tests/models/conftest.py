"""Tiny models of many families, and a tiny tokenizer."""

from __future__ import annotations

import json
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


@pytest.fixture
def write_gguf():
    """Writes a llama model of transformers, and a tokenizer, the way llama.cpp's converter does."""
    import gguf

    def permuted(weight, heads: int):
        """Rotary pairs side by side, where transformers has them half a head apart."""
        rows, columns = weight.shape
        halves = weight.reshape(heads, 2, rows // heads // 2, columns)
        return halves.transpose(1, 2).reshape(rows, columns)

    def write(path, model, tokenizer=None) -> None:
        config = model.config
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_name("tiny")
        writer.add_context_length(config.max_position_embeddings)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        writer.add_vocab_size(config.vocab_size)
        if tokenizer is not None:
            vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
            special = set(tokenizer.all_special_tokens)
            state = json.loads(tokenizer.backend_tokenizer.to_str())
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre("gpt-2")
            writer.add_token_list(vocabulary)
            writer.add_token_types([3 if token in special else 1 for token in vocabulary])
            writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
            writer.add_bos_token_id(tokenizer.bos_token_id)
            writer.add_eos_token_id(tokenizer.eos_token_id)
            writer.add_pad_token_id(tokenizer.pad_token_id)
            writer.add_chat_template(tokenizer.chat_template)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        for name, weight in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            if ".q_proj." in name:
                weight = permuted(weight, config.num_attention_heads)
            if ".k_proj." in name:
                weight = permuted(weight, config.num_key_value_heads)
            writer.add_tensor(names.get_name(name, (".weight",)), weight.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write
