"""Chat templates: a conversation to tokens, and which of these tokens the assistant has to say.

A conversation is rendered once and tokenised once. The assistant's turns are found as ranges of
characters of that one text and carried over to tokens by their offsets: tokenising prompt and
answer apart gives other tokens where they meet. What counts as a turn is what the model has to
generate after the generation prompt, up to and with the token that ends the turn.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_llm.data.chat_turns import Message, locate, refuse_lost_answers
from lit_llm.data.tokenizer import CHAT_TEMPLATE, END_OF_TURN, START_OF_TURN
from lit_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For a vocabulary without tokens for turns: headlines in plain text, and EOS ends an answer.
# Contents are trimmed for the same reason as in CHAT_TEMPLATE.
PLAIN_CHAT_TEMPLATE = (
    "{%- if bos_token is defined and bos_token != eos_token -%}{{- bos_token -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '### ' + message['role'] | capitalize + ':\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] | trim + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] | trim -}}"
    "{%- endif -%}"
    "{{- '\n\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '### Assistant:\n' -}}{%- endif -%}"
)

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class TokenizedChat:
    """A conversation, or a prompt with its completion, as tokens.

    Attributes:
        input_ids: All T tokens.
        turns: Token ranges [start, stop) of the assistant's turns, each with the token that ends
            it and nothing else.
        trained: One a turn; False where the message has the weight 0.
    """

    input_ids: list[int]
    turns: list[tuple[int, int]]
    trained: list[bool]


def with_chat_template(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Give the tokenizer a chat template if it has none, and return it.

    It is ChatML where ``<|im_start|>`` and ``<|im_end|>`` are special tokens of the vocabulary
    already, else plain text that needs no token but EOS. Both mark what the assistant says.
    """
    if not tokenizer.chat_template:
        chatml = {START_OF_TURN, END_OF_TURN} <= _special_tokens(tokenizer)
        tokenizer.chat_template = CHAT_TEMPLATE if chatml else PLAIN_CHAT_TEMPLATE
    return tokenizer


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    tools: list[Any] | None = None,
    options: dict[str, Any] | None = None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Render a conversation as text.

    Args:
        tokenizer: With a chat template.
        messages: Dicts with ``role``, ``content`` and what else the template reads; ``weight`` is
            taken out.
        tools: JSON schemas of the tools the assistant may call.
        options: More values for the template.
        add_generation_prompt: End with what opens the assistant's next turn.

    Raises:
        UserError: When there is no template, or it refuses the conversation.
    """
    return _render(tokenizer, messages, tools, options, add_generation_prompt)[0]


def tokenize_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    tools: list[Any] | None = None,
    options: dict[str, Any] | None = None,
) -> TokenizedChat:
    """Tokenise a conversation and find the assistant's turns in it.

    Where the template marks them (``{% generation %}``), they are what
    ``apply_chat_template(..., return_assistant_tokens_mask=True)`` marks. Otherwise a turn is what
    its message adds to the text rendered from the messages before it with the generation prompt.
    Templates that render a message in another way when more follow it are rendered a second time
    with the message enclosed in characters that occur nowhere else.

    A token that lies in a turn only in part belongs to it. Turns without a token are left out.

    Args:
        tokenizer: Fast, with a chat template.
        messages: The conversation, as for :func:`render`.
        tools: JSON schemas of the tools the assistant may call.
        options: More values for the template.

    Raises:
        UserError: When the tokenizer gives no offsets, the template refuses the conversation or
            leaves out an answer, or the assistant's turns cannot be located.
    """

    def rendered(some: Sequence[Message], prompt: bool) -> str | None:
        try:
            return _render(tokenizer, some, tools, options, prompt)[0]
        except UserError:
            return None

    text, marked = _render(tokenizer, messages, tools, options)
    refuse_lost_answers(text, messages, rendered)
    assistant = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    trained = [messages[i].get("weight") != 0 for i in assistant]
    if marked is None:
        special = tuple(_special_tokens(tokenizer))
        marked = [locate(text, messages, i, rendered, special) for i in assistant]
    elif len(marked) != len(assistant):
        if not marked or not all(trained):
            raise UserError(
                f"the chat template marks {len(marked)} passages as generated for {len(assistant)} "
                "messages of the assistant; put {% generation %} around each of them once."
            )
        trained = [True] * len(marked)
    input_ids, offsets = _encode(tokenizer, text, add_special_tokens=False)
    turns = [_tokens_in(offsets, start, stop) for start, stop in marked]
    kept = [(turn, flag) for turn, flag in zip(turns, trained, strict=True) if turn is not None]
    return TokenizedChat(input_ids, [turn for turn, _ in kept], [flag for _, flag in kept])


def tokenize_completion(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, completion: str
) -> TokenizedChat:
    """Tokenise plain text whose completion is to be learnt: one turn, closed by EOS.

    Prompt and completion are joined as they are and tokenised at once, with the BOS that the
    tokenizer adds, if it does; neither BOS nor EOS is doubled where the text has its own.

    Args:
        tokenizer: Needs no chat template.
        prompt: What is given; "" makes all of the text the turn, BOS aside.
        completion: What is to be learnt.

    Raises:
        UserError: When the tokenizer gives no offsets.
    """
    text = prompt + completion
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    input_ids, offsets = _encode(tokenizer, text, add_special_tokens=True)
    if bos is not None and input_ids[:2] == [bos, bos] and offsets[0] == (0, 0):
        input_ids, offsets = input_ids[1:], offsets[1:]
    if input_ids[-2:] == [eos, eos] and offsets[-1] == (0, 0):
        input_ids, offsets = input_ids[:-1], offsets[:-1]
    first = int(input_ids[:1] == [bos])
    if len(input_ids) == first or input_ids[-1] != eos:
        input_ids = [*input_ids, eos]
    if prompt:
        # Without a token of its own, the completion is the EOS.
        inside = _tokens_in(offsets, len(prompt), len(text))
        first = inside[0] if inside else len(input_ids) - 1
    return TokenizedChat(input_ids, [(first, len(input_ids))], [True])


def prompt_ids(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    tools: list[Any] | None = None,
    options: dict[str, Any] | None = None,
) -> list[int]:
    """Tokens of a conversation and of the generation prompt: what the model is to answer.

    Raises:
        UserError: When the template refuses the conversation.
    """
    text = render(tokenizer, messages, tools, options, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def plain_prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """Tokens of a prompt without a template: as in :func:`tokenize_completion`, without an end."""
    ids: list[int] = tokenize_completion(tokenizer, prompt, "").input_ids
    return ids[:-1]


def stop_token_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokens that end an answer: the template's end of turn, if it has one, then EOS.

    Raises:
        UserError: When the template refuses a question and an answer.
    """
    ids = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        probe = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
        chat = tokenize_chat(tokenizer, probe)
        special = _special_tokens(tokenizer)
        ends = []
        for start, stop in chat.turns:
            # White space may follow the token that ends the turn, where the template marks it too.
            tokens = [t for t in chat.input_ids[start:stop] if str(tokenizer.decode(t)).strip()]
            ends += [t for t in tokens[-1:] if tokenizer.convert_ids_to_tokens(t) in special]
        ids = ends + ids
    return list(dict.fromkeys(ids))


