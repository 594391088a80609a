"""Exports: complete, checked, and never half there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from lit_llm.errors import UserError
from lit_llm.models import (
    ExportError,
    check_export_folder,
    compile_blocks,
    export_model,
    keep_buffer_dtypes,
)

TOKENS = torch.arange(40).view(2, 20)


def _reloaded_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits


@pytest.mark.parametrize(
    ("model_type", "tied"),
    [("llama", True), ("llama", False), ("qwen3", True), ("gpt2", True), ("gemma2", True)],
)
def test_round_trip(tiny_model, tokenizer, tmp_path: Path, model_type: str, tied: bool) -> None:
    from transformers import AutoTokenizer

    model = tiny_model(model_type, tie_word_embeddings=tied).train()
    folder = export_model(model, tokenizer, tmp_path / "out" / "model")
    assert model.training
    assert torch.equal(_reloaded_logits(folder), model.eval()(TOKENS).logits)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    reread = AutoTokenizer.from_pretrained(folder)
    assert reread("brown fox")["input_ids"] == tokenizer("brown fox")["input_ids"]
    assert reread.chat_template == tokenizer.chat_template
    assert (folder / "generation_config.json").is_file()
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied


def test_model_cast_to_bfloat16_exports_as_itself(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("llama")
    keep_buffer_dtypes(model)
    folder = export_model(model.bfloat16(), None, tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    # Without that the rotary frequencies are rounded, which the export notices.
    with pytest.raises(ExportError, match="logits"):
        export_model(tiny_model("llama").bfloat16(), None, tmp_path / "other")


def test_model_with_compiled_blocks_exports_without_compiling(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("llama")
    expected = model(TOKENS).logits
    compile_blocks(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    folder = export_model(model, None, tmp_path / "model")
    assert torch.equal(_reloaded_logits(folder), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_an_export_is_replaced_as_a_whole(tiny_model, tokenizer, tmp_path: Path) -> None:
    folder = export_model(tiny_model("gpt2"), tokenizer, tmp_path / "model")
    model = tiny_model("llama")
    export_model(model, None, folder)
    assert torch.equal(_reloaded_logits(folder), model(TOKENS).logits)
    assert not (folder / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("strange", ["notes.txt", "data/text.jsonl", "optimizer.pt"])
def test_folders_with_other_files_are_left_alone(tiny_model, tmp_path: Path, strange: str) -> None:
    folder = export_model(tiny_model("gpt2"), None, tmp_path / "model")
    (folder / strange).parent.mkdir(exist_ok=True)
    (folder / strange).write_text("mine")
    for attempt in (
        lambda: export_model(tiny_model("llama"), None, folder),
        lambda: check_export_folder(folder),
    ):
        with pytest.raises(UserError, match=strange.split("/")[0]):
            attempt()
    assert (folder / strange).read_text() == "mine"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gpt2"


def test_places_that_cannot_be_written(tiny_model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        export_model(tiny_model("llama"), None, tmp_path / "file")
    with pytest.raises(UserError, match="cannot write"):
        export_model(tiny_model("llama"), None, tmp_path / "file" / "model")
    check_export_folder(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    export_model(tiny_model("llama"), None, tmp_path / "empty")


@pytest.mark.parametrize("damage", ["weights", "nan", "killed"])
def test_a_failed_export_leaves_the_one_before(
    tiny_model, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export_model(tiny_model("gpt2"), None, tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    model = tiny_model("llama")
    save = type(model).save_pretrained

    def damaged(self, path: Path) -> None:
        if damage == "killed":
            save(self, path)
            raise KeyboardInterrupt
        weight = self.model.layers[1].mlp.down_proj.weight
        original = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.01)
            save(self, path)
            weight.copy_(original)

    if damage == "nan":
        with torch.no_grad():
            model.model.norm.weight[0] = float("nan")
    else:
        monkeypatch.setattr(type(model), "save_pretrained", damaged)
    with pytest.raises(KeyboardInterrupt if damage == "killed" else ExportError):
        export_model(model, None, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_export_that_cannot_take_its_place_puts_the_old_one_back(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export_model(tiny_model("gpt2"), None, tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    replace, calls = os.replace, []

    def failing(source: Path, target: Path) -> None:
        if Path(target) == folder and not calls:
            calls.append(source)
            raise OSError("no room")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no room"):
        export_model(tiny_model("llama"), None, folder)
    assert calls
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_tokenizer_that_does_not_survive_is_noticed(
    tiny_model, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = type(tokenizer).save_pretrained

    def forgetful(self, path: Path) -> None:
        save(self, path)
        (path / "chat_template.jinja").unlink()

    monkeypatch.setattr(type(tokenizer), "save_pretrained", forgetful)
    with pytest.raises(ExportError, match="tokenizer"):
        export_model(tiny_model("llama"), tokenizer, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif("LIT_LLM_MODELS" not in os.environ, reason="LIT_LLM_MODELS is not set")
def test_real_weights_round_trip(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(os.environ["LIT_LLM_MODELS"]) / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    folder = export_model(model, tokenizer, tmp_path / "model")
    tokens = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
