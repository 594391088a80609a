"""Exports: complete, checked, and never half there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from lit_llm.errors import UserError
from lit_llm.models import (
    BaseModelConfig,
    ExportError,
    build_reward_model,
    check_export_folder,
    compile_blocks,
    export_model,
    keep_buffer_dtypes,
    score,
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


# ----- reward models ------------------------------------------------------------------------------


def _reward_model(dtype: str = "float32", heads: int = 2, pad: int | None = 0, **changes):
    torch.manual_seed(0)
    preset = changes.pop("preset", "llama-1m")
    config = BaseModelConfig(preset=preset, dtype=dtype, config=changes or None)
    ids = {"vocab_size": 97, "pad_token_id": pad, "eos_token_id": 2}
    return build_reward_model(config, heads=heads, seq_len=32, **ids)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    # 57 and 68 are what the texts of the export's own comparison would end with.
    ("preset", "pad"),
    [("llama-1m", 0), ("llama-1m", 96), ("gpt2-1m", 57), ("qwen3-1m", 68)],
)
def test_transformers_scores_with_the_exported_reward_model(
    tokenizer, tmp_path: Path, preset: str, pad: int, dtype: str
) -> None:
    from transformers import AutoModelForSequenceClassification

    model = _reward_model(dtype, preset=preset, pad=pad)
    folder = export_model(model, tokenizer, tmp_path / "reward")
    assert model.training
    again = AutoModelForSequenceClassification.from_pretrained(folder)
    assert again.config.architectures == [type(model).__name__]
    assert (folder / "tokenizer.json").is_file()
    tokens = TOKENS.clone()
    mask = torch.ones_like(tokens)
    mask[1, 13:] = 0
    tokens[1, 13:] = pad
    with torch.no_grad():
        found = again(tokens, attention_mask=mask).logits.float()
        expected = score(model.eval(), tokens, mask)
    atol = 1e-5 if dtype == "float32" else 0.02
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("pad", "eos", "words"),
    [(None, 2, "no padding token"), (2, 2, "ends texts too"), (7, [2, 7], "ends texts too")],
)
def test_reward_models_without_padding_of_their_own_are_refused(
    tmp_path: Path, pad: int | None, eos: int | list[int], words: str
) -> None:
    model = _reward_model()
    model.config.pad_token_id, model.config.eos_token_id = pad, eos
    with pytest.raises(UserError, match=words):
        export_model(model, None, tmp_path / "reward")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["head", "block", "pooling", "nan"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reward_model_that_others_would_score_otherwise_is_not_exported(
    tmp_path: Path, damage: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _reward_model(dtype)
    save = type(model).save_pretrained

    def damaged(self, path: Path) -> None:
        weight = self.score.weight if damage == "head" else self.model.layers[2].mlp.up_proj.weight
        original = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.02)
            save(self, path)
            weight.copy_(original)

    def ignorant(self, path: Path) -> None:  # of what pads: the score is read after the text
        save(self, path)
        values = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(values | {"pad_token_id": 95}))

    if damage == "nan":
        with torch.no_grad():
            model.score.weight[0, 0] = float("nan")
    else:
        how = ignorant if damage == "pooling" else damaged
        monkeypatch.setattr(type(model), "save_pretrained", how)
    with pytest.raises(ExportError, match="scores"):
        export_model(model, None, tmp_path / "reward")
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
