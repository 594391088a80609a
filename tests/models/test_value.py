"""Critics: where they start from, and what they say of every state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_llm.models import BaseModelConfig, RewardStatistics, write_statistics
from lit_llm.models.value import ValueHead, build_value_model, width_of

IDS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXTS = [[5, 9, 3, 11, 40, 41, 7], [8, 0, 3, 22, 0], [96, 50, 2, 4]]
WIDTH = 3  # of the response, the last tokens of each text; padded on the left


def padded(extra: int = 0):
    length = max(map(len, TEXTS)) + extra
    ids, real = torch.zeros(2, len(TEXTS), length, dtype=torch.long)
    for row, text in enumerate(TEXTS):
        ids[row, length - len(text) :] = torch.tensor(text)
        real[row, length - len(text) :] = 1
    return ids, real


def reward_folder(tmp_path: Path, heads: int, model_type: str = "llama", bias: bool = False) -> str:
    """A classifier by transformers alone, with statistics of its scores."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(heads)
    config = AutoConfig.for_model(
        model_type,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        num_labels=heads,
        **IDS,
    )
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.score.weight)
    statistics = RewardStatistics([0.7 - h for h in range(heads)], [2.5 + h for h in range(heads)])
    write_statistics(model, statistics)
    model.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("extra", [0, 4])
@pytest.mark.parametrize("heads", [1, 3])
@torch.no_grad()
def test_a_critic_of_a_reward_model_begins_as_its_standardised_score(
    tmp_path: Path, heads: int, extra: int
) -> None:
    """The value before a token is the score of the text that ends before it."""
    from transformers import AutoModelForSequenceClassification

    folder = reward_folder(tmp_path, heads)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    mean = torch.tensor([0.7 - head for head in range(heads)])
    std = torch.tensor([2.5 + head for head in range(heads)])
    expected = torch.zeros(len(TEXTS), WIDTH)
    for row, text in enumerate(TEXTS):
        for column in range(WIDTH):
            read = text[: len(text) - WIDTH + column]
            hidden = plain.model(torch.tensor([read])).last_hidden_state[0, -1]
            expected[row, column] = ((plain.score.weight @ hidden - mean) / std).mean()
    critic = build_value_model(BaseModelConfig(pretrained=folder), seq_len=16, **IDS).eval()
    found = critic(*padded(extra), WIDTH)
    assert found.dtype == torch.float32
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_critic_of_a_language_model_begins_at_0_and_can_learn(tiny_model, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    critic = build_value_model(BaseModelConfig(pretrained=str(tmp_path)), seq_len=16, **IDS)
    values = critic(*padded(), WIDTH)
    assert torch.equal(values, torch.zeros(len(TEXTS), WIDTH))
    (values - 1).square().sum().backward()
    assert bool(critic.head.weight.grad.any())
    assert float(critic.head.bias.grad) == pytest.approx(-2 * values.numel())
    names = {name for name, _ in critic.named_parameters()}
    assert not any("lm_head" in name for name in names)  # nothing that is never used
    loaded = dict(critic.backbone.named_parameters())
    for name, parameter in tiny_model("llama").model.named_parameters():
        assert torch.equal(loaded[name], parameter), name


@torch.no_grad()
def test_a_new_model_is_a_critic_too(tiny_config) -> None:
    config = BaseModelConfig(preset=None, config=tiny_config("qwen2"))
    critic = build_value_model(config, seq_len=16, **IDS)
    assert width_of(critic.backbone) == 32
    assert not bool(critic(*padded(), WIDTH).any())


@torch.no_grad()
def test_the_head_computes_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    head, hidden = ValueHead(64), torch.randn(5, 4, 64)
    head.weight.normal_()
    head.bias.fill_(0.3)
    expected = (hidden.double() * head.weight.double()).sum(-1) + head.bias.double()
    with torch.autocast("cpu", torch.bfloat16):
        found = head(hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    half = head.to(torch.bfloat16)(hidden.bfloat16())
    assert half.dtype == torch.float32
    assert half.shape == (5, 4)
    wide = head.double()(hidden.double())
    assert wide.dtype == torch.float64
