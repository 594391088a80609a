"""``attn_implementation: blocked`` inside transformers models."""

import pytest
import torch

from lit_llm.models import attention
from lit_llm.models.build import build_model
from lit_llm.models.config import BaseModelConfig

TINY = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def _model(family, implementation):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = {"model_type": family, "vocab_size": 64} | TINY[family]
    config |= {} if family == "gpt2" else sizes
    dropout = 0.0 if family == "gpt2" else None
    return build_model(
        BaseModelConfig(config=config, attn_implementation=implementation, dropout=dropout)
    )


def _count_calls(monkeypatch):
    calls = []
    original = attention.blocked_causal_attention
    monkeypatch.setattr(
        attention,
        "blocked_causal_attention",
        lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs),
    )
    return calls


def _loss_and_gradient(model, ids, **inputs):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False, **inputs).loss
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients)


@pytest.mark.parametrize("family", TINY)
def test_it_trains_as_sdpa_does(family, monkeypatch):
    ids = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(1))
    calls = _count_calls(monkeypatch)

    loss, gradient = _loss_and_gradient(_model(family, "blocked"), ids)
    assert len(calls) == 2  # once a layer
    expected_loss, expected = _loss_and_gradient(_model(family, "sdpa"), ids)

    assert len(calls) == 2
    assert loss == pytest.approx(expected_loss, abs=2e-3)
    assert (gradient - expected).norm() < 0.03 * expected.norm()


def test_masks_float32_and_generation_go_to_sdpa(monkeypatch):
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    calls = _count_calls(monkeypatch)
    ours, torchs = _model("llama", "blocked"), _model("llama", "sdpa")

    loss, gradient = _loss_and_gradient(ours, ids, attention_mask=padding)
    expected_loss, expected = _loss_and_gradient(torchs, ids, attention_mask=padding)
    assert loss == expected_loss
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(ours(input_ids=ids).logits, torchs(input_ids=ids).logits)
    new = [m.eval().generate(ids, max_new_tokens=4, do_sample=False) for m in (ours, torchs)]
    assert torch.equal(*new)
    assert calls == []
