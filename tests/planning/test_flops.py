"""FLOPs of a token against a count by hand."""

import pytest
import torch

from lit_llm.models.build import build_model
from lit_llm.models.config import BaseModelConfig
from lit_llm.planning.flops import peak_flops, training_flops_per_token


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_by_hand(tied):
    config = {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
    }
    model = build_model(BaseModelConfig(config=config))
    attention = 16 * 16 + 2 * 16 * 8 + 16 * 16  # q, k and v of half the heads, o
    layer = attention + 3 * 16 * 40 + 2 * 16  # mlp, two norms
    matrices = 3 * layer + 16 + 100 * 16  # final norm, output head
    scores = 2 * 3 * 16 * 50 * 2  # per layer: q k^T and p v over 50 positions, 2 FLOPs each
    assert training_flops_per_token(model, 50) == 3 * (2 * matrices + scores)


def test_positions_are_looked_up_not_multiplied():
    model = build_model(BaseModelConfig(preset="gpt2-1m"), vocab_size=50, seq_len=32)
    more = build_model(BaseModelConfig(preset="gpt2-1m"), vocab_size=50, seq_len=64)
    assert training_flops_per_token(model, 8) == training_flops_per_token(more, 8)


def test_the_measured_peak_leaves_the_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e8
    assert torch.equal(torch.rand(3), expected)


def test_frozen_weights_cost_no_gradient_of_their_own() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    whole = training_flops_per_token(model, 16)
    model.model.layers[0].mlp.requires_grad_(False)  # 3 matrices of 8 x 12
    assert whole - training_flops_per_token(model, 16) == 2 * 3 * 8 * 12
