"""The fingerprint of frozen weights: of the base model, and of nothing that is random."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_llm.models import (
    AdapterConfig,
    BaseModelConfig,
    add_adapter,
    build_model,
    build_reward_model,
    unwrap,
)
from lit_llm.modules.frozen import frozen_fingerprint, kept_elsewhere

IDS = {"vocab_size": 61, "pad_token_id": 0, "eos_token_id": 2}


@pytest.fixture
def base(tmp_path: Path) -> BaseModelConfig:
    build_model(BaseModelConfig(preset="llama-1m"), **IDS).save_pretrained(tmp_path / "base")
    return BaseModelConfig(pretrained=str(tmp_path / "base"))


def _adapted(base: BaseModelConfig, seed: int):
    torch.manual_seed(seed)
    return add_adapter(build_reward_model(base, **IDS), AdapterConfig(r=2))


def test_the_random_head_of_a_reward_model_is_not_its_base(base: BaseModelConfig) -> None:
    first, second = _adapted(base, 1), _adapted(base, 2)
    heads = [unwrap(model).score.original_module.weight for model in (first, second)]
    assert not torch.equal(*heads)
    assert frozen_fingerprint(first) == frozen_fingerprint(second)
    with torch.no_grad():
        unwrap(first).model.layers[3].mlp.up_proj.base_layer.weight.add_(0.1)
    assert frozen_fingerprint(first) != frozen_fingerprint(second)


def test_the_unused_copy_of_the_head_is_not_in_a_checkpoint(base: BaseModelConfig) -> None:
    model = _adapted(base, 1)
    left_out = kept_elsewhere(model)
    assert "base_model.model.score.original_module.weight" in left_out
    kept = model.state_dict().keys() - left_out
    assert "base_model.model.score.modules_to_save.default.weight" in kept
    assert all("lora_" in name or "modules_to_save" in name for name in kept)
