"""Four chat templates of the field, id by id: ours, ChatML as SmolLM2 has it, Llama 3 and Mistral.

The files in ``chat_templates`` render what the published templates render, in words of our own.
One toy vocabulary serves all of them: every word, digit, space, line feed and sign is a token, so
all the ids here are written by hand.
"""

from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lit_llm.data.chat_template import (
    PLAIN_CHAT_TEMPLATE,
    TokenizedChat,
    prompt_ids,
    render,
    stop_token_ids,
    tokenize_chat,
)
from lit_llm.data.tokenizer import CHAT_TEMPLATE
from lit_llm.errors import UserError

FOLDER = Path(__file__).with_name("chat_templates")
SMOLLM2, LLAMA3, MISTRAL_V01, MISTRAL_V03 = (
    (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    for name in ("smollm2", "llama3", "mistral_v01", "mistral_v03")
)

# fmt: off
VOCABULARY = [
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>",                              # 0
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",     # 5
    "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",          # 9
    "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",                                         # 14
    "\n", " ", "system", "user", "assistant", "tool",                                  # 16
    "Be", ".", "Hi", "Yo", "Go", "No", "[", "INST", "]", "/",                          # 22
    "{", "}", '"', ":", ",", "name", "add", "arguments", "a", "1", "id", "call00001",  # 32
    "content", "call_id", "2", "type", "function", "#", "User", "System", "Assistant", # 44
    "▁Hi", "▁Yo", "▁No",                                                               # 53
]
# fmt: on
IDS = {token: index for index, token in enumerate(VOCABULARY)}
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MISTRAL_TOKENS = VOCABULARY[9:16]


def toy_tokenizer(
    template: str | None,
    special: list[str],
    *,
    bos: str | None = "<s>",
    eos: str = "</s>",
    adds_bos: bool = False,
    metaspace: bool = False,
) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; with ``metaspace`` a word takes the space before it along."""
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    split = pre_tokenizers.Split(Regex(r"\w+|[^\w]"), "isolated")
    if metaspace:
        split = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.pre_tokenizer = split
    names = [name for name in (bos, eos, *special) if name]
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in names]
    )
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, IDS[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token="<unk>",
        additional_special_tokens=special,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def ids(*rows: str) -> list[int]:
    return [int(number) for row in rows for number in row.split()]


def says(role: str, content: str, **more: object) -> dict:
    return {"role": role, "content": content, **more}


CHAT = [says("user", "Hi"), says("assistant", "Yo"), says("user", "Go"), says("assistant", "No")]
SYSTEM_CHAT = [says("system", "Be."), *CHAT]


# --- ours


def test_ours():
    tokenizer = toy_tokenizer(CHAT_TEMPLATE, CHATML_TOKENS)
    assert tokenize_chat(tokenizer, SYSTEM_CHAT) == TokenizedChat(
        ids(
            "3 18 16 22 23 4 16",
            "3 19 16 24 4 16",
            "3 20 16 25 4 16",
            "3 19 16 26 4 16",
            "3 20 16 27 4 16",
        ),
        [(16, 18), (28, 30)],
        [True, True],
    )
    prompt = ids("3 18 16 22 23 4 16", "3 19 16 24 4 16", "3 20 16")
    assert prompt_ids(tokenizer, SYSTEM_CHAT[:2]) == prompt
    assert stop_token_ids(tokenizer) == [4, 2]


def test_ours_in_plain_text():
    tokenizer = toy_tokenizer(PLAIN_CHAT_TEMPLATE, [])
    assert tokenize_chat(tokenizer, SYSTEM_CHAT[:3]) == TokenizedChat(
        ids(
            "1",
            "49 49 49 17 51 35 16 22 23 16 16",
            "49 49 49 17 50 35 16 24 16 16",
            "49 49 49 17 52 35 16 25 2 16 16",
        ),
        [(29, 31)],
        [True],
    )
    prompt = ids("1", "49 49 49 17 50 35 16 24 16 16", "49 49 49 17 52 35 16")
    assert prompt_ids(tokenizer, CHAT[:1]) == prompt
    assert stop_token_ids(tokenizer) == [2]


def test_plain_text_without_a_bos_of_its_own():
    for bos in (None, "</s>"):
        tokenizer = toy_tokenizer(PLAIN_CHAT_TEMPLATE, [], bos=bos)
        assert tokenize_chat(tokenizer, CHAT[:2]).input_ids[:5] == [49, 49, 49, 17, 50]


# --- ChatML without marks


def test_smollm2():
    tokenizer = toy_tokenizer(SMOLLM2, CHATML_TOKENS, bos="<|im_start|>", eos="<|im_end|>")
    assert tokenize_chat(tokenizer, SYSTEM_CHAT) == TokenizedChat(
        ids(
            "3 18 16 22 23 4 16",
            "3 19 16 24 4 16",
            "3 20 16 25 4 16",
            "3 19 16 26 4 16",
            "3 20 16 27 4 16",
        ),
        [(16, 18), (28, 30)],
        [True, True],
    )
    assert prompt_ids(tokenizer, SYSTEM_CHAT[:2])[-6:] == [24, 4, 16, 3, 20, 16]
    assert stop_token_ids(tokenizer) == [4]


def test_smollm2_keeps_the_white_space_of_contents():
    tokenizer = toy_tokenizer(SMOLLM2, CHATML_TOKENS, bos="<|im_start|>", eos="<|im_end|>")
    chat = [says("system", "Be."), says("user", " Hi"), says("assistant", " Yo \n")]
    assert tokenize_chat(tokenizer, chat) == TokenizedChat(
        ids(
            "3 18 16 22 23 4 16",
            "3 19 16 17 24 4 16",
            "3 20 16 17 25 17 16 4 16",
        ),
        [(17, 22)],
        [True],
    )


def test_smollm2_writes_its_own_system_prompt():
    tokenizer = toy_tokenizer(SMOLLM2, CHATML_TOKENS)
    chat = tokenize_chat(tokenizer, CHAT[:2])
    assert chat.input_ids[:3] == [3, 18, 16]
    assert chat.input_ids[-12:] == [3, 19, 16, 24, 4, 16, 3, 20, 16, 25, 4, 16]
    length = len(chat.input_ids)
    assert chat.turns == [(length - 3, length - 1)]


# --- Llama 3


def llama3(**options: bool) -> PreTrainedTokenizerFast:
    return toy_tokenizer(LLAMA3, LLAMA3_TOKENS[1:], bos=LLAMA3_TOKENS[0], **options)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_llama3_has_one_bos(adds_bos):
    tokenizer = llama3(adds_bos=adds_bos)
    assert tokenizer("Hi")["input_ids"] == ([5, 24] if adds_bos else [24])
    assert tokenize_chat(tokenizer, SYSTEM_CHAT) == TokenizedChat(
        ids(
            "5 6 18 7 16 16 22 23 8",
            "6 19 7 16 16 24 8",
            "6 20 7 16 16 25 8",
            "6 19 7 16 16 26 8",
            "6 20 7 16 16 27 8",
        ),
        [(21, 23), (35, 37)],
        [True, True],
    )
    assert prompt_ids(tokenizer, CHAT[:1]) == [5, 6, 19, 7, 16, 16, 24, 8, 6, 20, 7, 16, 16]
    assert stop_token_ids(tokenizer) == [8, 2]


def test_llama3_trims_and_takes_empty_answers():
    chat = [says("user", " Hi\n"), says("assistant", "\n"), says("user", "Go")]
    assert tokenize_chat(llama3(), chat) == TokenizedChat(
        ids(
            "5 6 19 7 16 16 24 8",
            "6 20 7 16 16 8",
            "6 19 7 16 16 26 8",
        ),
        [(13, 14)],
        [True],
    )


def test_llama3_knows_no_tools():
    chat = [says("user", "Hi"), says("assistant", "", tool_calls=[CALL]), says("tool", "2")]
    with pytest.raises(UserError, match="message 2 calls tools, which the chat template leaves"):
        tokenize_chat(llama3(), chat)


# --- Mistral


def test_mistral_v01():
    # [INST] is text here; EOS is followed by a space, which is nobody's.
    tokenizer = toy_tokenizer(MISTRAL_V01, [])
    assert tokenize_chat(tokenizer, CHAT) == TokenizedChat(
        ids(
            "1 28 29 30 17 24 17 28 31 29 30 25 2 17",
            "28 29 30 17 26 17 28 31 29 30 27 2 17",
        ),
        [(11, 13), (24, 26)],
        [True, True],
    )
    assert prompt_ids(tokenizer, CHAT[:1]) == [1, 28, 29, 30, 17, 24, 17, 28, 31, 29, 30]
    assert stop_token_ids(tokenizer) == [2]


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        (SYSTEM_CHAT, "roles must alternate user/assistant/user/assistant"),
        ([*CHAT, says("assistant", "Go")], "roles must alternate user/assistant/user/assistant"),
        ([says("user", "Hi"), says("tool", "2")], "Only user and assistant roles are supported"),
    ],
)
def test_mistral_v01_says_what_it_refuses(chat, reason):
    tokenizer = toy_tokenizer(MISTRAL_V01, [])
    for use in (tokenize_chat, prompt_ids, render):
        with pytest.raises(UserError, match=f"chat template refuses the conversation.*{reason}"):
            use(tokenizer, chat)


def mistral_v03(**options: bool) -> PreTrainedTokenizerFast:
    return toy_tokenizer(MISTRAL_V03, MISTRAL_TOKENS, **options)


def test_mistral_v03():
    assert tokenize_chat(mistral_v03(adds_bos=True), CHAT) == TokenizedChat(
        ids(
            "1 9 17 24 10 17 25 2",
            "9 17 26 10 17 27 2",
        ),
        [(5, 8), (12, 15)],
        [True, True],
    )
    assert prompt_ids(mistral_v03(adds_bos=True), CHAT[:1]) == [1, 9, 17, 24, 10]
    assert stop_token_ids(mistral_v03()) == [2]


def test_mistral_v03_forgets_the_system_prompt_once_the_question_is_answered():
    # It is in the last message if that is a question, so no prompt before an answer is a prefix.
    prompt = prompt_ids(mistral_v03(), SYSTEM_CHAT[:2])
    assert prompt == [1, 9, 17, 22, 23, 16, 16, 24, 10]
    chat = tokenize_chat(mistral_v03(), SYSTEM_CHAT)
    assert chat == tokenize_chat(mistral_v03(), CHAT)
    assert chat.turns == [(5, 8), (12, 15)]


def test_mistral_v03_words_take_their_space_along():
    # As SentencePiece does: the token of the answer begins with the space after [/INST].
    chat = [says("system", "Be."), *CHAT[:2], says("user", "Hi"), says("assistant", "No")]
    assert tokenize_chat(mistral_v03(metaspace=True), chat) == TokenizedChat(
        [1, 9, 53, 10, 54, 2, 9, 53, 10, 55, 2], [(4, 6), (9, 11)], [True, True]
    )


CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "add", "arguments": {"a": 1}},
}
TOOLS = [{"type": "function", "function": {"name": "add"}}]
TOOL_CHAT = [
    says("user", "Hi"),
    {"role": "assistant", "tool_calls": [CALL]},
    says("tool", "2", tool_call_id="call00001"),
    says("assistant", "Yo"),
]
# fmt: off
TOOL_CALL_IDS = [
    11, 17, 28,  # [TOOL_CALLS] [
    32, 34, 37, 34, 35, 17, 34, 38, 34, 36, 17,  # {"name": "add",
    34, 39, 34, 35, 17, 32, 34, 40, 34, 35, 17, 41, 33, 36, 17,  # "arguments": {"a": 1},
    34, 42, 34, 35, 17, 34, 43, 34, 33,  # "id": "call00001"}
    30, 2,  # ]</s>
]
TOOL_RESULT_IDS = [
    12, 17, 32, 34, 44, 34, 35, 17, 46, 36, 17,  # [TOOL_RESULTS] {"content": 2,
    34, 45, 34, 35, 17, 34, 43, 34, 33, 13,  # "call_id": "call00001"}[/TOOL_RESULTS]
]
TOOLS_IDS = [
    14, 17, 28, 32, 34, 47, 34, 35, 17, 34, 48, 34, 36, 17,  # the start, [{"type": "function",
    34, 48, 34, 35, 17, 32, 34, 37, 34, 35, 17, 34, 38, 34, 33, 33,  # "function": {"name": "add"}}
    30, 15,  # ] and the end
]
# fmt: on


def test_mistral_v03_calls_a_tool():
    question = [*TOOLS_IDS, 9, 17, 24, 10]
    turn = 1 + len(question)
    end = turn + len(TOOL_CALL_IDS)
    answer = end + len(TOOL_RESULT_IDS)
    for message in (TOOL_CHAT[1], TOOL_CHAT[1] | {"content": ""}, TOOL_CHAT[1] | {"content": None}):
        chat = tokenize_chat(mistral_v03(), [TOOL_CHAT[0], message, *TOOL_CHAT[2:]], TOOLS)
        assert chat == TokenizedChat(
            [1, *question, *TOOL_CALL_IDS, *TOOL_RESULT_IDS, 17, 25, 2],
            [(turn, end), (answer, answer + 3)],
            [True, True],
        )


def test_mistral_v03_calls_a_tool_before_the_last_question():
    # The tools stand before the last question only: the first prompt is no prefix of this.
    before = [1, 9, 17, 24, 10]
    turn = len(before)
    end = turn + len(TOOL_CALL_IDS)
    answer = end + len(TOOL_RESULT_IDS)
    chat = tokenize_chat(mistral_v03(), [*TOOL_CHAT, *CHAT[2:]], TOOLS)
    after = [*TOOLS_IDS, 9, 17, 26, 10, 17, 27, 2]
    assert chat.input_ids == [*[*before, *TOOL_CALL_IDS, *TOOL_RESULT_IDS, 17, 25, 2, *after]]
    length = len(chat.input_ids)
    assert chat.turns == [(turn, end), (answer, answer + 3), (length - 3, length)]


def test_mistral_v03_calls_a_tool_and_has_a_system_prompt():
    # Neither is the first prompt how this conversation begins, nor how the call alone does.
    chat = tokenize_chat(mistral_v03(), [says("system", "Be."), *TOOL_CHAT])
    assert chat == tokenize_chat(mistral_v03(), TOOL_CHAT)
    assert chat.turns[0] == (5, 5 + len(TOOL_CALL_IDS))
    assert chat.input_ids[5 : 5 + len(TOOL_CALL_IDS)] == TOOL_CALL_IDS


def test_mistral_v03_wants_proper_call_ids():
    call = {**CALL, "id": "call1"}
    with pytest.raises(UserError, match="Tool call IDs should be alphanumeric strings with length"):
        tokenize_chat(mistral_v03(), [CHAT[0], {"role": "assistant", "tool_calls": [call]}])


# --- all of them

ALL = {
    "ours": lambda: toy_tokenizer(CHAT_TEMPLATE, CHATML_TOKENS),
    "plain": lambda: toy_tokenizer(PLAIN_CHAT_TEMPLATE, []),
    "smollm2": lambda: toy_tokenizer(SMOLLM2, CHATML_TOKENS),
    "llama3": llama3,
    "mistral_v01": lambda: toy_tokenizer(MISTRAL_V01, []),
    "mistral_v03": mistral_v03,
}


@pytest.mark.parametrize("name", ALL)
def test_the_prompt_is_how_the_conversation_begins(name):
    tokenizer = ALL[name]()
    chat = tokenize_chat(tokenizer, CHAT)
    for (start, _), messages in zip(chat.turns, (CHAT[:1], CHAT[:3]), strict=True):
        assert prompt_ids(tokenizer, messages) == chat.input_ids[:start]


@pytest.mark.parametrize("name", ALL)
def test_messages_of_weight_0_are_turns_that_are_not_trained(name):
    tokenizer = ALL[name]()
    weights = [None, 0, 1, 1.0]
    weighted = [message | {"weight": w} for message, w in zip(CHAT, weights, strict=True)]
    chat = tokenize_chat(tokenizer, weighted)
    plain = tokenize_chat(tokenizer, CHAT)
    assert (chat.input_ids, chat.turns) == (plain.input_ids, plain.turns)
    assert (chat.trained, plain.trained) == ([False, True], [True, True])
    assert weighted[1]["weight"] == 0  # the caller's messages are left alone
