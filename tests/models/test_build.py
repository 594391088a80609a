"""Building and loading models, and the sentences for everything that can be wrong with them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from lit_llm.errors import UserError
from lit_llm.models import (
    PRESETS,
    BaseModelConfig,
    build_model,
    preset_config,
    resolve_config,
    set_stop_tokens,
    vocabulary_of,
)

# Presets whose name counts every parameter, and the published count.
PUBLISHED = {"llama-135m": 134_515_008, "qwen3-600m": 596_049_920, "gpt2-124m": 124_439_808}


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_names_tell_the_size(preset: str) -> None:
    with torch.device("meta"):
        model = build_model(
            BaseModelConfig(preset=preset), vocab_size=1000, eos_token_id=2, seq_len=512
        )
    total = sum(parameter.numel() for parameter in model.parameters())
    if preset in PUBLISHED:
        assert total == PUBLISHED[preset]
        size = total
    else:
        tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
        size = total - sum(table.weight.numel() for table in tables)
    named = float(preset.rpartition("-")[2].removesuffix("m")) * 1e6
    assert size == pytest.approx(named, rel=0.06)
    assert model.config.tie_word_embeddings


def test_a_preset_is_a_default_that_a_config_replaces_or_fills() -> None:
    whole = {"model_type": "gpt2", "n_layer": 3}
    assert resolve_config(BaseModelConfig(preset="llama-1m", config=whole)).n_layer == 3
    part = resolve_config(BaseModelConfig(preset="llama-1m", config={"num_hidden_layers": 9}))
    assert (part.model_type, part.num_hidden_layers, part.hidden_size) == ("llama", 9, 128)


def test_presets_are_copies() -> None:
    preset_config("llama-135m")["rope_parameters"]["rope_theta"] = 1.0
    assert preset_config("llama-135m")["rope_parameters"]["rope_theta"] == 100000.0


def test_preset_takes_vocabulary_positions_and_ids_of_its_use() -> None:
    model = build_model(
        BaseModelConfig(preset="gpt2-1m"),
        vocab_size=301,
        pad_token_id=0,
        bos_token_id=7,
        eos_token_id=9,
        seq_len=48,
    )
    assert model.get_input_embeddings().weight.shape == (301, 128)
    assert model.transformer.wpe.weight.shape[0] == 48
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 7, 9)
    assert model.training
    assert model(torch.arange(48)[None]).logits.shape == (1, 48, 301)


def test_ids_the_tokenizer_lacks_are_none_and_not_the_defaults_of_transformers() -> None:
    model = build_model(BaseModelConfig(preset="llama-1m"), vocab_size=50, eos_token_id=3)
    assert (model.config.pad_token_id, model.config.bos_token_id) == (None, None)
    assert model.config.eos_token_id == 3


def test_positions_given_by_the_config_stay(tiny_config) -> None:
    config = BaseModelConfig(config=tiny_config("gpt2"))
    assert build_model(config, seq_len=16).config.n_positions == 64


def test_same_seed_same_weights_and_dtype() -> None:
    def build(dtype: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        config = BaseModelConfig(preset="llama-1m", dtype=dtype)
        return build_model(config, vocab_size=64, seq_len=8).state_dict()

    first, second = build("float32"), build("float32")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert {tensor.dtype for tensor in build("bfloat16").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("preset", "fields"),
    [
        ("llama-1m", ["attention_dropout"]),
        ("qwen3-1m", ["attention_dropout"]),
        ("gpt2-1m", ["resid_pdrop", "embd_pdrop", "attn_pdrop"]),
    ],
)
def test_dropout_reaches_the_forward(preset: str, fields: list[str]) -> None:
    tokens = torch.arange(8)[None]
    for dropout in (None, 0.5):
        model = build_model(BaseModelConfig(preset=preset, dropout=dropout), vocab_size=64)
        assert [getattr(model.config, field) for field in fields] == [dropout or 0.0] * len(fields)
        first, second = model(tokens).logits, model(tokens).logits
        assert torch.equal(first, second) is (dropout is None)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    tokens = torch.arange(8)[None]
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = BaseModelConfig(preset="llama-1m", gradient_checkpointing=checkpointing)
        model = build_model(config, vocab_size=64)
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) is (
            checkpointing
        )
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_token_that_is_padding_and_end_at_once_still_learns() -> None:
    tokens = torch.tensor([[5, 2, 6]])
    for pad, learns in ((2, True), (1, False)):
        model = build_model(
            BaseModelConfig(preset="llama-1m"), vocab_size=64, pad_token_id=pad, eos_token_id=2
        )
        embedding = model.get_input_embeddings()
        embedding(torch.tensor([[pad]])).sum().backward()
        assert bool(embedding.weight.grad[pad].any()) is learns
        assert model(tokens).logits.isfinite().all()


def test_vocabulary_of_a_tokenizer(tokenizer) -> None:
    size = len(tokenizer)
    assert vocabulary_of(tokenizer) == {
        "vocab_size": size,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    tokenizer.add_tokens(["<extra>"])
    assert vocabulary_of(tokenizer)["vocab_size"] == size + 1


@pytest.fixture
def saved(tiny_model, tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_pretrained_folder(saved: Path, tiny_model) -> None:
    config = BaseModelConfig(pretrained=str(saved), attn_implementation="eager", dropout=0.25)
    model = build_model(config, vocab_size=90, pad_token_id=3, eos_token_id=4, seq_len=64)
    expected = tiny_model("llama")
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(model.eval()(tokens).logits, expected(tokens).logits)
    assert model.config._attn_implementation == "eager"
    assert model.config.attention_dropout == 0.25
    assert (model.config.pad_token_id, model.generation_config.eos_token_id) == (3, 4)
    assert model.config.bos_token_id == 1  # the tokenizer had none to put in its place


def test_several_stop_tokens_of_a_chat_model_stay(saved: Path) -> None:
    path = saved / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, 5]}))
    model = build_model(BaseModelConfig(pretrained=str(saved)), vocab_size=97, eos_token_id=5)
    assert model.generation_config.eos_token_id == [2, 5]
    model = build_model(BaseModelConfig(pretrained=str(saved)), vocab_size=97, eos_token_id=6)
    assert model.generation_config.eos_token_id == 6


def test_config_alone_needs_no_weights() -> None:
    config = resolve_config(BaseModelConfig(preset="llama-60m"), vocab_size=123, seq_len=77)
    assert (config.vocab_size, config.max_position_embeddings) == (123, 77)


def _refused(config: BaseModelConfig, *words: str, **options) -> None:
    with pytest.raises(UserError) as caught:
        build_model(config, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["one of pretrained", "none"]),
        ({"config": {"model_type": "llama"}, "pretrained": "x"}, ["pretrained or config"]),
        ({"preset": "lama-5m"}, ["'lama-5m'", "llama-5m"]),
        ({"preset": "zzz"}, ["llama-1m", "gpt2-124m"]),
        ({"config": {"model_type": "lama"}}, ["'lama'", "llama"]),
        ({"config": {"hidden_size": 8}}, ["model_type", "llama"]),
        ({"config": {"model_type": "t5"}}, ["'t5'", "causal"]),
        (
            {"config": {"model_type": "llama", "hidden_sizes": 8, "foo_bar_baz": 1}},
            ["'hidden_sizes' (did you mean 'hidden_size'?)", "'foo_bar_baz'"],
        ),
        (
            {"config": {"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4}},
            ["llama", "65"],
        ),
        ({"config": {"model_type": "llama", "hidden_size": "big"}}, ["hidden_size", "int"]),
        ({"preset": "llama-1m", "dropout": 1.0}, ["dropout", "1.0"]),
        ({"preset": "llama-1m", "dtype": "float16"}, ["'float16'", "bfloat16"]),
        ({"preset": "llama-1m", "revision": "main"}, ["revision"]),
        ({"preset": "llama-1m", "attn_implementation": "sdp"}, ["sdp", "eager"]),
        (
            {"config": {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1}}
            | {"dropout": 0.1, "attn_implementation": "eager"},
            ["mamba", "no dropout"],
        ),
    ],
)
def test_what_cannot_be_built_is_said(options: dict, words: list[str]) -> None:
    _refused(BaseModelConfig(**options), *words)


def test_old_names_of_fields_are_known() -> None:
    values = preset_config("llama-1m") | {"rope_theta": 500.0, "head_dim": 16}
    model = build_model(BaseModelConfig(config=values), vocab_size=64)
    assert model.config.rope_parameters["rope_theta"] == 500.0


def test_vocabulary_that_does_not_fit(tiny_config, saved: Path) -> None:
    for config, cure in (
        (BaseModelConfig(config=tiny_config("llama")), "leave vocab_size out"),
        (
            BaseModelConfig(pretrained=str(saved)),
            "or set resize_embeddings",
        ),
        (BaseModelConfig(config=tiny_config("llama"), resize_embeddings=True), "leave vocab_size"),
    ):
        _refused(config, "98", "97", cure, vocab_size=98)
        assert build_model(config, vocab_size=97).config.vocab_size == 97


@pytest.mark.parametrize("tied", [True, False])
def test_a_larger_tokenizer_gets_new_rows_when_asked_for(
    tiny_model, tmp_path: Path, tied: bool
) -> None:
    from lit_llm.models import export_model

    original = tiny_model("llama", tie_word_embeddings=tied)
    original.save_pretrained(tmp_path / "model")
    config = BaseModelConfig(pretrained=str(tmp_path / "model"), resize_embeddings=True)
    assert resolve_config(config, vocab_size=101).vocab_size == 101
    assert resolve_config(config, vocab_size=90).vocab_size == 97
    model = build_model(config, vocab_size=101, eos_token_id=100)
    assert (model.config.vocab_size, model.generation_config.eos_token_id) == (101, 100)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    for new, old in (
        (model.model.embed_tokens.weight, original.model.embed_tokens.weight),
        (model.lm_head.weight, original.lm_head.weight),
    ):
        assert torch.equal(new[:97], old)
        assert new.shape == (101, 32)
        # Near the mean of the old rows: much nearer than these are to it.
        distance = (new[97:] - old.mean(0)).norm(dim=1)
        assert distance.max() < 0.1 * (old - old.mean(0)).norm(dim=1).min()
    tokens = torch.tensor([[1, 97, 100]])
    assert model.eval()(tokens).logits.shape == (1, 3, 101)
    export_model(model, None, tmp_path / "grown")
    same = build_model(config, vocab_size=97)
    assert torch.equal(same.model.embed_tokens.weight, original.model.embed_tokens.weight)


@pytest.mark.parametrize("wrapped", [False, True])
def test_stop_tokens_reach_the_exported_folder(tiny_model, tmp_path: Path, wrapped: bool) -> None:
    from lit_llm.models import AdapterConfig, add_adapter, export_model, merged_copy

    model = tiny_model("llama")
    if wrapped:
        model = add_adapter(model, AdapterConfig(r=2))
    for ids, expected in (([7], 7), ([7, 2, 7], [7, 2])):
        set_stop_tokens(model, ids)
        folder = export_model(merged_copy(model), None, tmp_path / "model")
        values = json.loads((folder / "generation_config.json").read_text())
        assert values["eos_token_id"] == expected
    # Building it again with a tokenizer that knows one of them loses neither.
    again = build_model(BaseModelConfig(pretrained=str(folder)), vocab_size=97, eos_token_id=7)
    assert again.generation_config.eos_token_id == [7, 2]
    for wrong in ([], [97], [-1]):
        with pytest.raises(UserError, match="stop tokens"):
            set_stop_tokens(model, wrong)


def test_sequence_longer_than_the_positions(tiny_config, saved: Path) -> None:
    for config in (
        BaseModelConfig(config=tiny_config("gpt2")),
        BaseModelConfig(preset="gpt2-124m"),
        BaseModelConfig(pretrained=str(saved)),
    ):
        limit = 1024 if config.preset else 64
        _refused(config, f"{limit + 1} ", f"{limit} positions", seq_len=limit + 1)


def test_folders_that_hold_no_model(tmp_path: Path, saved: Path) -> None:
    def pretrained(path: object) -> BaseModelConfig:
        return BaseModelConfig(pretrained=str(path))

    _refused(pretrained(tmp_path / "nowhere"), "nowhere", "does not exist")
    empty = tmp_path / "empty"
    empty.mkdir()
    _refused(pretrained(empty), "empty", "no config.json", "no weights")
    (empty / "config.json").write_text((saved / "config.json").read_text())
    _refused(pretrained(empty), "no weights")
    _refused(pretrained(saved / "config.json"), "is a file")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    _refused(pretrained(adapter), "adapter", "merge")


def test_damaged_weights(saved: Path) -> None:
    config = BaseModelConfig(pretrained=str(saved))
    weights = saved / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    _refused(config, str(saved), "cannot be loaded")
    weights.write_bytes(content)
    (saved / "config.json").write_text("{")
    _refused(config, str(saved), "cannot be loaded")


def test_weights_that_lack_a_layer_or_have_another_shape(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = BaseModelConfig(pretrained=str(saved))
    tensors = load_file(saved / "model.safetensors")
    lacking = {key: value for key, value in tensors.items() if ".layers.1." not in key}
    save_file(lacking, saved / "model.safetensors", metadata={"format": "pt"})
    _refused(config, "lack 9 tensors", "model.layers.1.")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    _refused(config, "cannot be loaded")


def test_name_the_hub_does_not_hand_out() -> None:
    _refused(BaseModelConfig(pretrained="nobody/nothing"), "nobody/nothing", "Hub", "network")


def test_remote_code_is_off(saved: Path) -> None:
    values = json.loads((saved / "config.json").read_text())
    values |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.MyConfig"}}
    (saved / "config.json").write_text(json.dumps(values))
    (saved / "code.py").write_text("raise SystemExit('this code ran')")
    config = BaseModelConfig(pretrained=str(saved))
    assert not config.trust_remote_code
    _refused(config, "trust_remote_code")


def test_config_is_plain_data() -> None:
    config = BaseModelConfig(preset="llama-1m")
    assert BaseModelConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.skipif("LIT_LLM_MODELS" not in os.environ, reason="LIT_LLM_MODELS is not set")
def test_real_weights_model_english() -> None:
    from transformers import AutoTokenizer

    from lit_llm.models import causal_lm_statistics

    folder = os.path.join(os.environ["LIT_LLM_MODELS"], "stories260k")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = build_model(
        BaseModelConfig(pretrained=folder), **vocabulary_of(tokenizer), seq_len=512
    ).eval()
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside."
    nll = []
    for words in (text, " ".join(reversed(text.split()))):
        tokens = tokenizer(words, return_tensors="pt")["input_ids"]
        loss, _, is_target = causal_lm_statistics(model, tokens, tokens)
        nll.append((loss.sum() / is_target.sum()).item())
    assert nll[0] < 2.0 < nll[1]
