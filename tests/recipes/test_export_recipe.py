"""recipes/export.py as a user runs it."""

import importlib.util
from pathlib import Path

import pytest
import torch

from lit_llm.data.chat_tokenizer import load_chat_tokenizer
from lit_llm.data.tokenizer import load_tokenizer
from lit_llm.models import (
    AdapterConfig,
    BaseModelConfig,
    RewardStatistics,
    add_adapter,
    build_model,
    build_reward_model,
    export_model,
    read_statistics,
    save_adapter,
    set_stop_tokens,
    vocabulary_of,
    write_statistics,
)

RECIPE = Path(__file__).parents[2] / "recipes" / "export.py"
TOKENS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("export_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> Path:
    """A model folder with its tokenizer, of 320 tokens at most."""
    tokenizer = load_tokenizer(tiny / "tokenizer")
    model = build_model(BaseModelConfig(preset="llama-1m"), **vocabulary_of(tokenizer), seq_len=32)
    return export_model(model, tokenizer, tmp_path / "base")


def _adapter(base: Path, folder: Path, *, new_tokens: int = 0):
    """A model with trained-looking adapters, saved; with a tokenizer of its own where it grew."""
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens([f"<new{number}>" for number in range(new_tokens)])
    config = BaseModelConfig(pretrained=str(base), resize_embeddings=True)
    model = add_adapter(build_model(config, **vocabulary_of(tokenizer)), AdapterConfig(r=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    set_stop_tokens(model, [3, 0])
    save_adapter(model, folder, tokenizer if new_tokens else None)
    return model.eval()


def _logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("new_tokens", [0, 5])
def test_an_adapter_is_merged_into_its_base(main, base, tmp_path, capsys, new_tokens):
    from transformers import AutoModelForCausalLM

    adapted = _adapter(base, tmp_path / "adapter", new_tokens=new_tokens)
    main(
        [
            *("--model", str(base), "--adapter", str(tmp_path / "adapter")),
            *("--output_dir", str(tmp_path / "out")),
        ]
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(_logits(model), _logits(adapted), rtol=0, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert (_logits(model)[..., :100] - _logits(plain)[..., :100]).abs().max() > 1e-2
    assert model.generation_config.eos_token_id == [3, 0]
    tokenizer = load_tokenizer(tmp_path / "out")
    assert len(tokenizer) == len(load_tokenizer(base)) + new_tokens
    assert tokenizer.chat_template == load_tokenizer(base).chat_template
    out = capsys.readouterr().out
    assert str(tmp_path / "out") in out
    assert f"{model.num_parameters():,} parameters" in out


@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_reward_adapters_and_reward_models(main, base, tmp_path, own_tokenizer):
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_chat_tokenizer(str(base))
    config = BaseModelConfig(pretrained=str(base))
    trained = add_adapter(
        build_reward_model(config, heads=2, **vocabulary_of(tokenizer)), AdapterConfig(r=2)
    )
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    statistics = RewardStatistics([0.5, 1.0], [2.0, 3.0], "min")
    write_statistics(trained, statistics)
    adapter = save_adapter(trained, tmp_path / "adapter", tokenizer if own_tokenizer else None)
    first, second, third = (str(tmp_path / name) for name in ("first", "second", "third"))
    main(["--model", str(base), "--adapter", str(adapter), "--output_dir", first])
    main(["--model", first, "--dtype", "bfloat16", "--output_dir", second])
    main(["--model", second, "--adapter", str(adapter), "--output_dir", third])
    found, half, over = (
        AutoModelForSequenceClassification.from_pretrained(one) for one in (first, second, third)
    )
    torch.testing.assert_close(_logits(found), _logits(trained.eval()), rtol=0, atol=1e-5)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(_logits(half).float(), _logits(found), rtol=0.05, atol=0.05)
    for model in (found, half, over):
        assert read_statistics(model.config) == statistics
    assert load_tokenizer(Path(first)).pad_token == tokenizer.pad_token is not None


def test_data_type_and_config_file(main, base, tmp_path):
    from transformers import AutoModelForCausalLM

    settings = tmp_path / "export.yaml"
    settings.write_text(f"model: {base}\noutput_dir: {tmp_path / 'out'}\ndtype: bfloat16\n")
    main(["--config", str(settings)])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("model", "adapter", "sentence"),
    [
        ("BASE/nope", None, "nope"),
        ("BASE", "./nowhere", "'./nowhere' is no adapter folder"),
        ("BASE", "BASE", "has no adapter_config.json"),
    ],
)
def test_mistakes_are_one_sentence(main, base, tmp_path, capsys, model, adapter, sentence):
    arguments = ["--model", model, "--output_dir", str(tmp_path / "out")]
    arguments += ["--adapter", adapter] if adapter else []
    with pytest.raises(SystemExit) as caught:
        main([argument.replace("BASE", str(base)) for argument in arguments])
    assert caught.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert sentence in message
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_is_left_alone_before_anything_is_loaded(main, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        main(["--model", "nobody/nothing", "--output_dir", str(tmp_path)])
    assert "notes.txt" in capsys.readouterr().err