# --- rendering and tokenising


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    tools: list[Any] | None,
    options: dict[str, Any] | None,
    add_generation_prompt: bool = False,
) -> tuple[str, list[tuple[int, int]] | None]:
    """The text, and the characters the template marks as generated (None: it has no marks)."""
    # What apply_chat_template calls; only here the marks come as characters, one a turn.
    from transformers.utils.chat_template_utils import render_jinja_template

    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; give it one.")
    try:
        template = tokenizer.get_chat_template(tools=tools)
        has_marks = _GENERATION.search(template) is not None
        special: dict[str, Any] = tokenizer.special_tokens_map
        rendered: Any = render_jinja_template(
            [[{key: m[key] for key in m if key != "weight"} for m in messages]],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=has_marks,
            add_generation_prompt=add_generation_prompt,
            **special | (options or {}),
        )
    # A template is a program of its own, and may raise anything on what it does not expect.
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(f"the chat template refuses the conversation: {reason}.") from error
    (text,), ranges = rendered
    return text, ranges[0] if has_marks else None


def _encode(
    tokenizer: "PreTrainedTokenizerBase", text: str, *, add_special_tokens: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for; "
            "give a fast tokenizer (tokenizer.json)."
        )
    encoding = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        verbose=False,
    )
    return encoding["input_ids"], encoding["offset_mapping"]


def _tokens_in(offsets: Sequence[tuple[int, int]], start: int, stop: int) -> tuple[int, int] | None:
    """The tokens that overlap a range of characters; one of no width has to lie strictly inside."""
    inside = [k for k, (left, right) in enumerate(offsets) if left < stop and right > start]
    return (inside[0], inside[-1] + 1) if inside and start < stop else None


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    added = tokenizer.added_tokens_decoder.values()
    return {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
