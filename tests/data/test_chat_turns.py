"""Where the assistant's turns are, in templates that do not mark them and make it hard to tell."""

import pytest
from hypothesis import given, settings

from lit_llm.data.chat_template import render, stop_token_ids, tokenize_chat
from lit_llm.data.chat_turns import _by_mark, _by_prefix, _ending
from lit_llm.errors import UserError
from tests.data.test_chat_template import EXCHANGES, TOKENIZERS, byte_tokenizer, words
from tests.data.test_chat_templates_real import CHAT, says

# As Qwen 3: thoughts only in the last answer, empty ones if it has none.
THINKING = """
{%- for message in messages %}
    {%- set content = message.content or "" %}
    {{- "<|im_start|>" + message.role + "\n" }}
    {%- if message.role == "assistant" %}
        {%- set thoughts, answer = "", content %}
        {%- if "</think>" in content %}
            {%- set thoughts = content.split("</think>")[0].split("<think>")[-1].strip("\n") %}
            {%- set answer = content.split("</think>")[-1].lstrip("\n") %}
        {%- endif %}
        {%- if loop.last %}
            {{- "<think>\n" + thoughts + "\n</think>\n\n" }}
        {%- endif %}
        {{- answer }}
        {%- for call in message.tool_calls or [] %}
            {{- "<tool_call>" + (call | tojson) + "</tool_call>" }}
        {%- endfor %}
    {%- else %}
        {{- content }}
    {%- endif %}
    {{- "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" }}
{%- endif %}
"""
THINKING_CHAT = [
    says("user", "Hi"),
    says("assistant", "<think>\nhm\n</think>\n\nYo"),
    says("user", "Go"),
    says("assistant", "<think>\nso\n</think>\n\nNo"),
]


def test_thoughts_that_are_dropped_later():
    tokenizer = byte_tokenizer(THINKING, [])
    chat = tokenize_chat(tokenizer, THINKING_CHAT)
    assert words(tokenizer, chat) == ["Yo<|im_end|>", "<think>\nso\n</think>\n\nNo<|im_end|>"]
    chat = tokenize_chat(tokenizer, CHAT)
    assert words(tokenizer, chat) == ["Yo<|im_end|>", "<think>\n\n</think>\n\nNo<|im_end|>"]


def test_a_tool_call_that_was_once_thought_about():
    tokenizer = byte_tokenizer(THINKING, [])
    calls = [{"name": "add", "arguments": {"a": 1}}, {"name": "sub", "arguments": {}}]
    called = {"role": "assistant", "content": None, "tool_calls": calls}
    chat = tokenize_chat(tokenizer, [CHAT[0], called, says("tool", "2"), *CHAT[1:]])
    assert words(tokenizer, chat) == [
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
        '<tool_call>{"name": "sub", "arguments": {}}</tool_call><|im_end|>',
        "Yo<|im_end|>",
        "<think>\n\n</think>\n\nNo<|im_end|>",
    ]


def test_an_answer_that_the_prompt_begins():
    # As DeepSeek-R1: the prompt opens the thoughts, which the conversation leaves out.
    template = """
    {%- for m in messages %}
        {%- if m.role == "user" %}{{- "<User>" + m.content }}
        {%- else %}{{- "<Bot>" + m.content.split("</think>")[-1] + eos_token }}{%- endif %}
    {%- endfor %}
    {%- if add_generation_prompt %}{{- "<Bot><think>\n" }}{%- endif %}
    """
    tokenizer = byte_tokenizer(template, ["<User>", "<Bot>"])
    assert words(tokenizer, tokenize_chat(tokenizer, CHAT)) == ["Yo</s>", "No</s>"]
    assert words(tokenizer, tokenize_chat(tokenizer, THINKING_CHAT)) == ["\n\nYo</s>", "\n\nNo</s>"]


def test_what_ends_the_conversation_ends_no_turn():
    # As Phi 3: EOS closes the whole conversation.
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt else '<|endoftext|>' }}"
    )
    tokenizer = byte_tokenizer(template, ["<|user|>", "<|assistant|>", "<|endoftext|>"])
    chat = tokenize_chat(tokenizer, [*CHAT[:3], says("assistant", "")])
    assert words(tokenizer, chat) == ["Yo<|im_end|>", "<|im_end|>"]
    assert stop_token_ids(tokenizer) == [3, tokenizer.eos_token_id]


NO_END = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '\n' }}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else '' }}"
)


@pytest.mark.parametrize("special", [[], ["<|user|>", "<|assistant|>"]])
def test_a_template_that_ends_no_turn(special):
    tokenizer = byte_tokenizer(NO_END, special)
    chat = tokenize_chat(tokenizer, [says("user", "Hi"), says("assistant", "Yo "), *CHAT[2:]])
    assert words(tokenizer, chat) == ["Yo", "No"]
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id]


def test_an_empty_answer_that_nothing_ends_is_no_turn():
    tokenizer = byte_tokenizer(NO_END, ["<|user|>", "<|assistant|>"])
    chat = [says("user", "Hi"), says("assistant", "", weight=0), says("user", "Go"), CHAT[3]]
    found = tokenize_chat(tokenizer, chat)
    assert (words(tokenizer, found), found.trained) == (["No"], [True])


@pytest.mark.parametrize(
    "template",
    [
        # Another end of turn in the middle than at the end (gpt-oss).
        "{% for m in messages %}{{ m.content }}"
        "{{ '</s>' if loop.last and not add_generation_prompt else '<|im_end|>' }}{% endfor %}",
        # The answer comes out changed where it is not the last.
        "{% for m in messages %}{{ m.content if loop.last else m.content[::-1] }}{% endfor %}",
    ],
)
def test_turns_that_cannot_be_located(template):
    with pytest.raises(UserError, match="message 2, a turn of the assistant, cannot be located"):
        tokenize_chat(byte_tokenizer(template, []), CHAT)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content if m.role == 'user' else '' }}</s>{% endfor %}",
        # As templates of models that see: a content of plain text is skipped.
        "{% for m in messages %}{{ m.content[0].text }}</s>{% endfor %}",
        "{% for m in messages if m.role == 'assistant' %}"
        "{% generation %}</s>{% endgeneration %}{% endfor %}",
    ],
)
def test_a_template_that_leaves_out_the_answers(template):
    with pytest.raises(UserError, match="message 2 says something, which .* leaves out"):
        tokenize_chat(byte_tokenizer(template, []), CHAT)


def test_an_answer_that_comes_out_changed_is_no_lost_answer():
    template = "{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}"
    tokenizer = byte_tokenizer(template, [])
    assert words(tokenizer, tokenize_chat(tokenizer, CHAT)) == ["YO</s>", "NO</s>"]


@pytest.mark.parametrize("name", ["smollm2", "llama3", "mistral_v01", "mistral_v03"])
@settings(max_examples=60, deadline=None)
@given(exchanges=EXCHANGES)
def test_both_ways_to_find_a_turn_agree(name, exchanges):
    tokenizer = TOKENIZERS[name]
    messages = []
    for question, answer in exchanges:
        messages += [says("user", question), says("assistant", answer)]
    text = render(tokenizer, messages)

    def rendered(some, prompt):
        return render(tokenizer, some, add_generation_prompt=prompt)

    for i in range(1, len(messages), 2):
        ending = _ending(messages, i, rendered, ("<|im_end|>", "<|eot_id|>", "</s>"))
        by_prefix = _by_prefix(text, ending)
        assert by_prefix is not None
        assert _by_mark(text, messages, i, rendered, ending) == by_prefix
