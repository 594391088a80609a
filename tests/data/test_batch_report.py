import io

import pytest
import torch
from rich.console import Console

from lit_llm.data.batch_report import batch_report
from lit_llm.data.tokenizer import train_tokenizer

GREEN, DIM, BOLD = "\x1b[32m", "\x1b[2m", "\x1b[1;32m"


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, and four special tokens."""
    return train_tokenizer(["a"], 260)


def rows_of(tokenizer, *rows):
    """Input ids and labels of rows that are lists of (text, trained on), padded with -1."""
    ids, labels = [], []
    for row in rows:
        ids.append([])
        labels.append([])
        for text, trained in row:
            own = tokenizer(text)["input_ids"]
            ids[-1] += own
            labels[-1] += own if trained else len(own) * [-100]
    width = max(map(len, ids))
    lengths = torch.tensor([[len(row)] for row in ids])
    return {
        "input_ids": torch.tensor([row + [1] * (width - len(row)) for row in ids]),
        "labels": torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
        "attention_mask": (torch.arange(width) < lengths).long(),
        "source": torch.arange(len(rows)) + 3,
    }


def plain(report, width=100):
    """What a pipe gets."""
    console = Console(file=io.StringIO(), width=width)
    console.print(report, end="")
    return console.file.getvalue()


def test_padded_rows(tokenizer):
    batch = rows_of(
        tokenizer,
        [("<|im_start|>é?\n", False), ("Yes\nno<|im_end|>", True), ("\n", False)],
        [("a", True), ("b c", True), ("d", False)],
    )
    assert (
        plain(batch_report(batch, tokenizer))
        == """\
2 rows x 13 tokens: 10 trained on (38%), 8 read (31%), 8 padding (31%)
«trained on» read ··· padding ⏎ line feed

row 0, source 3: 13 tokens, 7 trained on
<|im_start|>é?⏎
«Yes⏎
no<|im_end|>»⏎

row 1, source 4: 5 tokens, 3 trained on
a«b c»d
········ 8 padding
"""
    )
    assert (batch["labels"][1] != -100).sum() == 4  # the batch is left as it was


def test_packed_rows(tokenizer):
    batch = rows_of(
        tokenizer,
        [("q:", False), ("no", True), ("q", False), ("<|im_end|>", True), ("!", True)],
    )
    del batch["attention_mask"], batch["source"]
    batch["document_ids"] = torch.tensor([[0, 0, 0, 0, 1, 1, -1]])
    batch["labels"][0, 6] = -100
    assert (
        plain(batch_report(batch, tokenizer))
        == """\
1 rows x 7 tokens: 3 trained on (43%), 3 read (43%), 1 padding (14%)
«trained on» read ··· padding ⏎ line feed

row 0, document 0: 4 tokens, 2 trained on
q:«no»

row 0, document 1: 2 tokens, 1 trained on
q«<|im_end|>»
· 1 padding
"""
    )


def test_prompts_are_padded_on_the_left(tokenizer):
    batch = rows_of(tokenizer, [("<|im_start|>é?\n", False)], [("a", False)])
    del batch["labels"]
    batch["input_ids"], batch["attention_mask"] = (
        torch.stack([batch[name][0], batch[name][1].flip(0)])
        for name in ("input_ids", "attention_mask")
    )
    assert (
        plain(batch_report(batch, tokenizer))
        == """\
2 rows x 5 tokens: 6 read (60%), 4 padding (40%)
read ··· padding ⏎ line feed

row 0, source 3: 5 tokens
<|im_start|>é?⏎

row 1, source 4: 1 tokens
a
···· 4 padding on the left
"""
    )


def test_much_padding_is_not_spelt_out(tokenizer):
    batch = rows_of(tokenizer, [("x" * 90, False)], [("y", False)])
    assert plain(batch_report(batch, tokenizer)).endswith(f"y\n{40 * '·'} 89 padding\n")


def test_without_a_mask_nothing_is_padding(tokenizer):
    batch = rows_of(tokenizer, [("ab", True)])
    report = plain(batch_report({k: batch[k] for k in ("input_ids", "labels")}, tokenizer))
    assert "row 0: 2 tokens, 1 trained on\na«b»\n" in report
    assert "0 padding (0%)" in report


def test_text_that_looks_like_markup_stays(tokenizer):
    batch = rows_of(tokenizer, [("[red]x[/red] \\[b]", False)])
    assert "\n[red]x[/red] \\[b]\n" in plain(batch_report(batch, tokenizer))


def test_colours(tokenizer):
    batch = rows_of(tokenizer, [("read", False), ("yes<|im_end|>", True)], [("x", False)])
    console = Console(
        file=io.StringIO(), width=100, force_terminal=True, color_system="standard", no_color=False
    )
    console.print(batch_report(batch, tokenizer))
    text = console.file.getvalue()
    assert f"{DIM}read\x1b[0m" in text
    assert f"{GREEN}yes\x1b[0m" in text
    assert f"{BOLD}<|im_end|>\x1b[0m" in text
    assert "\x1b[100m·······\x1b[0m 7 padding" in text


def test_spaces_of_a_sentencepiece_tokenizer_stay():
    """Such tokenizers drop the space before the first word of what they decode."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"?": 0, "▁one": 1, "▁two": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    batch = {
        "input_ids": torch.tensor([[1, 2, 1]]),
        "labels": torch.tensor([[-100, 2, -100]]),
    }
    assert "\none« two» one\n" in plain(batch_report(batch, tokenizer))
