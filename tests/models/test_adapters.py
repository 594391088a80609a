"""Adapters: train alone, merge exactly, save whole, and refuse what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lit_llm.errors import UserError
from lit_llm.models import (
    AdapterConfig,
    BaseModelConfig,
    add_adapter,
    build_model,
    causal_lm_loss,
    compile_blocks,
    decoder_blocks,
    export_model,
    merge_adapter,
    merged_copy,
    save_adapter,
    set_stop_tokens,
    supports_fused_head,
    trainable_summary,
    unwrap,
)

TOKENS = torch.arange(40).view(2, 20) % 97


def _train(model, steps: int = 3) -> None:
    """A few steps, so that no adapter matrix is zero any more."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    model.train()
    for _ in range(steps):
        (causal_lm_loss(model, TOKENS, TOKENS).loss / TOKENS.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def test_only_adapters_are_trained_and_nothing_changes_before(tiny_model) -> None:
    base = tiny_model("llama")
    before = _logits(base)
    frozen = {name: value.clone() for name, value in base.state_dict().items()}
    model = add_adapter(base, AdapterConfig(r=3))
    assert torch.equal(_logits(model), before)
    assert not model.training
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2  # blocks, linear layers, matrices
    assert all(".lora_" in name and "lm_head" not in name for name in trained)
    _train(model)
    assert (_logits(model) - before).abs().max() > 1e-2
    for name, value in unwrap(model).state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, frozen[name.replace(".base_layer", "")]), name


