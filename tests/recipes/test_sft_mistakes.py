"""What the fine-tuning recipe says of input that could teach nothing, or the wrong thing."""

import re
from pathlib import Path

import pytest
import sft

from tests.recipes.sft_runs import arguments, chat, write

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
