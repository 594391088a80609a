"""Our loss and gradients against transformers' own loss."""

from __future__ import annotations

import pytest
import torch

from lit_llm.models import causal_lm_loss

CONFIGS = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 96, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 16},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "granite": {"num_key_value_heads": 2, "intermediate_size": 96, "logits_scaling": 3.0},
    "mixtral": {
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "num_local_experts": 4,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.5,
    },
}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_loss_and_gradients_equal_transformers(model_type: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    common = {"vocab_size": 211, "hidden_size": 64, "num_hidden_layers": 2}
    config = AutoConfig.for_model(
        model_type, num_attention_heads=4, **common, **CONFIGS[model_type]
    )
    model = AutoModelForCausalLM.from_config(config).train()
    tokens = torch.randint(211, (3, 24))
    labels = tokens.clone()
    labels[0, :10] = -100
    labels[2, 20:] = -100
    mask = torch.ones_like(tokens)
    if model_type != "mixtral":  # its router loss weighs padding in its own way
        mask[2, 20:] = 0
    num_tokens = int((labels[:, 1:] != -100).sum())

    ours = causal_lm_loss(model, tokens, labels, attention_mask=mask, chunk_size=7)
    (ours.loss / num_tokens).backward()
    our_grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    theirs = model(input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False)
    theirs.loss.backward()

    assert ours.num_targets.item() == num_tokens
    assert ours.loss.item() == pytest.approx(theirs.loss.item() * num_tokens, rel=1e-6)
    for name, parameter in model.named_parameters():
        error = (our_grads[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-12)
        assert error < 1e-6, (name, error)


def test_bfloat16_autocast_loss_matches_transformers() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=211,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        **CONFIGS["llama"],
    )
    model = AutoModelForCausalLM.from_config(config)
    tokens = torch.randint(211, (3, 24))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = causal_lm_loss(model, tokens, tokens).loss
        theirs = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    assert ours.item() / (3 * 23) == pytest.approx(theirs.item(), rel=1e-5)
