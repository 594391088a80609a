"""Finding and compiling decoder blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_llm.errors import UserError
from lit_llm.models import compile_blocks, decoder_blocks


@pytest.mark.parametrize(
    ("model_type", "block"),
    [
        ("llama", "LlamaDecoderLayer"),
        ("qwen3", "Qwen3DecoderLayer"),
        ("gpt2", "GPT2Block"),
        ("gpt_neox", "GPTNeoXLayer"),
        ("opt", "OPTDecoderLayer"),
        ("qwen3_moe", "Qwen3MoeDecoderLayer"),
        ("mamba", "MambaBlock"),
    ],
)
def test_blocks_are_found(tiny_model, model_type: str, block: str) -> None:
    blocks = decoder_blocks(tiny_model(model_type))
    assert [type(module).__name__ for module in blocks] == [block] * 2


def test_experts_inside_blocks_are_not_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))

    model = nn.Module()
    model.mixed = nn.ModuleList([nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU()])
    model.layers = nn.ModuleList(Block() for _ in range(3))
    assert decoder_blocks(model) is model.layers
    with pytest.raises(UserError, match="Linear"):
        compile_blocks(nn.Linear(2, 2))


def test_compiling_keeps_names_and_weights(tiny_model) -> None:
    model = tiny_model("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    compile_blocks(model)  # nothing is compiled before the first forward
    assert all(block._compiled_call_impl is not None for block in decoder_blocks(model))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.slow
def test_compiled_blocks_train_like_eager_ones(tiny_model) -> None:
    from lit_llm.models import causal_lm_loss

    tokens = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))
    results = []
    for compiled in (False, True):
        model = tiny_model("llama").train()
        if compiled:
            compile_blocks(model)
        loss = causal_lm_loss(model, tokens, tokens).loss
        loss.backward()
        results.append((loss, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
