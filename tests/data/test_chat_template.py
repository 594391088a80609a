"""Chat templates beyond the usual: odd templates, Unicode, completions, stop tokens, mistakes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lit_llm.data.chat_template import (
    PLAIN_CHAT_TEMPLATE,
    TokenizedChat,
    prompt_ids,
    render,
    stop_token_ids,
    tokenize_chat,
    tokenize_completion,
    with_chat_template,
)
from lit_llm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from lit_llm.errors import UserError
from tests.data.test_chat_templates_real import (
    CHAT,
    CHATML_TOKENS,
    LLAMA3,
    LLAMA3_TOKENS,
    MISTRAL_TOKENS,
    MISTRAL_V01,
    MISTRAL_V03,
    SMOLLM2,
    says,
    toy_tokenizer,
)

TEXTS = ["user\nassistant\nThe model reads the text. ¿Qué? 世界 🌍\n\n"] * 20


def byte_tokenizer(template: str, special: list[str], size: int = 400) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges; <s> and </s> are BOS and EOS."""
    tokenizer = train_tokenizer(TEXTS, size)
    extra = [AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>", *special)]
    tokenizer.add_special_tokens(
        {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": extra}
    )
    tokenizer.chat_template = template
    return tokenizer


def words(tokenizer, chat: TokenizedChat) -> list[str]:
    return [tokenizer.decode(chat.input_ids[start:stop]) for start, stop in chat.turns]


# --- which template


def test_a_template_of_its_own_is_left_alone():
    tokenizer = toy_tokenizer("mine", CHATML_TOKENS)
    assert with_chat_template(tokenizer) is tokenizer
    assert tokenizer.chat_template == "mine"


@pytest.mark.parametrize(
    ("special", "template"),
    [
        (CHATML_TOKENS, CHAT_TEMPLATE),
        (CHATML_TOKENS[:1], PLAIN_CHAT_TEMPLATE),
        ([], PLAIN_CHAT_TEMPLATE),  # in the vocabulary, but not as special tokens
    ],
)
def test_the_template_that_a_vocabulary_gets(special, template):
    assert with_chat_template(toy_tokenizer(None, special)).chat_template == template


def test_rendering_without_a_template_is_refused():
    with pytest.raises(UserError, match="has no chat template"):
        render(toy_tokenizer(None, []), CHAT)


def test_the_template_does_not_see_weights():
    tokenizer = toy_tokenizer("{% for m in messages %}{{ m | list | join }}.{% endfor %}", [])
    assert render(tokenizer, [CHAT[0] | {"weight": 1}, CHAT[1]]) == "rolecontent.rolecontent."


def test_plain_text_as_text():
    tokenizer = toy_tokenizer(PLAIN_CHAT_TEMPLATE, [])
    chat = [says("system", " Be. "), says("user", "Hi\n"), says("assistant", "\nYo")]
    assert render(tokenizer, chat, add_generation_prompt=True) == (
        "<s>### System:\nBe.\n\n### User:\nHi\n\n### Assistant:\nYo</s>\n\n### Assistant:\n"
    )


# --- what goes wrong, and marks of the template


def test_a_template_that_fails():
    tokenizer = toy_tokenizer("{{ messages[0].content + 1 }}", [])
    with pytest.raises(UserError, match="chat template refuses the conversation: can only concat"):
        tokenize_chat(tokenizer, CHAT)


MARKED = "{% generation %}"
MARKED_END = "{% endgeneration %}"


def marked(inside: str, around: str = "{}") -> str:
    passage = around.format(MARKED + inside + MARKED_END)
    return (
        "{% for m in messages %}<|im_start|>{% if m.role == 'assistant' %}"
        + passage
        + "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )


def test_marked_white_space_after_the_end_of_turn_does_not_hide_it():
    tokenizer = byte_tokenizer(marked("{{ m.content + '<|im_end|>\n' }}"), [])
    chat = tokenize_chat(tokenizer, CHAT)
    assert words(tokenizer, chat) == ["Yo<|im_end|>\n", "No<|im_end|>\n"]
    assert stop_token_ids(tokenizer) == [3, tokenizer.eos_token_id]


def test_marks_without_an_end_of_turn():
    tokenizer = byte_tokenizer(marked("{{ m.content }}", "{}<|im_end|>"), [])
    assert words(tokenizer, tokenize_chat(tokenizer, CHAT)) == ["Yo", "No"]
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id]


def test_marks_around_nothing_are_no_turn():
    # Nothing between the letters of one token.
    tokenizer = toy_tokenizer(marked("{{ m.content }}", "H{}i"), CHATML_TOKENS)
    found = tokenize_chat(tokenizer, [CHAT[0], says("assistant", "")])
    assert found == TokenizedChat([3, 24, 3, 24], [], [])


def test_several_marks_a_message():
    twice = marked("{{ m.content }}").replace(
        "{% else %}", MARKED + "</s>" + MARKED_END + "{% else %}"
    )
    tokenizer = byte_tokenizer(twice, [])
    chat = tokenize_chat(tokenizer, CHAT)
    assert (words(tokenizer, chat), chat.trained) == (["Yo", "</s>", "No", "</s>"], [True] * 4)
    with pytest.raises(UserError, match="marks 4 passages as generated for 2 messages"):
        tokenize_chat(tokenizer, [CHAT[0], CHAT[1] | {"weight": 0}, *CHAT[2:]])


def test_marks_that_never_come_out():
    template = CHAT_TEMPLATE.replace("== 'assistant'", "== 'model'")
    with pytest.raises(UserError, match="marks 0 passages as generated for 2 messages"):
        tokenize_chat(byte_tokenizer(template, []), CHAT)


def test_a_conversation_without_an_answer_has_no_turn():
    for template in (CHAT_TEMPLATE, SMOLLM2):
        chat = tokenize_chat(byte_tokenizer(template, []), CHAT[:1])
        assert (chat.turns, chat.trained) == ([], [])


# --- characters of several tokens, tokens of several characters


def test_unicode_byte_by_byte():
    # No merges: special tokens 0 to 3, then the bytes 33 to 126 from id 4, 161 to 172 from 98,
    # 174 to 255 from 110, 0 to 32 from 192, 127 to 160 from 225.
    tokenizer = train_tokenizer(["x"], 260)
    for text, ids in [
        ("🌍", [110 + 240 - 174, 225 + 159 - 127, 225 + 140 - 127, 225 + 141 - 127]),
        ("e\u0301", [4 + 101 - 33, 110 + 204 - 174, 225 + 129 - 127]),
        ("世", [110 + 228 - 174, 110 + 184 - 174, 225 + 150 - 127]),
    ]:
        for template in (CHAT_TEMPLATE, SMOLLM2):
            tokenizer.chat_template = template
            chat = tokenize_chat(tokenizer, [says("user", text), says("assistant", text)])
            ((start, stop),) = chat.turns
            assert chat.input_ids[start:stop] == [*ids, 3]
            assert chat.input_ids[start - 1] == chat.input_ids[stop] == 192 + 10
            # Not all of them, when what is marked ends with them.
            tokenizer.chat_template = marked("{{ m.content }}")
            chat = tokenize_chat(tokenizer, [says("user", "a"), says("assistant", text)])
            assert chat.input_ids[slice(*chat.turns[0])] == ids


def test_a_token_across_the_border_belongs_to_the_turn():
    # "assistant\n" and an answer that begins with a line feed share the token of two line feeds.
    tokenizer = byte_tokenizer(SMOLLM2, [])
    chat = tokenize_chat(
        tokenizer, [says("system", ""), says("user", ""), says("assistant", "\nA")]
    )
    assert words(tokenizer, chat) == ["\n\nA<|im_end|>"]


def test_a_slow_tokenizer_is_refused():
    tokenizer = toy_tokenizer(CHAT_TEMPLATE, CHATML_TOKENS)

    class Slow(type(tokenizer)):
        is_fast = False

    tokenizer.__class__ = Slow
    for use in (
        lambda: tokenize_chat(tokenizer, CHAT),
        lambda: tokenize_completion(tokenizer, "", ""),
    ):
        with pytest.raises(UserError, match="Slow does not say .* give a fast tokenizer"):
            use()


# --- random conversations

TEMPLATES = {
    "ours": (CHAT_TEMPLATE, [], "<|im_end|>"),
    "plain": (PLAIN_CHAT_TEMPLATE, [], "</s>"),
    "smollm2": (SMOLLM2, [], "<|im_end|>"),
    "llama3": (LLAMA3, LLAMA3_TOKENS[1:], "<|eot_id|>"),
    "mistral_v01": (MISTRAL_V01, [], "</s>"),
    "mistral_v03": (MISTRAL_V03, MISTRAL_TOKENS, "</s>"),
}
TOKENIZERS = {name: byte_tokenizer(*how[:2]) for name, how in TEMPLATES.items()}
CONTENTS = st.text(max_size=12) | st.text(" \n\r\tab.é🌍", max_size=8)
EXCHANGES = st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(exchanges=EXCHANGES, system=st.none() | CONTENTS)
def test_any_conversation(name, exchanges, system):
    end = TEMPLATES[name][2]
    tokenizer = TOKENIZERS[name]
    messages = [says("system", system)] if system is not None and name != "mistral_v01" else []
    for question, answer in exchanges:
        messages += [says("user", question), says("assistant", answer)]
    chat = tokenize_chat(tokenizer, messages)
    found = words(tokenizer, chat)
    assert len(found) == len(exchanges)
    assert chat.turns == sorted(chat.turns)
    for (_, answer), turn in zip(exchanges, found, strict=True):
        trims = name not in ("smollm2", "mistral_v01")
        assert (answer.strip() if trims else answer) in turn
        assert turn.endswith(end)
        assert turn.count(end) == 1
    if name in ("ours", "plain", "llama3"):
        start = chat.turns[-1][0]
        assert prompt_ids(tokenizer, messages[:-1]) == chat.input_ids[:start]


# --- plain text


def gpt2_like() -> PreTrainedTokenizerFast:
    return train_tokenizer(["x"], 260)  # "a" is 68, "b" 69, " " 224; EOS and BOS are 0


def test_completion_by_hand():
    # "Hi" 24, "Yo" 25, " " 17, "<s>" 1, "</s>" 2
    tokenizer = toy_tokenizer(None, [], adds_bos=True)
    assert tokenize_completion(tokenizer, "Hi", " Yo") == TokenizedChat(
        [1, 24, 17, 25, 2], [(2, 5)], [True]
    )
    bare = toy_tokenizer(None, [])
    assert tokenize_completion(bare, "Hi", " Yo") == TokenizedChat(
        [24, 17, 25, 2], [(1, 4)], [True]
    )


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion", "ids", "turn"),
    [
        ("<s>Hi ", "Yo", [1, 24, 17, 25, 2], (3, 5)),
        ("<s>Hi ", "Yo</s>", [1, 24, 17, 25, 2], (3, 5)),
        ("<s>Hi ", "</s>", [1, 24, 17, 2], (3, 4)),
        ("<s>Hi", "", [1, 24, 2], (2, 3)),
        ("", "<s>Hi", [1, 24, 2], (1, 3)),
        ("<s>", "", [1, 2], (1, 2)),
        ("<s><s>", "Yo", [1, 1, 25, 2], (2, 4)),  # two of its own stay two
    ],
)
def test_completion_has_one_bos_and_one_eos(adds_bos, prompt, completion, ids, turn):
    tokenizer = toy_tokenizer(None, [], adds_bos=adds_bos)
    assert tokenize_completion(tokenizer, prompt, completion) == TokenizedChat(ids, [turn], [True])


def test_completion_with_an_eos_of_the_tokenizer():
    tokenizer = toy_tokenizer(None, [])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    for completion in ("Yo", "Yo</s>"):
        assert tokenize_completion(tokenizer, "Hi ", completion) == TokenizedChat(
            [1, 24, 17, 25, 2], [(3, 5)], [True]
        )
    assert tokenize_completion(tokenizer, "", "") == TokenizedChat([1, 2], [(1, 2)], [True])


def test_completion_where_bos_is_eos():
    tokenizer = gpt2_like()
    assert tokenize_completion(tokenizer, "a", "b") == TokenizedChat([68, 69, 0], [(1, 3)], [True])
    assert tokenize_completion(tokenizer, "", "ab") == TokenizedChat([68, 69, 0], [(0, 3)], [True])
    assert tokenize_completion(tokenizer, "", "") == TokenizedChat([0], [(0, 1)], [True])
    whole = tokenize_completion(tokenizer, "", "<|endoftext|>a")
    assert whole == TokenizedChat([0, 68, 0], [(1, 3)], [True])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert tokenize_completion(tokenizer, "", "") == TokenizedChat([0, 0], [(1, 2)], [True])
    assert tokenize_completion(tokenizer, "", "a") == TokenizedChat([0, 68, 0], [(1, 3)], [True])


def test_completion_is_tokenised_with_its_prompt():
    # SentencePiece-like: "▁Yo" reaches back over the space that the prompt ends with.
    tokenizer = toy_tokenizer(None, [], metaspace=True)
    assert tokenize_completion(tokenizer, "Hi ", "Yo") == TokenizedChat(
        [24, 54, 2], [(1, 3)], [True]
    )


def test_tokens_of_no_width_belong_to_no_turn_at_its_border():
    # A Unigram vocabulary may hold "▁" alone: normalising "Hi" to "▁Hi" gives it no character.
    vocabulary = [("<unk>", 0.0), ("▁", -1.0), ("H", -2.0), ("i", -2.0), ("Y", -2.0), ("o", -2.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    chat = tokenize_completion(fast, "Hi", "Yo")
    ends = fast.convert_tokens_to_ids("</s>")
    assert chat == TokenizedChat([1, 2, 3, 4, 5, ends], [(3, 6)], [True])


def test_stop_tokens_without_a_chat_template():
    assert stop_token_ids(toy_tokenizer(None, [])) == [2]
