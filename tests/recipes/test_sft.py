"""The fine-tuning recipe run whole, with and without adapters, and its answers to bad input."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sft
import torch
import yaml

ROOT = Path(__file__).parents[2]
LORA = ("--model.adapter.method=lora", "--model.adapter.r=4", "--model.adapter.dropout=0.1")


def arguments(tiny_chat: Path, output: Path, *extra: str) -> list[str]:
    """Command line of a tiny run."""
    return [f"--config={tiny_chat / 'sft.yaml'}", f"--output_dir={output}", *extra]


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


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def chat(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


BAD = {
    "the learning rate is 0": ("--model.optimizer.init_args.lr=0",),
    "raise data.seq_len": ("--data.seq_len=2",),
    "neftune_alpha must not be negative": ("--model.neftune_alpha=-1",),
    "use lora, dora or qlora|Expected": ("--model.adapter.method=lara",),
    "'q_prj'; did you mean q_proj": (
        "--model.adapter.method=lora",
        "--model.adapter.target_modules=[q_prj]",
    ),
    "no such file": ("--data.sources=nowhere.jsonl",),
    "Option 'rank' is not accepted": ("--model.adapter.rank=8",),
    "model folder '/no/such/model' does not exist": ("--model.base.pretrained=/no/such/model",),
    "format 'chatml' is unknown": ("--data.sources=[{path: a.jsonl, format: chatml}]",),
    "has no field 'feild'": ("--data.sources=[{path: a.jsonl, feild: text}]",),
    "adapter r 0 and alpha": ("--model.adapter.method=lora", "--model.adapter.r=0"),
    "val_check_interval does not fit the data": (
        "--trainer.val_check_interval=5000",
        "--trainer.max_steps=-1",
        "--trainer.max_epochs=1",
        "--samples.test_count=0",
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_a_mistake_is_said_in_one_sentence(
    message: str, tiny_chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    with pytest.raises(SystemExit) as exit_info:
        sft.main(arguments(tiny_chat, tmp_path, "--data.val_fraction=0.1", *BAD[message]))
    assert exit_info.value.code == 1
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "never learn to stop|no answer"),
        (
            "{% generation %}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
            "{% endgeneration %}",
            "every token of the first batch is trained on",
        ),
        (
            "{% for m in messages %}{{ m['content'] + eos_token }}{% if m['role'] == 'nobody' %}"
            "{% generation %}{% endgeneration %}{% endif %}{% endfor %}",
            "marks 0 passages as generated",
        ),
    ],
    ids=["no end", "all trained", "none trained"],
)
def test_a_template_that_trains_the_wrong_tokens_is_refused(
    template: str,
    message: str,
    tiny_chat: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    (tmp_path / "template.jinja").write_text(template)
    extra = (f"--data.chat_template={tmp_path / 'template.jinja'}", "--samples.test_count=0")
    with pytest.raises(SystemExit) as exit_info:
        sft.main(arguments(tiny_chat, tmp_path / "run", *extra))
    assert exit_info.value.code == 1
    assert re.search(message, capsys.readouterr().err)


def test_data_without_an_assistant_is_refused(
    tiny_chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [{"messages": chat(f"question {n}", "")["messages"][:1]} for n in range(20)]
    source = write(tmp_path / "questions.jsonl", *questions)
    with pytest.raises(SystemExit) as exit_info:
        sft.main(arguments(tiny_chat, tmp_path / "run", f"--data.sources={source}"))
    assert exit_info.value.code == 1
    assert "no message has the role 'assistant'" in capsys.readouterr().err


def test_long_plain_texts_have_no_answers_to_end(tiny_chat: Path, tmp_path: Path) -> None:
    texts = [{"text": " ".join(["the red bird sings"] * 100) + f" {n}"} for n in range(30)]
    source = write(tmp_path / "texts.jsonl", *texts)
    extra = ("--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--data.val_fraction=0")
    extra += ("--data.test_fraction=0", f"--data.sources={source}")
    sft.main(arguments(tiny_chat, tmp_path / "run", *extra))


def test_bos_in_data_and_template_is_refused(
    tiny_chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer with a BOS of its own, and data that brings it along."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_chat / "model")
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    chats = [chat(f"<|im_start|>say {n}", "well") for n in range(40)]
    for record in chats:
        record["messages"][0]["content"] = "<|im_start|>" + record["messages"][0]["content"]
    source = write(tmp_path / "chats.jsonl", *chats)
    extra = (f"--data.tokenizer={tmp_path / 'tokenizer'}", f"--data.sources={source}")
    extra += ("--data.test_fraction=0", "--data.val_fraction=0", "--trainer.limit_val_batches=0")
    with pytest.raises(SystemExit) as exit_info:
        sft.main(arguments(tiny_chat, tmp_path / "run", *extra))
    assert exit_info.value.code == 1
    assert "begins with BOS (id 2) twice" in capsys.readouterr().err


def test_a_padding_token_that_ends_answers_is_refused(
    tiny_chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        sft.main(arguments(tiny_chat, tmp_path, "--data.pad_token=<|im_end|>"))
    assert exit_info.value.code == 1
    assert "padding token is '<|im_end|>', which also ends an answer" in capsys.readouterr().err


@pytest.mark.slow
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
