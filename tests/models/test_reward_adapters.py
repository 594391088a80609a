"""Adapters of reward models: the head is trained whole, merged and saved with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lit_llm.errors import UserError
from lit_llm.models import (
    AdapterConfig,
    BaseModelConfig,
    RewardStatistics,
    adapter_heads,
    add_adapter,
    build_model,
    build_reward_model,
    export_model,
    merge_adapter,
    merged_copy,
    read_statistics,
    save_adapter,
    score,
    unwrap,
    write_statistics,
)

TOKENS = torch.arange(40).view(2, 20) % 97


@pytest.fixture
def reward_base(tiny_model, tmp_path: Path) -> BaseModelConfig:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    return BaseModelConfig(pretrained=str(tmp_path / "base"))


def _reward_model(base: BaseModelConfig, seed: int = 0, heads: int = 2):
    torch.manual_seed(seed)
    return build_reward_model(base, heads=heads, vocab_size=97, pad_token_id=0, eos_token_id=2)


@torch.no_grad()
def _scores(model) -> torch.Tensor:
    mask = torch.ones_like(TOKENS)
    mask[1, 12:] = 0
    return score(model.eval(), TOKENS, mask)


def _train_scores(model) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        scores = score(model.train(), TOKENS, torch.ones_like(TOKENS))
        (scores[0] - scores[1]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "dora", "target_modules": ["q_proj", "up_proj"]},
        {"modules_to_save": ["embed_tokens", "score"]},
    ],
    ids=str,
)
def test_reward_model_merges_and_its_head_goes_with_the_adapter(
    reward_base: BaseModelConfig, tmp_path: Path, options: dict
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    config = AdapterConfig(r=4, **options)
    base = _reward_model(reward_base)
    before, head = _scores(base), base.score.weight.detach().clone()
    model = add_adapter(base, config)
    assert config.modules_to_save == options.get("modules_to_save")
    assert torch.equal(_scores(model), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    whole = {name for name in trained if "lora_" not in name}
    assert "base_model.model.score.modules_to_save.default.weight" in whole
    assert len(whole) == len({"score", *(config.modules_to_save or [])})
    _train_scores(model)
    expected = _scores(model)
    assert (expected - before).abs().max() > 1e-2

    merged = merged_copy(model)
    torch.testing.assert_close(_scores(merged), expected, rtol=0, atol=1e-5)
    assert type(merged.score) is torch.nn.Linear
    assert (merged.score.weight - head).abs().max() > 1e-3
    exported = export_model(merged, None, tmp_path / "model")
    again = AutoModelForSequenceClassification.from_pretrained(exported)
    torch.testing.assert_close(_scores(again), expected, rtol=0, atol=1e-5)

    folder = save_adapter(model, tmp_path / "adapter")
    values = json.loads((folder / "adapter_config.json").read_text())
    assert values["task_type"] == "SEQ_CLS"
    assert not (folder / "generation_config.json").exists()
    fresh = AutoModelForSequenceClassification.from_pretrained(reward_base.pretrained, num_labels=2)
    loaded = PeftModel.from_pretrained(fresh, folder)
    torch.testing.assert_close(_scores(loaded), expected, rtol=0, atol=1e-5)
    other_head = _reward_model(reward_base, seed=5)
    torch.testing.assert_close(
        _scores(merge_adapter(other_head, folder)), expected, rtol=0, atol=1e-5
    )


def test_adapters_of_one_kind_do_not_go_onto_the_other(
    reward_base: BaseModelConfig, tmp_path: Path
) -> None:
    reward = save_adapter(
        add_adapter(_reward_model(reward_base), AdapterConfig(r=2)), tmp_path / "r"
    )
    language = save_adapter(
        add_adapter(build_model(reward_base), AdapterConfig(r=2)), tmp_path / "l"
    )
    with pytest.raises(UserError, match="that of a reward model, but LlamaForCausalLM is a lang"):
        merge_adapter(build_model(reward_base), reward)
    with pytest.raises(UserError, match="that of a language model, but LlamaForSequence"):
        merge_adapter(_reward_model(reward_base), language)
    with pytest.raises(UserError, match="does not go onto"):
        merge_adapter(_reward_model(reward_base, heads=3), reward)


def test_statistics_go_with_the_adapter(reward_base: BaseModelConfig, tmp_path: Path) -> None:
    statistics = RewardStatistics([0.25, -1.0], [1.5, 2.0], "min")
    model = add_adapter(_reward_model(reward_base), AdapterConfig(r=2))
    without = save_adapter(model, tmp_path / "without")
    write_statistics(model, statistics)
    for _ in range(2):  # an earlier one is replaced
        folder = save_adapter(model, tmp_path / "with")
    assert json.loads((folder / "reward_statistics.json").read_text()) == {
        "reward_mean": [0.25, -1.0],
        "reward_std": [1.5, 2.0],
        "reward_aggregation": "min",
    }
    assert read_statistics(merge_adapter(_reward_model(reward_base), folder).config) == statistics
    assert not (without / "reward_statistics.json").exists()
    # A base that is a reward model has statistics of its own, which are of other scores.
    base = _reward_model(reward_base)
    write_statistics(base, statistics)
    assert read_statistics(merge_adapter(base, without).config) is None


def test_an_adapter_says_its_number_of_heads(reward_base: BaseModelConfig, tmp_path: Path) -> None:
    for heads in (1, 3):
        model = add_adapter(_reward_model(reward_base, heads=heads), AdapterConfig(r=2))
        folder = save_adapter(model, tmp_path / "reward")
        assert adapter_heads(folder) == heads
    (folder / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is damaged"):
        adapter_heads(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config.json cannot be read"):
        adapter_heads(folder)
    model = add_adapter(build_model(reward_base), AdapterConfig(r=2))
    assert adapter_heads(save_adapter(model, tmp_path / "language")) is None


def test_the_head_of_a_reward_model_takes_no_adapter(reward_base: BaseModelConfig) -> None:
    with pytest.raises(UserError, match="'score'.*trained whole in any case"):
        add_adapter(_reward_model(reward_base), AdapterConfig(target_modules=["q_proj", "score"]))


@pytest.mark.gpu
def test_qlora_of_a_reward_model_keeps_its_head_whole(
    reward_base: BaseModelConfig, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    adapter = AdapterConfig("qlora", r=4)
    base = build_reward_model(
        reward_base, vocab_size=97, pad_token_id=0, quantization=adapter.quantization
    )
    model = add_adapter(base, adapter)
    head = unwrap(model).score.modules_to_save["default"].weight
    assert head.requires_grad
    assert head.is_floating_point()
    tokens = TOKENS.to(head.device)
    score(model, tokens, torch.ones_like(tokens)).sum().backward()
    assert head.grad is not None
    export_model(merged_copy(model), None, tmp_path / "model")
