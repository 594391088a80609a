"""Tokenizers: round trips, saving, the chat template id by id, bytes of tokens, and mistakes."""

import contextlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_llm.data.tokenizer import (
    SPECIAL_TOKENS,
    bytes_per_token,
    load_tokenizer,
    save_tokenizer,
    token_bytes,
    train_tokenizer,
)
from lit_llm.errors import UserError

TEXTS = [
    "The model reads the text and the text is read by the model.\n\n    return 1984\n",
    "El niño comió piñas mañana por la mañana; ¡qué rico! 世界 🌍\n",
] * 20
SAMPLES = [
    "",
    " ",
    "the model",
    " leading, trailing \n",
    "a\r\n\tb\u00a0c\u2028d",
    "\x00\x1f\x7f\ufeff",
    "e\u0301 is not é",
    "🌍👩‍👩‍👧 世界 العربية",
    "don't stop 12345 ...!?",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="module")
def bytes_only() -> PreTrainedTokenizerFast:
    """No merges: special tokens 0 to 3, then the bytes, so ids can be written by hand."""
    return train_tokenizer(["x"], 260)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def byte_ids(tokenizer, text: str) -> list[int]:
    # The byte-level alphabet writes printable ASCII as itself, a line feed as Ċ and a space as Ġ.
    symbols = text.replace("\n", "Ċ").replace(" ", "Ġ")
    return [tokenizer.convert_tokens_to_ids(symbol) for symbol in symbols]


def test_special_tokens(tokenizer):
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2, 3]
    assert tokenizer.unk_token is None
    assert ids(tokenizer, "a<|im_start|>b")[1] == 2


def test_size_of_the_vocabulary():
    assert len(train_tokenizer(TEXTS, 300)) == 300
    assert len(train_tokenizer(["x"], 5000)) == 260  # nothing to merge


def test_nothing_is_added(tokenizer):
    for text in SAMPLES:
        assert not {0, 1, 2, 3} & set(ids(tokenizer, text))


@given(st.text())
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(ids(tokenizer, text)) == text


@given(st.text())
def test_special_tokens_in_a_text_can_be_text(tokenizer, text):
    for token in SPECIAL_TOKENS:
        text = f"{text}{token}{text}"
    found = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert not {0, 1, 2, 3} & set(found)
    assert tokenizer.decode(found) == text


def test_frequent_words_are_one_token(tokenizer):
    assert len(ids(tokenizer, " model")) == 1
    assert len(ids(tokenizer, " mañana")) == 1
    assert len(ids(tokenizer, "1984")) == 4  # digits stay apart


@pytest.mark.parametrize("model_type", [None, "llama", "qwen2", "qwen3", "gpt2"])
def test_reloads_identically_beside_any_model(tokenizer, tmp_path, model_type):
    save_tokenizer(tokenizer, tmp_path)
    if model_type:
        config = {"model_type": model_type, "vocab_size": 400, "bos_token_id": 0, "eos_token_id": 0}
        (tmp_path / "config.json").write_text(json.dumps(config))
    ours, auto = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for loaded in (ours, auto):
        assert len(loaded) == len(tokenizer) > 300
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded.chat_template == tokenizer.chat_template
        assert (loaded.eos_token_id, loaded.bos_token_id, loaded.pad_token_id) == (0, 0, 1)
        assert sorted(loaded.all_special_ids) == [0, 1, 2, 3]
    for text in [*SAMPLES, *TEXTS[:2]]:
        assert ids(ours, text) == ids(tokenizer, text)
        if model_type != "qwen2" or "\u0301" not in text:
            # AutoTokenizer puts the NFC of Qwen 2 in place of what tokenizer.json says.
            assert ids(auto, text) == ids(tokenizer, text)


def test_the_same_texts_give_the_same_tokenizer():
    first, second = (train_tokenizer(iter(TEXTS), 350).backend_tokenizer.to_str() for _ in "12")
    assert first == second


# --- chat

CHAT = [
    {"role": "system", "content": "Be."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Go"},
    {"role": "assistant", "content": "No"},
]


def test_chat_ids_and_mask_by_hand(bytes_only):
    start, end, line = 2, 3, byte_ids(bytes_only, "\n")

    def turn(role: str, content: str, marked: bool) -> list[tuple[int, int]]:
        head = [start, *byte_ids(bytes_only, role), *line]
        body = [*byte_ids(bytes_only, content), end]
        return [(i, 0) for i in head] + [(i, int(marked)) for i in body] + [(line[0], 0)]

    wanted = [
        *turn("system", "Be.", False),
        *turn("user", "Hi", False),
        *turn("assistant", "Yo", True),
        *turn("user", "Go", False),
        *turn("assistant", "No", True),
    ]
    out = bytes_only.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    assert list(zip(out["input_ids"], out["assistant_masks"], strict=True)) == wanted
    assert sum(out["assistant_masks"]) == 6  # "Yo", "No" and the end of each turn
    assert 0 not in out["input_ids"]  # neither BOS nor EOS


def test_chat_as_text(tokenizer):
    text = tokenizer.apply_chat_template(CHAT[1:3], tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "answer", ["the model", "\n\n  the text\n", " \n\nthe\n\ntext ", "1984", "\tthe", "¡qué"]
)
def test_the_generation_prompt_and_the_answer_are_the_whole_chat(tokenizer, answer):
    chat = [*CHAT[:2], {"role": "assistant", "content": answer}]
    whole = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    prompt = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True)["input_ids"]
    body = [*ids(tokenizer, answer.strip()), 3]
    assert whole["input_ids"] == prompt + body + ids(tokenizer, "\n")
    assert whole["assistant_masks"] == [0] * len(prompt) + [1] * len(body) + [0]


