"""A chat's history, pieces and limits, with tokens that are written down here."""

import json

import pytest
import torch

from lit_llm.data.tokenizer import train_tokenizer
from lit_llm.errors import UserError
from lit_llm.models.build import build_model
from lit_llm.models.config import BaseModelConfig
from lit_llm.rollout import chat
from lit_llm.rollout.chat import ChatSession
from lit_llm.rollout.generation import GenerationConfig

POSITIONS = 96
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.4,
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the red bird sings"] * 5, vocab_size=280)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    return build_model(BaseModelConfig(config=CONFIG), vocab_size=len(tokenizer), seq_len=POSITIONS)


@pytest.fixture
def script(monkeypatch):
    """What the model will say, one list of tokens an answer; what it was given is noted."""
    answers, given = [], []

    def stream(model, prompt, config, **options):
        given.append((prompt, config, options))
        yield from answers.pop(0)

    monkeypatch.setattr(chat, "stream", stream)
    return answers, given


def session_of(model, tokenizer, max_new_tokens=8, **options):
    return ChatSession(model, tokenizer, GenerationConfig(max_new_tokens, 0.0), **options)


def ids_of(tokenizer, text):
    return tokenizer(text)["input_ids"]


def test_pieces_are_whole_characters_without_special_tokens(model, tokenizer, script):
    script[0].append(ids_of(tokenizer, "naïve 🙂<|im_start|> bird\n"))
    session = session_of(model, tokenizer, max_new_tokens=40)
    pieces = list(session.stream("Who sings?"))
    assert "".join(pieces) == "naïve 🙂 bird\n"
    assert {"ï", "🙂"} <= set("".join(pieces)) and "\ufffd" not in "".join(pieces)
    assert len(pieces) > 4, "they come one by one"
    assert session.messages == [
        {"role": "user", "content": "Who sings?"},
        {"role": "assistant", "content": "naïve 🙂 bird\n"},
    ]
    assert not session.cut_off


def test_an_answer_cut_off_within_a_character_shows_so_at_its_end(model, tokenizer, script):
    ids = ids_of(tokenizer, "ok🙂")[:-1]
    script[0].append(ids)
    session = session_of(model, tokenizer, max_new_tokens=len(ids))
    pieces = list(session.stream("?"))
    assert "".join(pieces[:-1]) == "ok" and set(pieces[-1]) == {"\ufffd"}
    assert session.cut_off


