"""The fine-tuning recipe run whole, with and without adapters, and its answers to bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
import sft
import torch
import yaml

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
}


@pytest.mark.parametrize("message", BAD)
def test_a_mistake_is_said_in_one_sentence(
    message: str, tiny_chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    with pytest.raises(SystemExit) as exit_info:
        sft.main(arguments(tiny_chat, tmp_path, "--data.val_fraction=0.1", *BAD[message]))
    assert exit_info.value.code in (1, 2)
    assert re.search(message, capsys.readouterr().err)


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


def test_a_padding_token_that_ends_answers_is_refused(
    tiny_chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        sft.main(arguments(tiny_chat, tmp_path, "--data.pad_token=<|im_end|>"))
    assert exit_info.value.code == 1
    assert "padding token is '<|im_end|>', which also ends an answer" in capsys.readouterr().err


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
