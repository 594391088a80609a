"""Rotary frequencies stay exact under casts; everything else is cast."""

from __future__ import annotations

import copy

import torch

from lit_llm.models import BaseModelConfig, build_model, keep_buffer_dtypes


def test_casts_leave_rotary_frequencies_exact() -> None:
    model = build_model(BaseModelConfig(preset="llama-1m"), vocab_size=64, seq_len=16)
    name = type(model.model.rotary_emb).__name__
    exact = model.model.rotary_emb.inv_freq.clone()
    for cast in (lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16), lambda m: m.half()):
        other = cast(copy.deepcopy(model))
        assert torch.equal(other.model.rotary_emb.inv_freq, exact)
        assert {p.dtype for p in other.parameters()} != {torch.float32}
    assert type(model.model.rotary_emb).__name__ == name == "LlamaRotaryEmbedding"
    assert model.to("meta").model.rotary_emb.inv_freq.device.type == "meta"


def test_rounded_frequencies_would_change_the_model() -> None:
    """The reason for all this: position 2,048 is turned by 0.9 radians."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", hidden_size=64, num_attention_heads=1, vocab_size=8)
    config.num_hidden_layers, config.intermediate_size = 1, 8
    config.num_key_value_heads = 1
    plain = AutoModelForCausalLM.from_config(config)
    kept = copy.deepcopy(plain)
    keep_buffer_dtypes(kept)
    exact = plain.model.rotary_emb.inv_freq.clone()
    turn = (plain.bfloat16().model.rotary_emb.inv_freq.float() - exact).abs().max() * 2048
    assert turn > 0.5
    assert torch.equal(kept.bfloat16().model.rotary_emb.inv_freq, exact)


def test_persistent_buffers_and_integers_follow_the_cast() -> None:
    module = torch.nn.Module()
    module.register_buffer("saved", torch.ones(2))
    module.register_buffer("computed", torch.ones(2), persistent=False)
    module.register_buffer("count", torch.ones(2, dtype=torch.long), persistent=False)
    keep_buffer_dtypes(module)
    keep_buffer_dtypes(module)  # a second time changes nothing
    module.bfloat16()
    assert module.saved.dtype == torch.bfloat16
    assert module.computed.dtype == torch.float32
    assert module.count.dtype == torch.long
    assert list(module.state_dict()) == ["saved"]
