"""What fine-tuning adds to a causal language model: noise in training only, frozen weights told."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_llm.errors import UserError
from lit_llm.models import BaseModelConfig
from lit_llm.modules.frozen import kept_elsewhere, tensors_fingerprint
from lit_llm.modules.sft import SFTModule

CONFIG = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
BATCH = {
    "input_ids": torch.arange(24).view(2, 12),
    "labels": torch.arange(24).view(2, 12),
    "document_ids": torch.tensor([[0] * 8 + [1] * 3 + [-1], [0] * 12]),
    "position_ids": torch.tensor([[*range(8), *range(3), 0], [*range(12)]]),
    "num_targets": torch.tensor(20),
}


def module_with(**settings: Any) -> SFTModule:
    torch.manual_seed(0)
    module = SFTModule(BaseModelConfig(config=CONFIG), **settings)
    module.configure_model()
    trainer: Any = type("Trainer", (), {"accumulate_grad_batches": 1, "world_size": 1})()
    trainer.distributed_sampler_kwargs = None
    module._trainer = trainer
    return module


def embedded(module: SFTModule) -> list[Tensor]:
    """What the embedding hands on, collected."""
    seen: list[Tensor] = []
    module.model.get_input_embeddings().register_forward_hook(
        lambda layer, args, output: seen.append(output.detach())
    )
    return seen


def test_noise_follows_the_length_of_each_sample_and_ends_with_the_step() -> None:
    module = module_with(neftune_alpha=5.0)
    seen = embedded(module)
    torch.manual_seed(1)
    module.training_step(BATCH, 0)
    plain = module.model.get_input_embeddings().weight[BATCH["input_ids"]]
    noise = (seen[0] - plain).abs()
    for row, columns, length in ((0, slice(0, 8), 8), (0, slice(8, 11), 3), (1, slice(0, 12), 12)):
        bound = 5.0 / (length * 16) ** 0.5
        largest = float(noise[row, columns].max())
        assert 0.8 * bound < largest <= bound * (1 + 1e-5)
    assert float(noise[0, 11].max()) == 0.0  # padding
    module.validation_step(BATCH, 0)
    torch.testing.assert_close(seen[1], plain, atol=0, rtol=0)


def test_without_noise_the_random_numbers_are_left_alone() -> None:
    module = module_with()
    before = torch.get_rng_state()
    module.training_step(BATCH, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_negative_strength_is_refused() -> None:
    with pytest.raises(UserError, match="neftune_alpha must not be negative"):
        module_with(neftune_alpha=-1.0)


def test_frozen_weights_are_kept_elsewhere_but_for_an_embedding_that_has_grown() -> None:
    model = module_with().model
    model.model.layers.requires_grad_(False)
    frozen = {name for name in model.state_dict() if name.startswith("model.layers.")}
    assert kept_elsewhere(model) == frozen
    ends = {"model.embed_tokens.weight", "lm_head.weight"}
    model.requires_grad_(False)
    assert kept_elsewhere(model) == {*frozen, *ends, "model.norm.weight"}
    model.grown_embedding = True
    assert kept_elsewhere(model) == {*frozen, "model.norm.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_fingerprint_tells_names_shapes_and_values_apart(dtype: torch.dtype) -> None:
    tensor = (torch.arange(10_000) % 200).to(dtype)
    known = tensors_fingerprint({"a": tensor})
    assert known == tensors_fingerprint({"a": tensor.clone()})
    changed = tensor.clone()
    changed[:50] += 1
    others = [
        {"b": tensor},
        {"a": tensor.view(100, 100)},
        {"a": changed},
        {"a": tensor, "b": tensor},
    ]
    assert all(tensors_fingerprint(other) != known for other in others)
