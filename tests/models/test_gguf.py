"""GGUF files: read as the model they were written from, and handed on as plain folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from lit_llm.errors import UserError
from lit_llm.models import (
    BaseModelConfig,
    build_model,
    export_model,
    resolve_config,
    vocabulary_of,
)

pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")

TOKENS = torch.arange(40).view(2, 20)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_comes_back_and_exports_as_a_plain_folder(
    tiny_model, write_gguf, tmp_path: Path, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    original = tiny_model("llama", tie_word_embeddings=tied)
    write_gguf(tmp_path / "tiny.GGUF", original)
    config = BaseModelConfig(pretrained=str(tmp_path / "tiny.GGUF"))
    model = build_model(config, vocab_size=97, pad_token_id=0, eos_token_id=2, seq_len=64).eval()
    with torch.no_grad():
        expected = original(TOKENS).logits
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0, atol=1e-5)
    assert model.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert model.name_or_path == str(tmp_path / "tiny.GGUF")

    folder = export_model(model, None, tmp_path / "plain")
    values = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in values
    assert values["tie_word_embeddings"] is tied
    again = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_quantized_blocks_are_unpacked_to_the_asked_dtype(
    tiny_model, write_gguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    add = gguf.GGUFWriter.add_tensor

    def quantized(self, name, tensor, **options) -> None:
        if "ffn" in name and tensor.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_0
            tensor = gguf.quants.quantize(tensor, kind)
            options["raw_dtype"] = kind
        add(self, name, tensor, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", quantized)
    original = tiny_model("llama", intermediate_size=64)
    write_gguf(tmp_path / "tiny.gguf", original)
    config = BaseModelConfig(pretrained=str(tmp_path / "tiny.gguf"), dtype="bfloat16")
    model = build_model(config)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert (weight.dtype, weight.shape) == (torch.bfloat16, (64, 32))
    # Blocks of 32 weights share a scale with 4 bits: off by a sixteenth of the largest or so.
    exact = original.model.layers[0].mlp.up_proj.weight
    assert 0 < (weight.float() - exact).abs().max() < exact.abs().max() / 7


def test_the_tokenizer_of_the_file_is_the_models(
    tiny_model, tokenizer, write_gguf, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=300), tokenizer)
    found = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    model = build_model(
        BaseModelConfig(pretrained=str(tmp_path / "tiny.gguf")), **vocabulary_of(found)
    )
    export_model(model, found, tmp_path / "plain")
    again = AutoTokenizer.from_pretrained(tmp_path / "plain")
    for text in ("the quick brown fox", "naïve façades, 3.5 €\n\tjumps()!<eos>"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    assert (model.config.pad_token_id, model.config.eos_token_id) == (0, 2)


def test_config_without_weights(tiny_model, write_gguf, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    config = BaseModelConfig(pretrained=str(tmp_path / "tiny.gguf"))
    found = resolve_config(config, vocab_size=97)
    assert (found.hidden_size, found.num_key_value_heads, found.vocab_size) == (32, 2, 97)
    with pytest.raises(UserError, match="98 tokens"):
        resolve_config(config, vocab_size=98)


def _refused(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        build_model(BaseModelConfig(pretrained=str(path)))
    message = str(caught.value)
    assert "\n" not in message
    for word in (path.name, *words):
        assert word in message, message


def test_files_that_are_no_model(tiny_model, write_gguf, tmp_path: Path) -> None:
    _refused(tmp_path / "nowhere.gguf", "does not exist")
    (tmp_path / "text.gguf").write_text("once upon a time")
    _refused(tmp_path / "text.gguf", "no GGUF file")
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    content = (tmp_path / "tiny.gguf").read_bytes()
    for size in (6, 40, len(content) // 50, len(content) // 2, len(content) - 64):
        (tmp_path / "half.gguf").write_bytes(content[:size])
        _refused(tmp_path / "half.gguf", "cannot be loaded")
    (tmp_path / "odd.gguf").write_bytes(content.replace(b"llama", b"limmo"))
    _refused(tmp_path / "odd.gguf", "cannot be loaded", "limmo")


def test_packages_that_are_missing(
    tiny_model, write_gguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_llm.models import gguf as reader

    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    monkeypatch.setattr(reader, "find_spec", lambda name: None if name == "gguf" else sys)
    _refused(tmp_path / "tiny.gguf", "pip install gguf")
    monkeypatch.setattr(reader, "find_spec", lambda name: None)
    _refused(tmp_path / "tiny.gguf", "pip install gguf accelerate")


def test_the_tokenizer_inside_is_loaded_and_fine_tuning_starts_from_it(
    tiny_model, tokenizer, write_gguf, tmp_path: Path
) -> None:
    from lit_llm.data.tokenizer import load_tokenizer
    from lit_llm.modules.sft import SFTModule

    size = 300  # transformers adds an <|endoftext|> to such tokenizers
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model("llama", vocab_size=size), tokenizer)
    loaded = load_tokenizer(path)
    text = "the quick brown fox: naïve"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert loaded(text, add_special_tokens=False)["input_ids"] == ids
    assert loaded.eos_token == "<eos>"
    module = SFTModule(BaseModelConfig(pretrained=str(path)), tokenizer=str(path), seq_len=32)
    module.configure_model()
    assert module.model.get_input_embeddings().weight.shape[0] == size


def test_a_damaged_or_missing_tokenizer_file_is_said(tmp_path: Path) -> None:
    from lit_llm.data.tokenizer import load_tokenizer

    with pytest.raises(UserError, match="there is no such .gguf file"):
        load_tokenizer(tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(range(40)))
    with pytest.raises(UserError, match="the tokenizer in it cannot be read"):
        load_tokenizer(tmp_path / "bad.gguf")
