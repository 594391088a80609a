"""Tokens and the assistant's turns against transformers' own ``apply_chat_template``."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_llm.data.chat_template import PLAIN_CHAT_TEMPLATE, prompt_ids, render, tokenize_chat
from lit_llm.data.tokenizer import CHAT_TEMPLATE
from tests.data.test_chat_template import byte_tokenizer
from tests.data.test_chat_templates_real import (
    LLAMA3,
    LLAMA3_TOKENS,
    MISTRAL_TOKENS,
    MISTRAL_V01,
    MISTRAL_V03,
    SMOLLM2,
    says,
)

# Llama 3 with marks around what the model generates.
LLAMA3_MARKED = LLAMA3.replace(
    "{{- message.content | trim }}\n    {{- \"<|eot_id|>\" }}",
    "{%- if message.role == 'assistant' %}{% generation %}"
    "{{- message.content | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{%- else %}{{- message.content | trim + '<|eot_id|>' }}{%- endif %}",
)  # fmt: skip
MARKED = {
    "chatml": byte_tokenizer(CHAT_TEMPLATE, []),
    "plain": byte_tokenizer(PLAIN_CHAT_TEMPLATE, []),
    "llama3": byte_tokenizer(LLAMA3_MARKED, LLAMA3_TOKENS[1:]),
}
UNMARKED = {
    "smollm2": byte_tokenizer(SMOLLM2, []),
    "llama3": byte_tokenizer(LLAMA3, LLAMA3_TOKENS[1:]),
    "mistral_v01": byte_tokenizer(MISTRAL_V01, []),
    "mistral_v03": byte_tokenizer(MISTRAL_V03, MISTRAL_TOKENS),
}
CONTENTS = st.text(max_size=12) | st.text(" \n\tab.é🌍", max_size=8)
EXCHANGES = st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3)


def conversation(exchanges: list[tuple[str, str]]) -> list[dict]:
    return [
        says(role, content)
        for exchange in exchanges
        for role, content in zip(("user", "assistant"), exchange, strict=True)
    ]


def test_the_marked_llama3_is_marked() -> None:
    assert LLAMA3_MARKED.count("generation %}") == 2


@pytest.mark.parametrize("name", MARKED)
@settings(max_examples=60, deadline=None)
@given(exchanges=EXCHANGES, system=st.none() | CONTENTS)
def test_tokens_and_masks_are_transformers_own(name, exchanges, system) -> None:
    tokenizer = MARKED[name]
    messages = [] if system is None else [says("system", system)]
    messages += conversation(exchanges)
    theirs = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = tokenize_chat(tokenizer, messages)
    mask = [0] * len(ours.input_ids)
    for start, stop in ours.turns:
        mask[start:stop] = [1] * (stop - start)
    assert ours.input_ids == theirs["input_ids"]
    assert mask == theirs["assistant_masks"]
    assert len(ours.turns) == len(exchanges)


@pytest.mark.parametrize("name", [*MARKED, *UNMARKED])
@settings(max_examples=30, deadline=None)
@given(exchanges=EXCHANGES)
def test_texts_and_prompts_are_transformers_own(name, exchanges) -> None:
    tokenizer = (MARKED | UNMARKED)[name]
    messages = conversation(exchanges)
    assert render(tokenizer, messages) == tokenizer.apply_chat_template(messages, tokenize=False)
    theirs = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)
    assert prompt_ids(tokenizer, messages[:-1]) == theirs["input_ids"]
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert tokenize_chat(tokenizer, messages).input_ids == whole["input_ids"]


@pytest.mark.parametrize("marked", ["llama3"])
@settings(max_examples=60, deadline=None)
@given(exchanges=EXCHANGES)
def test_a_template_without_marks_gives_the_turns_of_the_same_with_marks(marked, exchanges) -> None:
    messages = conversation(exchanges)
    assert tokenize_chat(UNMARKED[marked], messages) == tokenize_chat(MARKED[marked], messages)
