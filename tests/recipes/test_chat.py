"""recipes/chat.py as a user runs it: one prompt, a pipe, a terminal."""

import fcntl
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import chat
import pytest
import torch

from lit_llm.data.tokenizer import train_tokenizer
from lit_llm.models.build import build_model
from lit_llm.models.config import BaseModelConfig

RECIPE = Path(__file__).parents[2] / "recipes" / "chat.py"
GREEDY = ["--temperature", "0", "--max_new_tokens", "12"]
MESSAGES = ["the red bird", "who sings?"]
PROMPT, CTRL_C, CTRL_D = b"\n> ", b"\x03", b"\x04"


class Folder:
    """A model's folder, and what the model says when it is asked by hand."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.tokenizer = train_tokenizer(["the red bird sings"] * 5, vocab_size=280)
        torch.manual_seed(0)
        config = {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "initializer_range": 0.4,
        }
        self.model = build_model(
            BaseModelConfig(config=config), vocab_size=len(self.tokenizer), seq_len=100_000
        )
        self.model.generation_config.eos_token_id = [0, 3]
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    @torch.no_grad()
    def answer(self, *messages: str, count: int = 12) -> str:
        text = "".join(
            f"<|im_start|>{'assistant' if number % 2 else 'user'}\n{message.strip()}<|im_end|>\n"
            for number, message in enumerate(messages)
        )
        prompt = self.tokenizer(text + "<|im_start|>assistant\n")["input_ids"]
        ids = list(prompt)
        self.model.eval()
        while len(ids) < len(prompt) + count:
            ids.append(int(self.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            assert ids[-1] not in (0, 3), "this model does not stop"
        return self.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Folder(tmp_path_factory.mktemp("model"))


def test_one_prompt(folder, capsys):
    chat.main([folder.path, "--prompt", MESSAGES[0], *GREEDY])
    assert capsys.readouterr().out == folder.answer(MESSAGES[0]) + "\n"
    chat.main([folder.path, "--prompt", "42", "--seed", "1", "--dtype", "bfloat16"])
    first = capsys.readouterr().out
    chat.main([folder.path, "--prompt", "42", "--seed", "1", "--dtype", "bfloat16"])
    assert capsys.readouterr().out == first
    chat.main([folder.path, "--prompt", "42", "--seed", "2", "--dtype", "bfloat16"])
    assert capsys.readouterr().out != first


def test_a_pipe_is_one_conversation_a_line_a_message(folder):
    first = folder.answer(MESSAGES[0])
    second = folder.answer(MESSAGES[0], first, MESSAGES[1])
    done = subprocess.run(
        [sys.executable, str(RECIPE), folder.path, *GREEDY],
        input=f"{MESSAGES[0]}\n\n{MESSAGES[1]}",
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{first}\n{second}\n", "no prompts, no colours, nothing else"


def test_commands(folder, tmp_path, monkeypatch, capsys):
    path = tmp_path / "chat.jsonl"
    lines = [
        MESSAGES[0],
        "/reset",
        MESSAGES[1],
        f"/save {path}",
        "/save",
        "/nonsense 1",
        "/help",
        "/system Sing.",
        MESSAGES[0],
        f"/save {path}",
        " /help",
        "/exit",
        "never said",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    chat.main([folder.path, *GREEDY])
    out, err = capsys.readouterr()
    assert out.startswith(f"{folder.answer(MESSAGES[0])}\n{folder.answer(MESSAGES[1])}\n")
    one, two = (json.loads(line)["messages"] for line in path.read_text().splitlines())
    assert [message["content"] for message in one] == [MESSAGES[1], folder.answer(MESSAGES[1])]
    assert [(m["role"], m["content"]) for m in two[:2]] == [
        ("system", "Sing."),
        ("user", MESSAGES[0]),
    ]
    assert len(two) == 3
    for sentence in (
        "(the conversation is forgotten)",
        "(system prompt set; the conversation is forgotten)",
        f"(2 messages saved to {path})",
        "/save needs a file; /help lists the commands",
        "there is no command /nonsense; /help lists the commands",
        "/system TEXT  set the system prompt",
    ):
        assert sentence in err
    assert err.count("(cut off at the longest answer") == 4, "the line with a space is a message"


class Terminal:
    """A process at a pseudo-terminal."""

    def __init__(self, command: list[str]) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # for Ctrl-C to reach it
            env=os.environ | {"TERM": "dumb"},
        )
        os.close(slave)
        self.seen = b""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def wait_for(self, *texts: bytes, again: bytes = b"") -> None:
        """Wait for texts in their order; ``again`` is a key to press every few seconds.

        A signal that comes between a prompt and its reading is noticed at the next key only.
        """
        start, wanted = time.monotonic(), re.compile(b".*".join(map(re.escape, texts)), re.DOTALL)
        pressed = start
        while not wanted.search(self.seen):
            if again and time.monotonic() > pressed + 3:
                os.write(self.master, again)
                pressed = time.monotonic()
            if select.select([self.master], [], [], 0.2)[0]:
                self.seen += os.read(self.master, 65536)
            assert time.monotonic() < start + 150, self.seen[-2000:]  # other work may run beside
        self.seen = b""

    def type(self, text: bytes, *expected: bytes) -> None:
        os.write(self.master, text)
        self.wait_for(*expected, again=text if text.endswith(CTRL_C) else b"")


def test_a_terminal(folder, tmp_path):
    path = tmp_path / "chat.jsonl"
    endless = ["--temperature", "0", "--max_new_tokens", "90000"]
    begin = re.match(r"(?s).*[^\W_]", folder.answer(MESSAGES[0], count=40)).group()
    with Terminal([sys.executable, str(RECIPE), folder.path, *endless]) as terminal:
        terminal.wait_for(b"Ctrl-D ends", PROMPT)
        terminal.type(MESSAGES[0].encode() + b"\n", *(c.encode() for c in begin if c.isalnum()))
        terminal.type(CTRL_C, PROMPT)  # stops the answer
        terminal.type(b"half a line" + CTRL_C, PROMPT)  # drops the line
        terminal.type(b"/save\n", b"/save needs a file", PROMPT)
        terminal.type(f"/save {tmp_path}\n".encode(), b"error: cannot save the conv", PROMPT)
        terminal.type(f"/save {path}\n".encode(), b"(2 messages saved to", PROMPT)
        os.write(terminal.master, CTRL_D)
        assert terminal.process.wait(timeout=60) == 0
    (line,) = path.read_text().splitlines()
    question, answer = json.loads(line)["messages"]
    assert question == {"role": "user", "content": MESSAGES[0]}
    assert answer["content"].startswith(begin)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--temperature", "-1"], "error: generation: temperature must be 0"),
        (["--max_new_tokens", "0"], "error: generation: max_new_tokens must be at least 1, got 0"),
        (["--top_p", "2"], "error: generation: top_p must lie above 0 and be at most 1, got 2.0"),
    ],
)
def test_mistakes_are_one_sentence(folder, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as caught:
        chat.main([folder.path, "--prompt", "a", *arguments])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(sentence) and error.count("\n") == 1


def test_a_folder_that_cannot_chat_is_named(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        chat.main([str(tmp_path / "nope")])
    assert f"the model folder '{tmp_path / 'nope'}' does not exist" in capsys.readouterr().err
    folder.model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        chat.main([str(tmp_path)])
    assert "holds no tokenizer" in capsys.readouterr().err
    bare = train_tokenizer(["the red bird sings"] * 5, vocab_size=280)
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        chat.main([str(tmp_path)])
    assert "has no chat template" in capsys.readouterr().err


def test_a_pipe_that_is_no_text_is_said(folder):
    done = subprocess.run(
        [sys.executable, str(RECIPE), folder.path, *GREEDY],
        input=b"caf\xe9\n",
        capture_output=True,
        timeout=120,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )
    assert done.returncode == 1
    assert b"error: the input is no UTF-8 text" in done.stderr and b"Traceback" not in done.stderr