def test_the_prompt_is_the_template_over_system_history_and_question(model, tokenizer, script):
    answers, given = script
    answers += [ids_of(tokenizer, "one"), ids_of(tokenizer, "two")]
    session = session_of(model, tokenizer, system="Sing.", seed=5)
    list(session.stream("a"))
    list(session.stream("b"))
    texts = [tokenizer.decode(prompt) for prompt, _, _ in given]
    head = "<|im_start|>system\nSing.<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
    assert texts[0] == head + "<|im_start|>assistant\n"
    assert texts[1] == (
        head + "<|im_start|>assistant\none<|im_end|>\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [options["seed"] for _, _, options in given] == [5, 6], "each answer has its own seed"
    assert given[0][2]["pad_token_id"] == tokenizer.pad_token_id
    session.reset()
    answers.append(ids_of(tokenizer, "three"))
    list(session.stream("a"))
    assert given[2][0] == given[0][0], "the system prompt stays"


@pytest.mark.parametrize(("own", "stops"), [(None, {0}), (7, {0, 7}), ([7, 9], {0, 7, 9})])
def test_stop_tokens_are_the_model_s_and_the_tokenizer_s(model, tokenizer, script, own, stops):
    answers, given = script
    model.generation_config.eos_token_id = own
    answers.append([20])
    list(session_of(model, tokenizer).stream("a"))
    assert set(given[0][2]["stop_token_ids"]) == stops


def test_a_real_model_streams_until_its_stop_token(model, tokenizer):
    model.generation_config.eos_token_id = None
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "red"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    ids = list(prompt)
    model.eval()
    for _ in range(8):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    said = ids[len(prompt) :]
    session = session_of(model, tokenizer)
    assert "".join(session.stream("red")) == tokenizer.decode(said, skip_special_tokens=True)
    assert session.cut_off
    stop = said[4]
    model.generation_config.eos_token_id = [stop]
    session = session_of(model, tokenizer)
    before = said[: said.index(stop)]
    assert "".join(session.stream("red")) == tokenizer.decode(before, skip_special_tokens=True)
    assert not session.cut_off


def test_an_interrupt_keeps_what_was_said(model, tokenizer, monkeypatch):
    def interrupted(*args, **kwargs):
        yield from ids_of(tokenizer, "the bird")
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream", interrupted)
    session = session_of(model, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        list(session.stream("a"))
    assert [message["content"] for message in session.messages] == ["a", "the bird"]
    pieces = session.stream("b")
    first = next(pieces)
    pieces.close()  # as when printing it was interrupted
    assert [message["content"] for message in session.messages][2:] == ["b", first]


def test_an_exchange_without_an_answer_is_not_kept(model, tokenizer, script):
    script[0].extend([[], ids_of(tokenizer, " \n")])
    session = session_of(model, tokenizer)
    assert "".join(session.stream("a")) == ""
    list(session.stream("b"))
    assert session.messages == []


def test_the_oldest_turns_are_left_out_of_a_full_context(model, tokenizer, script):
    answers, given = script
    answers += [ids_of(tokenizer, "sings")] * 12
    session = session_of(model, tokenizer, max_new_tokens=16, system="Sing.")
    for number in range(12):
        list(session.stream(f"question {number}"))
    for prompt, config, _ in given:
        assert len(prompt) + 16 <= POSITIONS and config.max_new_tokens == 16
        text = tokenizer.decode(prompt)
        assert text.startswith("<|im_start|>system\nSing.<|im_end|>\n<|im_start|>user\n")
    assert session.left_out > 0 and session.left_out % 2 == 0
    text = tokenizer.decode(given[-1][0])
    shown = [number for number in range(12) if f"question {number}<" in text]
    assert shown == list(range(session.left_out // 2, 12)), "as many of the newest as fit"
    assert len(session.messages) == 24, "the history stays whole"
    session.reset()
    assert session.left_out == 0


def test_an_answer_may_be_longer_than_half_the_context_where_there_is_room(
    model, tokenizer, script
):
    answers, given = script
    answers += [[20]]
    list(session_of(model, tokenizer, max_new_tokens=1000).stream("a"))
    prompt, config, _ = given[0]
    assert config.max_new_tokens == POSITIONS - len(prompt) > POSITIONS // 2


def test_a_message_that_cannot_fit_is_refused_and_not_kept(model, tokenizer):
    session = session_of(model, tokenizer)
    with pytest.raises(UserError, match=r"the message is too long: .* the model takes 96"):
        session.stream("x" * 200)
    assert session.messages == []


def test_a_conversation_is_saved_as_a_line_to_train_on(model, tokenizer, script, tmp_path):
    script[0].extend([ids_of(tokenizer, "naïve")] * 2)
    session = session_of(model, tokenizer, system="Sing.")
    path = tmp_path / "new" / "chat.jsonl"
    with pytest.raises(UserError, match="no conversation to save yet"):
        session.save(path)
    list(session.stream("a"))
    session.save(path)
    path.write_text(path.read_text().rstrip("\n"))  # as an editor may leave it
    session.system = None
    list(session.stream("b"))
    session.save(path)
    one, two = (json.loads(line) for line in path.read_text().splitlines())
    exchange = [("user", "a"), ("assistant", "naïve")]
    assert [(m["role"], m["content"]) for m in one["messages"]] == [("system", "Sing."), *exchange]
    assert [(m["role"], m["content"]) for m in two["messages"]] == [
        *exchange,
        ("user", "b"),
        ("assistant", "naïve"),
    ]
    assert path.read_text().endswith("}\n")
    with pytest.raises(UserError, match="cannot save the conversation to"):
        session.save(tmp_path)


def test_a_tokenizer_without_template_is_refused(model):
    bare = train_tokenizer(["the red bird sings"] * 5, vocab_size=280)
    bare.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        session_of(model, bare)


def test_what_a_template_refuses_is_said(model):
    strict = train_tokenizer(["the red bird sings"] * 5, vocab_size=280)
    strict.chat_template = (
        "{%- if messages[0]['role'] == 'system' -%}"
        "{{ raise_exception('System role not supported') }}{%- endif -%}"
    )
    with pytest.raises(UserError, match="System role not supported"):
        session_of(model, strict, system="Sing.").stream("a")


def test_bytes_that_are_no_text_do_not_stop_a_chat(model, tokenizer, script):
    script[0].append([20])
    session = session_of(model, tokenizer)
    list(session.stream("caf\udce9"))
    assert session.messages[0]["content"] == "caf?"
