"""A tokenizer made ready for chat: which token pads, which template speaks."""

from pathlib import Path
from typing import Any

import pytest

from lit_llm.data.chat_tokenizer import load_chat_tokenizer
from lit_llm.data.tokenizer import CHAT_TEMPLATE
from lit_llm.errors import UserError


def save(folder: Path, special: list[str], **settings: Any) -> str:
    """A tokenizer of words with some special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "hi", "yo", *special]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "hi"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", **settings)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_padding_of_its_own_is_kept(tmp_path: Path) -> None:
    name = save(tmp_path, ["<unk>"], pad_token="hi")
    assert load_chat_tokenizer(name).pad_token == "hi"


@pytest.mark.parametrize("pad", [None, "<eos>"])
@pytest.mark.parametrize(
    ("special", "chosen"),
    [
        (["<unk>", "<|reserved_7|>", "<|right_pad|>"], "<|right_pad|>"),
        (["<unk>", "<|reserved_7|>"], "<|reserved_7|>"),
        (["<image>", "<unk>"], "<unk>"),
    ],
)
def test_a_spare_token_pads_where_padding_is_missing_or_an_end(
    tmp_path: Path, pad: str | None, special: list[str], chosen: str
) -> None:
    name = save(tmp_path, special, pad_token=pad)
    assert load_chat_tokenizer(name).pad_token == chosen


def test_a_token_with_a_use_of_its_own_does_not_pad(tmp_path: Path) -> None:
    name = save(tmp_path, ["<image>"], pad_token="<eos>")
    assert load_chat_tokenizer(name).pad_token == "<eos>"  # the guard will say so


def test_a_named_token_pads_and_is_added_if_need_be(tmp_path: Path) -> None:
    name = save(tmp_path, ["<unk>"])
    assert load_chat_tokenizer(name, pad_token="<unk>").pad_token_id == 3
    tokenizer = load_chat_tokenizer(name, pad_token="<new>")
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<new>", len(tokenizer) - 1)


def test_the_template_is_the_file_s_the_tokenizers_or_ours(tmp_path: Path) -> None:
    name = save(tmp_path / "plain", ["<unk>"])
    assert "### Assistant" in str(load_chat_tokenizer(name).chat_template)
    name = save(tmp_path / "chatml", ["<|im_start|>", "<|im_end|>", "<pad>"])
    assert load_chat_tokenizer(name).chat_template == CHAT_TEMPLATE
    (tmp_path / "mine.jinja").write_text(
        "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}{# mine #}"
    )
    mine = str(tmp_path / "mine.jinja")
    assert load_chat_tokenizer(name, chat_template=mine).chat_template.endswith("{# mine #}")
    with pytest.raises(UserError, match=r"none.jinja: the chat template cannot be read"):
        load_chat_tokenizer(name, chat_template=str(tmp_path / "none.jinja"))