def test_the_seed_decides_the_start(tiny_model) -> None:
    def start(seed: int) -> torch.Tensor:
        model = tiny_model("llama")
        torch.manual_seed(seed)
        adapted = add_adapter(model, AdapterConfig(r=2))
        return torch.cat([p.flatten() for p in adapted.parameters() if p.requires_grad])

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_the_update_is_scaled_as_documented(tiny_model, rslora: bool, scale: float) -> None:
    base = tiny_model("llama")
    weight = base.model.layers[0].mlp.up_proj.weight.detach().clone()
    model = add_adapter(base, AdapterConfig(r=4, alpha=8, rslora=rslora))
    _train(model)
    layer = unwrap(model).model.layers[0].mlp.up_proj
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    merged = merged_copy(model).model.layers[0].mlp.up_proj.weight
    assert update.abs().max() > 1e-3
    torch.testing.assert_close(merged, weight + scale * update, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "dora"},
        {"rslora": True, "target_modules": ["q_proj", "down_proj"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_merged_copy_gives_the_same_logits_and_exports(
    tiny_model, tmp_path: Path, options: dict, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    base = tiny_model("llama", tie_word_embeddings=tied)
    before = _logits(base)
    model = add_adapter(base, AdapterConfig(r=4, **options))
    assert supports_fused_head(model)
    _train(model)
    expected = _logits(model)
    assert (expected - before).abs().max() > 1e-2
    state = {name: value.clone() for name, value in model.state_dict().items()}

    merged = merged_copy(model)
    torch.testing.assert_close(_logits(merged), expected, rtol=0, atol=1e-5)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is tied
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(_logits(model), expected)
    theirs = {id(p) for p in model.parameters()}
    assert not any(id(p) in theirs for p in merged.parameters())
    again = AutoModelForCausalLM.from_pretrained(export_model(merged, None, tmp_path / "model"))
    torch.testing.assert_close(_logits(again), expected, rtol=0, atol=1e-5)

    # The folder of the adapter, on the base as it was, is the same model.
    folder = save_adapter(model, tmp_path / "adapter")
    fresh = merge_adapter(tiny_model("llama", tie_word_embeddings=tied), folder)
    torch.testing.assert_close(_logits(fresh), expected, rtol=0, atol=1e-5)


def test_model_without_adapters_is_its_own_merged_copy(tiny_model) -> None:
    model = tiny_model("llama")
    assert merged_copy(model) is model


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_bfloat16_base_has_float32_adapters_and_merges_to_bfloat16(
    tiny_model, tmp_path: Path, method: str
) -> None:
    config = BaseModelConfig(preset="llama-1m", dtype="bfloat16")
    base = build_model(config, vocab_size=97)
    model = add_adapter(base, AdapterConfig(method, 2, modules_to_save=["embed_tokens"]))
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    whole = {name for name in trained if "modules_to_save" in name}
    assert whole
    for name, dtype in trained.items():
        assert dtype == (torch.bfloat16 if name in whole else torch.float32), name
    assert _logits(model).isfinite().all()  # without autocast too
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _train(model)
    merged = merged_copy(model)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    export_model(merged, None, tmp_path / "model")


def test_checkpointed_blocked_and_compiled_models_take_adapters() -> None:
    gradients = []
    for options in ({}, {"gradient_checkpointing": True, "attn_implementation": "blocked"}):
        torch.manual_seed(0)
        base = build_model(BaseModelConfig(preset="llama-1m", **options), vocab_size=97)
        model = add_adapter(base, AdapterConfig(r=2))
        assert model.training
        assert len(decoder_blocks(model)) == 6
        causal_lm_loss(model, TOKENS, TOKENS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is not None
        torch.testing.assert_close(plain, checkpointed)
    compile_blocks(model)
    assert decoder_blocks(merged_copy(model))[0]._compiled_call_impl is None


def test_reentrant_checkpointing_reaches_the_first_block(tiny_model) -> None:
    base = tiny_model("llama").train()
    base.gradient_checkpointing_enable({"use_reentrant": True})
    model = add_adapter(base, AdapterConfig(r=2, target_modules=["v_proj"]))
    causal_lm_loss(model, TOKENS, TOKENS).loss.backward()
    layer = unwrap(model).model.layers[0].self_attn.v_proj
    assert layer.lora_B["default"].weight.grad.abs().max() > 0


@pytest.mark.slow
def test_compiled_blocks_with_adapters_have_the_gradients_of_eager_ones(tiny_model) -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = add_adapter(tiny_model("llama").train(), AdapterConfig(r=2))
        if compiled:
            compile_blocks(model)
        causal_lm_loss(model, TOKENS, TOKENS).loss.backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    assert any(gradient.any() for gradient in results[0])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_saved_adapter_is_one_of_peft(tiny_model, tokenizer, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoTokenizer

    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = BaseModelConfig(pretrained=str(tmp_path / "base"))
    model = add_adapter(build_model(base), AdapterConfig("dora", 2))
    set_stop_tokens(model, [2, 7])
    _train(model)
    folder = save_adapter(model, tmp_path / "out" / "adapter", tokenizer)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert (config["r"], config["use_dora"], config["task_type"]) == (2, True, "CAUSAL_LM")
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    assert not (folder / "README.md").exists()
    again = PeftModel.from_pretrained(build_model(base), folder).eval()
    torch.testing.assert_close(_logits(again), _logits(model), rtol=0, atol=1e-6)
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    assert merge_adapter(build_model(base), folder).generation_config.eos_token_id == [2, 7]


def test_an_adapter_folder_is_replaced_whole_and_a_foreign_one_left_alone(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_adapter(tiny_model("llama"), AdapterConfig(r=2))
    folder = save_adapter(model, tmp_path / "adapter")
    before = (folder / "adapter_model.safetensors").read_bytes()
    _train(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "save_pretrained", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_adapter(model, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    save_adapter(model, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        save_adapter(model, folder)
    with pytest.raises(UserError, match="no adapters"):
        save_adapter(tiny_model("llama"), tmp_path / "other")


def test_grown_embedding_goes_with_the_adapter(tiny_model, tmp_path: Path) -> None:
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    config = BaseModelConfig(pretrained=str(tmp_path / "base"), resize_embeddings=True)
    for number, saved in enumerate((None, ["embed_tokens"])):
        torch.manual_seed(1)
        model = build_model(config, vocab_size=101)
        model = add_adapter(model, AdapterConfig(r=2, modules_to_save=saved))
        _train(model)
        folder = save_adapter(model, tmp_path / f"adapter{number}")
        torch.manual_seed(2)  # other new rows, were they not saved
        merged = merge_adapter(build_model(config, vocab_size=101), folder).eval()
        tokens = torch.tensor([[97, 98, 99, 100]])
        with torch.no_grad():
            expected = model(input_ids=tokens).logits
            torch.testing.assert_close(merged(tokens).logits, expected, rtol=0, atol=1e-5)


def test_summary_counts_each_parameter_once(tiny_model) -> None:
    base = tiny_model("llama", tie_word_embeddings=True)
    total = 97 * 32 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32) + 32
    assert trainable_summary(base) == f"trainable: {total:,} of {total:,} parameters (100.00 %)"
    model = add_adapter(base, AdapterConfig(r=2, target_modules=["q_proj"]))
    own = 2 * (2 * 32 + 32 * 2)
    share = 100 * own / (total + own)
    expected = f"trainable: 256 of {total + own:,} parameters ({share:.2f} %)"
    assert trainable_summary(model) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "lorra"}, ["'lorra'", "lora, dora or qlora"]),
        ({"r": 0}, ["r 0"]),
        ({"dropout": 1.0}, ["dropout 1.0"]),
        ({"target_modules": []}, ["target_modules", "all-linear"]),
        ({"target_modules": ["q_prj"]}, ["'q_prj'", "q_proj"]),
        ({"target_modules": "c_attn"}, ["'c_attn'", "q_proj"]),
        ({"target_modules": ["lm_head"]}, ["'lm_head'", "modules_to_save"]),
        ({"target_modules": ["embed_tokens"]}, ["'embed_tokens'", "modules_to_save"]),
        ({"target_modules": ["input_layernorm"]}, ["no linear layer 'input_layernorm'"]),
        ({"modules_to_save": ["embed"]}, ["modules_to_save", "'embed'", "embed_tokens"]),
        ({"method": "qlora"}, ["qlora", "4 bits"]),
    ],
    ids=str,
)
def test_what_cannot_be_is_said(tiny_model, options: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        add_adapter(tiny_model("llama", tie_word_embeddings=True), AdapterConfig(**options))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_folders_that_are_no_adapter_of_the_model(tiny_model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        merge_adapter(tiny_model("llama"), tmp_path / "nowhere")
    folder = save_adapter(add_adapter(tiny_model("llama"), AdapterConfig(r=2)), tmp_path / "a")
    other = tiny_model("llama", hidden_size=64)
    with pytest.raises(UserError, match="does not go onto"):
        merge_adapter(other, folder)
    with pytest.raises(UserError, match="does not go onto"):
        merge_adapter(tiny_model("gpt2"), folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="does not go onto"):
        merge_adapter(tiny_model("llama"), folder)


def test_adapters_that_went_astray_are_not_merged(tiny_model) -> None:
    model = add_adapter(tiny_model("llama"), AdapterConfig(r=2))
    _train(model)
    with torch.no_grad():
        unwrap(model).model.layers[1].mlp.up_proj.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="cannot be merged"):
        merged_copy(model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without CUDA")
def test_qlora_without_cuda_names_the_way_out(tiny_model, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    adapter = AdapterConfig("qlora")
    assert (adapter.quantization, AdapterConfig("dora").quantization) == ("nf4", None)
    with pytest.raises(UserError, match="CUDA device; use method: lora"):
        build_model(
            BaseModelConfig(pretrained=str(tmp_path / "base")), quantization=adapter.quantization
        )
    with pytest.raises(UserError, match="only a pretrained model"):
        build_model(BaseModelConfig(preset="llama-1m"), quantization="nf4")


@pytest.mark.gpu
def test_qlora_trains_on_four_bits_and_merges_into_the_whole_weights(
    tiny_model, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tiny_model("llama", hidden_size=64).save_pretrained(tmp_path / "base")
    adapter = AdapterConfig("qlora", r=4)
    base = BaseModelConfig(pretrained=str(tmp_path / "base"), gradient_checkpointing=True)
    model = add_adapter(build_model(base, quantization=adapter.quantization), adapter)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    layer = unwrap(model).model.layers[0].mlp.up_proj
    assert layer.base_layer.weight.dtype == torch.uint8
    tokens = TOKENS.to(layer.base_layer.weight.device)
    causal_lm_loss(model, tokens, tokens).loss.backward()
    assert layer.lora_B["default"].weight.grad.abs().max() > 0
    merged = merged_copy(model)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    export_model(merged, None, tmp_path / "model")