def test_chat_template_survives_saving(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    options = {"return_assistant_tokens_mask": True, "return_dict": True}
    first = tokenizer.apply_chat_template(CHAT, **options)
    assert dict(loaded.apply_chat_template(CHAT, **options)) == dict(first)


# --- bytes of tokens


def test_token_bytes_by_hand(bytes_only):
    sizes = token_bytes(bytes_only)
    assert sizes.dtype == torch.long
    assert sizes.tolist() == [0] * 4 + [1] * 256


@given(st.text())
def test_token_bytes_add_up_to_the_text(tokenizer, text):
    sizes = token_bytes(tokenizer)
    found = torch.tensor(ids(tokenizer, text), dtype=torch.long)
    assert sizes[found].sum() == len(text.encode())


def test_token_bytes_of_a_sentencepiece_vocabulary(tmp_path):
    pieces = ["<s>", "</s>", "<0x0A>", "<0xF0>", "\u2581", "\u2581the", "é", "世", "<0x", "ab"]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(["naïve"])
    assert token_bytes(tokenizer).tolist() == [0, 0, 1, 1, 1, 4, 2, 3, 3, 2, 6]


def test_token_bytes_of_another_kind_of_tokenizer():
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(UserError, match="cannot tell how many bytes"):
        token_bytes(tokenizer)


@pytest.mark.skipif("LIT_LLM_MODELS" not in os.environ, reason="LIT_LLM_MODELS names no folder")
def test_token_bytes_of_a_real_sentencepiece_tokenizer():
    tokenizer = load_tokenizer(Path(os.environ["LIT_LLM_MODELS"]) / "stories260k")
    text = "Once upon a time, é 😀 there\n was a"
    sizes = token_bytes(tokenizer)
    assert len(sizes) == len(tokenizer) == 512
    # SentencePiece puts a space before the first word.
    assert sizes[ids(tokenizer, text)].sum() == len(text.encode()) + 1


def test_bytes_per_token(bytes_only):
    assert bytes_per_token(bytes_only, ["ab", "é"]) == 1.0
    bytes_only.add_tokens(["hello"])
    assert bytes_per_token(bytes_only, ["hello", "a"]) == 3.0
    with pytest.raises(UserError, match="no held-out text"):
        bytes_per_token(bytes_only, [])


# --- mistakes


def test_vocabulary_too_small():
    with pytest.raises(UserError) as caught:
        train_tokenizer(TEXTS, 259)
    assert str(caught.value) == (
        "vocab_size 259 is too small: 256 bytes and 4 special tokens need at least 260."
    )


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_text(texts):
    with pytest.raises(UserError, match="there is no text to train a tokenizer on"):
        train_tokenizer(texts)


def test_a_mistake_while_reading_comes_through():
    def broken():
        yield "fine"
        raise UserError("line 2 is bad")

    with pytest.raises(UserError, match="line 2 is bad"):
        train_tokenizer(broken())


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("./nope", "./nope: there is no such tokenizer folder; recipes/tokenizer.py makes one."),
        ("a/b/c", "a/b/c: there is no such tokenizer folder; recipes/tokenizer.py makes one."),
        (
            "empty/nope",
            "empty/nope: there is no such tokenizer folder; recipes/tokenizer.py makes one.",
        ),
        (
            "empty",
            "empty: holds no tokenizer (no tokenizer.json); recipes/tokenizer.py makes one.",
        ),
        ("file", "file: is a file; give the folder that holds the tokenizer."),
        ("broken", "broken: cannot load a tokenizer from the folder: "),
        (
            "no-such/tokenizer",
            "no-such/tokenizer: cannot load a tokenizer from the Hugging Face Hub "
            "(there is no such folder): ",
        ),
        ("no-eos", "no-eos: the tokenizer has no EOS token, so documents could not be ended; "),
    ],
)
def test_what_cannot_be_loaded(tmp_path, monkeypatch, path, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{cut")
    backend = Tokenizer(models.BPE({"a": 0}, []))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "no-eos")
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_code_beside_a_tokenizer_is_never_run(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with contextlib.suppress(UserError):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_cannot_be_written(tokenizer, tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(UserError, match="cannot save the tokenizer there"):
        save_tokenizer(tokenizer, tmp_path / "taken")
