"""Which layers of which models tensor parallelism divides."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lit_llm.errors import UserError
from lit_llm.strategies.tensor_parallel import block_plan, check_divisible

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def model_of(kind: str, **changed: Any) -> Any:
    """A tiny model of an architecture."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, **changed))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "olmo2"])
def test_every_matrix_of_the_blocks_is_divided(kind: str) -> None:
    """A plan that misses a layer would leave its work to every rank."""
    model = model_of(kind)
    plan = block_plan(model)
    check_divisible(model, plan, 2)
    block = model.model.layers[0]
    matrices = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    assert matrices == {n for n in plan if isinstance(block.get_submodule(n), nn.Linear)}
    assert not any(name.startswith(("embed", "lm_head", "norm")) for name in plan)


def test_names_what_cannot_be_divided() -> None:
    """The experts of a mixture are no linear layers."""
    model = model_of("mixtral", num_local_experts=2)
    with pytest.raises(UserError, match=r"mlp\.experts.*tensor_parallel_size to 1"):
        check_divisible(model, block_plan(model), 2)


def test_no_plan() -> None:
    """Attention that a plan of transformers does not describe."""
    config = AutoConfig.for_model("gpt2", n_embd=32, n_head=4, n_layer=2, vocab_size=64)
    with pytest.raises(UserError, match="no tensor parallel plan for GPT2LMHeadModel"):
        block_plan(AutoModelForCausalLM.from_config(config))
