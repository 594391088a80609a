"""Small models for the sampling engine, and its answers to the prompts of a few tests."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lit_llm.rollout.decoders import ModelDecoder
from lit_llm.rollout.engine import EngineFactory
from lit_llm.rollout.generation import GenerationConfig
from lit_llm.rollout.llama import LlamaDecoder
from lit_llm.rollout.sampling import SamplingEngine
from tests.rollout.test_generation import GREEDY, PAD, PROMPTS, tiny

FACTORY: EngineFactory = SamplingEngine
SEEDS = [11, 12, 13, 14, 15]
SAMPLED = GenerationConfig(max_new_tokens=12)
KINDS = {
    "llama": LlamaDecoder,
    "qwen2": LlamaDecoder,  # biases
    "qwen3": LlamaDecoder,  # norms of queries and keys
    "gpt2": ModelDecoder,  # learned positions
    "olmo2": ModelDecoder,  # rotary positions, other blocks
}
BOTH = pytest.mark.parametrize("kind", ["llama", "gpt2"])


def model_of(kind, **options):
    """A small model whose biases and norms are not those of a new one."""
    model = tiny(kind, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def loaded(model, stops=(), batch_size=5, dtype=None):
    engine = FACTORY(pad_token_id=PAD, stop_token_ids=stops, batch_size=batch_size, dtype=dtype)
    engine.load(model)
    return engine


def answers(model, prompts=PROMPTS, config=GREEDY, seeds=None, **options):
    seeds = range(len(prompts)) if seeds is None else seeds
    return loaded(model, **options).generate(prompts, config, seeds=seeds)


def lora(model, size=0.3, **options):
    options = {"r": 2, "target_modules": "all-linear"} | options
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return wrapped
