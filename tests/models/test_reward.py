"""Reward models: built from language models, scored by masks, standardised, and judged together."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch

from lit_llm.errors import UserError
from lit_llm.models import (
    AdapterConfig,
    BaseModelConfig,
    RewardEnsemble,
    RewardStatistics,
    add_adapter,
    build_model,
    build_reward_model,
    decoder_blocks,
    export_model,
    load_reward_models,
    read_statistics,
    resolve_config,
    score,
    standardised,
    write_statistics,
)

IDS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Ends with the id that pads, holds it inside, and a text of one token.
TEXTS = [[5, 9, 3, 11, 40, 41, 7], [8, 0, 3, 0], [96, 50, 2], [12], [4, 4, 9, 60, 2, 0]]


@pytest.fixture
def folder(tiny_model, tmp_path: Path):
    """Saves a language model by transformers alone."""

    def save(model_type: str = "llama", **changes) -> str:
        path = tmp_path / f"{model_type}-{len(list(tmp_path.iterdir()))}"
        tiny_model(model_type, **changes).save_pretrained(path)
        return str(path)

    return save


def _built(pretrained: str, *, heads: int = 1, seed: int = 0, **options):
    torch.manual_seed(seed)
    config = BaseModelConfig(pretrained=pretrained, **options)
    return build_reward_model(config, heads=heads, seq_len=16, **IDS).eval()


def _padded(texts, side: str = "right", extra: int = 0, pad: int = 0):
    length = max(map(len, texts)) + extra
    tokens = torch.full((len(texts), length), pad)
    mask = torch.zeros_like(tokens)
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(length - len(text), length)
        tokens[row, place] = torch.tensor(text)
        mask[row, place] = 1
    return tokens, mask


def _by_transformers(model, text: list[int]) -> torch.Tensor:
    """Logits of one text, unpadded: the id that pads must not matter."""
    with torch.no_grad():
        hidden = model.base_model(torch.tensor([text])).last_hidden_state[0, -1]
        own = model(torch.tensor([text])).logits[0]
        by_hand = torch.stack([hidden @ row for row in model.score.weight])
    if text[-1] != model.config.pad_token_id:
        torch.testing.assert_close(own, by_hand, rtol=0, atol=1e-5)
    return by_hand


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "opt"])
@torch.no_grad()
def test_scores_are_those_of_transformers_whatever_the_padding(
    folder, model_type: str, heads: int
) -> None:
    # transformers has no SDPA for Gemma's classifiers.
    options = {"attn_implementation": "eager"} if model_type == "gemma2" else {}
    model = _built(folder(model_type), heads=heads, **options)
    expected = torch.stack([_by_transformers(model, text) for text in TEXTS])
    assert expected.shape == (5, heads)
    assert expected.std(0).min() > 0.05
    for side in ("right", "left"):
        for extra in (0, 1, 5):
            for pad in (0, 7):
                found = score(model, *_padded(TEXTS, side, extra, pad))
                assert found.dtype == torch.float32
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for text, one in zip(TEXTS, expected, strict=True):  # batches of one
        torch.testing.assert_close(score(model, *_padded([text]))[0], one, rtol=0, atol=1e-5)


@torch.no_grad()
def test_without_a_padding_token_the_score_is_still_right(folder) -> None:
    model = _built(folder())
    expected = score(model, *_padded(TEXTS))
    for pad in (None, 2):  # also where padding is the end token
        model.config.pad_token_id = pad
        torch.testing.assert_close(score(model, *_padded(TEXTS, pad=2)), expected)


def test_the_score_is_read_at_one_token_and_all_before_it_learn(folder) -> None:
    model = _built(folder())
    tokens, mask = _padded(TEXTS, extra=2)
    seen = {}
    model.base_model.register_forward_hook(
        lambda module, args, output: seen.update(hidden=output.last_hidden_state)
    )
    found = score(model, tokens, mask)
    seen["hidden"].retain_grad()
    found.sum().backward()
    rows, places = seen["hidden"].grad.any(-1).nonzero().unbind(1)
    assert list(zip(rows.tolist(), places.tolist(), strict=True)) == [
        (row, len(text) - 1) for row, text in enumerate(TEXTS)
    ]
    assert model.model.embed_tokens.weight.grad[5].any()


def test_scores_are_float32_in_half_precision(folder) -> None:
    model = _built(folder(), dtype="bfloat16")
    tokens, mask = _padded(TEXTS)
    with torch.no_grad():
        plain = score(model, tokens, mask)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = score(model.float(), tokens, mask)
    for found in (plain, mixed):
        assert found.dtype == torch.float32
        assert not torch.equal(found, found.bfloat16().float())


def test_a_language_model_keeps_its_backbone_and_gets_a_head(folder) -> None:
    pretrained = folder(tie_word_embeddings=False)
    original = build_model(BaseModelConfig(pretrained=pretrained)).model.state_dict()
    model = _built(pretrained, heads=2)
    backbone = model.model.state_dict()
    assert backbone.keys() == original.keys()
    assert all(torch.equal(backbone[name], original[name]) for name in original)
    assert (model.config.num_labels, model.config.problem_type) == (2, "regression")
    assert (model.config.pad_token_id, model.config.eos_token_id) == (0, 2)
    assert model.score.weight.shape == (2, 32)
    assert build_reward_model(BaseModelConfig(pretrained=pretrained)).training
    same, other = _built(pretrained, heads=2), _built(pretrained, heads=2, seed=1)
    assert torch.equal(model.score.weight, same.score.weight)
    assert not torch.equal(model.score.weight, other.score.weight)


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_new_head_has_the_deviation_of_the_paper(folder, pretrained: bool) -> None:
    config = BaseModelConfig(preset="llama-1m")
    if pretrained:
        config = BaseModelConfig(pretrained=folder(hidden_size=128))
    torch.manual_seed(0)
    weight = build_reward_model(config, heads=200, vocab_size=97).score.weight
    error = 5 / (2 * weight.numel()) ** 0.5
    assert weight.shape == (200, 128)
    assert weight.std().item() * 129**0.5 == pytest.approx(1.0, abs=error)
    assert weight.mean().item() == pytest.approx(0.0, abs=5 / 129**0.5 / weight.numel() ** 0.5)


def test_a_reward_model_keeps_its_head(folder, tmp_path: Path) -> None:
    model = _built(folder(tie_word_embeddings=True), heads=2)
    write_statistics(model, RewardStatistics([1.0, 2.0], [0.5, 4.0], "min"))
    saved = str(export_model(model, None, tmp_path / "reward"))
    again = _built(saved, heads=2, seed=9)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    used = load_reward_models([saved]).models[0]
    assert read_statistics(used.config) == RewardStatistics([1.0, 2.0], [0.5, 4.0], "min")
    # The model that is trained on will have other scores.
    assert read_statistics(again.config) is None
    assert "reward_mean" not in again.config.to_dict()
    config = BaseModelConfig(pretrained=saved)
    for one in (lambda: _built(saved), lambda: resolve_config(config, heads=1)):
        with pytest.raises(UserError, match="gives 2 scores, not 1; set heads to 2"):
            one()
    for load in (build_model, resolve_config):  # the latter reads no weights
        with pytest.raises(UserError, match="scores texts; give a causal language model"):
            load(config)
    assert resolve_config(config, heads=2).num_labels == 2


def test_transformers_does_not_warn_of_a_new_head_but_of_all_else(folder, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers.utils import logging as transformers_logging

    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    transformers_logging.add_handler(handler)
    try:
        verbosity = transformers_logging.get_verbosity()
        model = _built(folder())
        assert transformers_logging.get_verbosity() == verbosity
        assert not told
        saved = export_model(model, None, tmp_path / "reward")
        tensors = load_file(saved / "model.safetensors") | {"more": torch.zeros(1)}
        save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
        _built(str(saved))
        assert any("more" in text for text in told)
    finally:
        transformers_logging.remove_handler(handler)


def test_checks_of_language_models_hold(folder, tmp_path: Path) -> None:
    pretrained = folder()
    config = BaseModelConfig(pretrained=pretrained)
    with pytest.raises(UserError, match="98 tokens"):
        build_reward_model(config, vocab_size=98)
    with pytest.raises(UserError, match="64 positions"):
        build_reward_model(config, seq_len=65)
    sentence = "does not exist; give --model.base.pretrained, or make it first with the recipe of"
    with pytest.raises(UserError, match=sentence):
        build_reward_model(BaseModelConfig(pretrained=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="at least one head"):
        build_reward_model(config, heads=0)
    grown = dataclasses.replace(config, resize_embeddings=True, gradient_checkpointing=True)
    model = build_reward_model(dataclasses.replace(grown, dropout=0.25), vocab_size=101)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 101
    assert model.config.attention_dropout == 0.25
    assert all(block.gradient_checkpointing for block in decoder_blocks(model))
    score(model, torch.tensor([[100, 3]]), torch.ones(1, 2)).sum().backward()
    assert model.get_input_embeddings().weight.grad[100].any()


def test_weights_that_lack_more_than_the_head(folder, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def without(path: str, name: str) -> None:
        file = Path(path) / "model.safetensors"
        tensors = load_file(file)
        del tensors[name]
        save_file(tensors, file, metadata={"format": "pt"})

    lacking = folder()
    without(lacking, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(UserError, match=r"lack 1 tensors.*up_proj.*of a causal language model"):
        _built(lacking)
    saved = str(export_model(_built(folder()), None, tmp_path / "reward"))
    without(saved, "score.weight")
    with pytest.raises(UserError, match=r"lack 1 tensors.*score.*of a reward model"):
        _built(saved)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("mamba", "no ForSequenceClassification of type mamba"),
        ("modernbert-decoder", "no linear layer named 'score'"),
    ],
)
@pytest.mark.parametrize("pretrained", [True, False])
def test_architectures_without_such_a_head(
    folder, tiny_config, model_type: str, words: str, pretrained: bool
) -> None:
    config = BaseModelConfig(config=tiny_config(model_type))
    if pretrained:
        config = BaseModelConfig(pretrained=folder(model_type))
    config.attn_implementation = "eager"
    with pytest.raises(UserError, match=words) as caught:
        build_reward_model(config)
    assert "\n" not in str(caught.value)


def test_no_dropout_is_no_mistake_where_there_is_none(tiny_config) -> None:
    options = {"config": tiny_config("mamba"), "attn_implementation": "eager"}
    build_model(BaseModelConfig(dropout=0.0, **options))
    with pytest.raises(UserError, match="no dropout"):
        build_model(BaseModelConfig(dropout=0.1, **options))


def test_gguf_files_become_reward_models(tiny_model, write_gguf, tmp_path: Path) -> None:
    language_model = tiny_model("llama")
    write_gguf(tmp_path / "tiny.gguf", language_model)
    model = _built(str(tmp_path / "tiny.gguf"))
    tokens = torch.tensor([TEXTS[0]])
    with torch.no_grad():
        expected = language_model.model(tokens).last_hidden_state
        found = model.model(tokens).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert 0.5 < model.score.weight.std().item() * 33**0.5 < 1.5


# ----- statistics ---------------------------------------------------------------------------------


def test_heads_are_standardised_and_put_together() -> None:
    scores = torch.tensor([[3.0, 10.0], [1.0, -10.0]])
    mean, std = [1.0, 0.0], [2.0, 10.0]
    # Standardised: [1, 1] and [0, -1].
    for aggregation, expected in (
        ("mean", [1.0, -0.5]),
        ("min", [1.0, -1.0]),
        ("mean_minus_std", [1.0, -0.5 - 0.5]),
    ):
        found = standardised(scores, RewardStatistics(mean, std, aggregation))
        assert found.tolist() == pytest.approx(expected)
    one = standardised(scores[:, :1], RewardStatistics([1.0], [2.0], "mean_minus_std"))
    assert one.tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"\(N, 2\), not \(2, 1\)"):
        standardised(scores[:, :1], RewardStatistics(mean, std))


def test_statistics_go_with_the_model(folder, tmp_path: Path) -> None:
    model = _built(folder())
    assert read_statistics(model.config) is None
    statistics = RewardStatistics([0.25], [1.5])
    write_statistics(model, statistics)
    values = json.loads((export_model(model, None, tmp_path / "r") / "config.json").read_text())
    assert (values["reward_mean"], values["reward_std"]) == ([0.25], [1.5])
    assert values["reward_aggregation"] == "mean"
    with pytest.raises(ValueError, match="statistics of 2 heads, not 1"):
        write_statistics(model, RewardStatistics([0.0, 0.0], [1.0, 1.0]))
    model.config.reward_mean = model.config.reward_std = [1.0, 1.0]
    with pytest.raises(UserError, match="2 heads for 1"):
        read_statistics(model.config)
    model.config.reward_std = None
    with pytest.raises(UserError, match="reward statistics"):
        read_statistics(model.config)


@pytest.mark.parametrize(
    "values",
    [([0.0], [0.0]), ([0.0], [1.0, 1.0]), ([float("nan")], [1.0]), ([0.0], [1.0], "max")],
)
def test_statistics_that_make_no_sense(values: tuple) -> None:
    with pytest.raises(UserError, match="reward statistics"):
        RewardStatistics(*values)


# ----- several models -----------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["mean", "min", "mean_minus_std"])
def test_several_folders_are_one_judge(folder, tmp_path: Path, aggregation: str) -> None:
    pretrained = folder()
    single, double = _built(pretrained), _built(pretrained, heads=2, seed=1)
    write_statistics(single, RewardStatistics([0.5], [2.0]))
    write_statistics(double, RewardStatistics([0.1, -0.1], [1.0, 3.0], "min"))
    models = [single, double, _built(pretrained, seed=2)]  # the last as it is
    folders = [export_model(model, None, tmp_path / f"r{n}") for n, model in enumerate(models)]
    expected = []
    for text in TEXTS:
        first, second, third = (_by_transformers(model, text).tolist() for model in models)
        own = [
            (first[0] - 0.5) / 2.0,
            min((second[0] - 0.1) / 1.0, (second[1] + 0.1) / 3.0),
            third[0],
        ]
        mean = sum(own) / 3
        spread = (sum((value - mean) ** 2 for value in own) / 3) ** 0.5
        expected.append(
            {"mean": mean, "min": min(own), "mean_minus_std": mean - spread}[aggregation]
        )
    for batch_size in (1, 2, 16):
        judge = load_reward_models(folders, aggregation=aggregation, batch_size=batch_size)
        found = judge.scores(TEXTS)
        assert found.shape == (5,)
        assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert judge.scores([]).shape == (0,)
    with pytest.raises(ValueError, match="without tokens"):
        judge.scores([[1], []])


def test_a_judge_neither_drops_out_nor_keeps_graphs(folder) -> None:
    model = _built(folder(), dropout=0.5).train()
    judge = RewardEnsemble([add_adapter(model, AdapterConfig(r=2, dropout=0.5))])
    assert torch.equal(judge.scores(TEXTS), judge.scores(TEXTS))
    assert not judge.scores(TEXTS).requires_grad


def test_what_is_no_judge(folder) -> None:
    with pytest.raises(UserError, match="holds no reward model, but a LlamaForCausalLM"):
        load_reward_models([folder()])
    with pytest.raises(UserError, match="at least one reward model"):
        load_reward_models([])
    with pytest.raises(UserError, match="'median'"):
        RewardEnsemble([_built(folder())], aggregation="median")
