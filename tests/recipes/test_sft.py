"""The fine-tuning recipe run whole, with and without adapters, and its answers to bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sft
import torch
import yaml
from safetensors.torch import load_file

from tests.recipes.sft_runs import LORA, arguments

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def full(tiny_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that trained all weights."""
    output = tmp_path_factory.mktemp("full")
    sft.main(arguments(tiny_chat, output, f"--export_dir={output / 'model'}"))
    return output


@pytest.fixture(scope="module")
def lora(tiny_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that trained adapters."""
    output = tmp_path_factory.mktemp("lora")
    rate = "--model.optimizer.init_args.lr=0.05"
    sft.main(arguments(tiny_chat, output, *LORA, rate, f"--export_dir={output / 'model'}"))
    return output


def rows_of(run: Path) -> list[dict[str, str]]:
    """The rows of the run's CSV."""
    import csv

    with (run / "metrics" / "version_0" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_everything_promised_is_logged(full: Path) -> None:
    logged = {name for row in rows_of(full) for name, value in row.items() if value}
    assert logged >= {
        "train/loss",
        "val/loss",
        "val/perplexity",
        "val/token_accuracy",
        "val/perplexity/first",
        "val/stop_rate",
        "val/well_formed_rate",
        "val/rouge_l",
        "perf/tokens_per_s",
        "data/tokens/first",
        "data/tokens/second",
    }
    report = (full / "report.md").read_text()
    for part in ("| before |", "| after |", "stop rate", "Answers to held-out questions"):
        assert part in report
    shown = [json.loads(line) for line in (full / "answers.jsonl").read_text().splitlines()]
    assert {row["step"] for row in shown} == {4, 8, 12}
    assert len(shown) == 9
    assert all(row["question"].startswith("say") for row in shown)


def test_the_data_is_mixed_as_weighted(full: Path) -> None:
    last = [row for row in rows_of(full) if row.get("data/tokens/first")][-1]
    share = float(last["data/tokens/first"]) / (
        float(last["data/tokens/first"]) + float(last["data/tokens/second"])
    )
    assert share == pytest.approx(0.75, abs=0.03)  # packs of nearly equal length, 3:1


def test_the_exported_model_answers_and_stops_by_its_generation_config(full: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(full / "model")
    model = AutoModelForCausalLM.from_pretrained(full / "model")
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert sorted(model.generation_config.eos_token_id) == sorted(ends)
    assert tokenizer.chat_template


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs").rglob("sft*.yaml")))
def test_every_shipped_config_trains(path: Path, tiny_chat: Path, tmp_path: Path) -> None:
    """A few steps of each, on the tiny model and its data."""
    settings = yaml.safe_load((tiny_chat / "sft.yaml").read_text())["data"]
    sft.main(
        [
            f"--config={path}",
            f"--output_dir={tmp_path}",
            f"--model.base.pretrained={tiny_chat / 'model'}",
            f"--data.sources={json.dumps(settings['sources'])}",
            f"--data.cache_dir={settings['cache_dir']}",
            "--data.seq_len=96",
            "--data.micro_batch_size=2",
            "--trainer.precision=32-true",
            "--trainer.limit_train_batches=4",
            "--trainer.max_epochs=1",
            "--trainer.val_check_interval=4",
            "--trainer.limit_val_batches=1",
            "--trainer.limit_test_batches=1",
            "--samples.count=1",
            "--samples.test_count=1",
            "--samples.max_new_tokens=2",
            "--logging.wandb=off",
        ]
    )
    assert list((tmp_path / "checkpoints").glob("step=*.ckpt"))


def test_adapters_are_saved_as_peft_and_merged_into_the_export(lora: Path, tiny_chat: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_chat / "model")
    ids = torch.arange(40)[None] + 10
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, lora / "adapter")
        with_adapter = adapted(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(lora / "model")(ids).logits
    assert (with_adapter - before).abs().max() > 1e-2
    torch.testing.assert_close(merged, with_adapter, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_of_adapters_holds_no_frozen_weight(lora: Path, full: Path) -> None:
    state = torch.load(lora / "checkpoints" / "step=00000012.ckpt", weights_only=True)
    names = state["state_dict"].keys()
    assert names
    assert all("lora_" in name for name in names)
    everything = torch.load(full / "checkpoints" / "step=00000012.ckpt", weights_only=True)
    assert "model.model.embed_tokens.weight" in everything["state_dict"]


def test_a_checkpoint_of_adapters_loads_onto_its_base(lora: Path) -> None:
    from transformers import AutoModelForCausalLM

    from lit_llm.modules.sft import SFTModule

    path = lora / "checkpoints" / "step=00000012.ckpt"
    module = SFTModule.load_from_checkpoint(path, weights_only=True).eval()
    merged = AutoModelForCausalLM.from_pretrained(lora / "model")
    ids = torch.arange(40)[None] + 10
    with torch.no_grad():
        torch.testing.assert_close(module(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_loaded_checkpoint_stops_where_the_trained_model_does(full: Path, lora: Path) -> None:
    from lit_llm.modules.sft import SFTModule

    for run in (full, lora):
        path = run / "checkpoints" / "step=00000012.ckpt"
        module = SFTModule.load_from_checkpoint(path, weights_only=True)
        assert sorted(module.model.generation_config.eos_token_id) == [0, 3]


def test_adapters_under_half_precision_resume_and_load(tiny_chat: Path, tmp_path: Path) -> None:
    from lit_llm.modules.sft import SFTModule

    half = (*LORA, "--trainer.precision=bf16-true", "--samples.test_count=0")
    sft.main(arguments(tiny_chat, tmp_path, *half, "--trainer.max_steps=4"))
    checkpoint = tmp_path / "checkpoints" / "step=00000004.ckpt"
    SFTModule.load_from_checkpoint(checkpoint, weights_only=True)
    sft.main(
        arguments(tiny_chat, tmp_path, *half, f"--resume={checkpoint}", "--trainer.max_steps=8")
    )
    assert (tmp_path / "checkpoints" / "step=00000008.ckpt").exists()


def test_a_new_padding_token_grows_the_embedding_and_is_saved_with_the_adapters(
    tiny_chat: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lit_llm.modules.sft import SFTModule

    grown = ("--data.pad_token=<|new|>", "--model.base.resize_embeddings=true")
    short = ("--trainer.max_steps=4", "--samples.test_count=0")
    export = f"--export_dir={tmp_path / 'model'}"
    sft.main(arguments(tiny_chat, tmp_path / "run", *LORA, *grown, *short, export))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.pad_token == "<|new|>"
    before = AutoModelForCausalLM.from_pretrained(tiny_chat / "model").config.vocab_size
    assert exported.config.vocab_size == before + 1
    torch.manual_seed(7)  # whatever the new row was drawn from
    path = tmp_path / "run" / "checkpoints" / "step=00000004.ckpt"
    module = SFTModule.load_from_checkpoint(path, weights_only=True).eval()
    ids = torch.tensor([[10, 11, before, 12]])
    with torch.no_grad():
        torch.testing.assert_close(module(ids).logits, exported(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_config_with_fields_of_other_programs_loads_from_its_checkpoint(
    tiny_chat: Path, tmp_path: Path
) -> None:
    import shutil

    from lit_llm.modules.sft import SFTModule

    shutil.copytree(tiny_chat / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"is_llama_config": True}))
    base = f"--model.base.pretrained={tmp_path / 'model'}"
    short = ("--trainer.max_steps=4", "--samples.test_count=0")
    sft.main(arguments(tiny_chat, tmp_path / "run", base, *short))
    checkpoint = tmp_path / "run" / "checkpoints" / "step=00000004.ckpt"
    SFTModule.load_from_checkpoint(checkpoint, weights_only=True)


def test_runs_measured_in_epochs_resume_at_an_epochs_end_and_are_not_repeated(
    tiny_chat: Path, tmp_path: Path
) -> None:
    epochs = ("--trainer.max_steps=-1", "--trainer.max_epochs=2", "--trainer.limit_train_batches=8")
    epochs += ("--samples.test_count=0",)
    sft.main(arguments(tiny_chat, tmp_path / "straight", *epochs))
    sft.main(arguments(tiny_chat, tmp_path / "straight", *epochs))  # finished: nothing to do
    middle = tmp_path / "straight" / "checkpoints" / "step=00000004.ckpt"
    sft.main(arguments(tiny_chat, tmp_path / "resumed", *epochs, f"--resume={middle}"))
    last = [
        tmp_path / run / "checkpoints" / "step=00000008.ckpt" for run in ("straight", "resumed")
    ]
    weights = [torch.load(path, weights_only=True)["state_dict"] for path in last]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_adapters_on_another_base_are_refused(
    lora: Path, tiny_chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(tiny_chat / "model")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_chat / "model").save_pretrained(tmp_path / "other")
    extra = (
        f"--model.base.pretrained={tmp_path / 'other'}",
        "--trainer.max_steps=14",
        f"--resume={lora / 'checkpoints' / 'step=00000012.ckpt'}",
    )
    with pytest.raises(SystemExit) as exit_info:
        sft.main(arguments(tiny_chat, tmp_path / "run", *LORA, *extra))
    assert exit_info.value.code == 1
    assert "adapters of another base model" in capsys.readouterr().err


def test_inspect_shows_the_first_batch_and_ends(
    tiny_chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        sft.main(arguments(tiny_chat, tmp_path, "--inspect"))
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    assert "trained" in out
    assert "<|im_start|>user" in out
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.thorough  # tests/strategies looks at two ranks too
@pytest.mark.parametrize("adapter", [(), LORA], ids=["full", "lora"])
def test_two_ranks_train_the_model_of_one(
    adapter: tuple[str, ...], tiny_chat: Path, tmp_path: Path
) -> None:
    """2 x 2 packs an update on two ranks, 4 x 1 on one: the same tokens, unequally spread."""
    states = {}
    runs = {"one": ("1", "4"), "two": ("2", "2")}
    for name, (devices, micro_batch_size) in runs.items():
        command = [
            sys.executable,
            str(Path(sft.__file__)),
            *arguments(tiny_chat, tmp_path / name, *adapter),
            "--model.base.dropout=0",
            "--model.optimizer.class_path=torch.optim.SGD",
            "--model.optimizer.init_args.lr=0.5",
            "--trainer.max_steps=4",
            "--trainer.val_check_interval=4",
            "--trainer.accumulate_grad_batches=1",
            f"--trainer.devices={devices}",
            f"--trainer.strategy={'ddp' if devices == '2' else 'auto'}",
            f"--data.micro_batch_size={micro_batch_size}",
            "--model.adapter.dropout=0" if adapter else "--model.neftune_alpha=0",
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=240)
        path = tmp_path / name / "checkpoints" / "step=00000004.ckpt"
        states[name] = torch.load(path, weights_only=True)["state_dict"]
    for key, value in states["one"].items():
        torch.testing.assert_close(states["two"][key], value, atol=2e-6, rtol=1e-5)
    if adapter:  # half of an adapter starts at 0
        moved = [value for key, value in states["one"].items() if "lora_B" in key]
        assert all(float(value.abs().max()) > 1e-4 for value in moved)
    else:
        start = load_file(tiny_chat / "model" / "model.safetensors")["model.embed_tokens.weight"]
        assert float((states["one"]["model.model.embed_tokens.weight"] - start).abs().max()) > 1e-4
    results = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in runs]
    for measure, value in results[0]["after"].items():
        assert results[1]["after"][measure] == pytest.approx(value, rel=1e-4), measure


@pytest.mark.slow
def test_it_learns_to_answer_and_to_stop(tiny_chat: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load((tiny_chat / "sft.yaml").read_text())
    settings["model"]["base"]["dropout"] = 0.0
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(settings))
    cli = sft.main(
        [
            f"--config={tmp_path / 'sft.yaml'}",
            f"--output_dir={tmp_path / 'run'}",
            "--trainer.max_steps=150",
            "--trainer.val_check_interval=100",
            "--model.optimizer.init_args.lr=0.01",
            "--samples.test_count=16",
        ]
    )
    before, after = cli.results["before"], cli.results["after"]
    assert before["stop_rate"] < 0.3
    assert after["stop_rate"] > 0.9
    assert after["perplexity"] < 0.2 * before["perplexity"]
