"""Where the assistant's turns are in a rendered conversation, when its template does not mark them.

Everything here is about characters: a turn is what stands between the prompt that the model is
given and the white space after the token that ends the turn.
"""

import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lit_llm.errors import UserError

Message = dict[str, Any]
# Messages, and whether the generation prompt follows, to text; None where the template refuses.
Renderer = Callable[[Sequence[Message], bool], "str | None"]
# Text up to a message with the generation prompt, and with the message itself.
_Ending = tuple["str | None", "str | None"]

_END_OF_THINKING = "</think>"


def refuse_lost_answers(text: str, messages: Sequence[Message], rendered: Renderer) -> None:
    """Refuse a template that leaves out what the assistant says or calls: it would teach silence.

    Args:
        text: The rendered conversation.
        messages: The conversation.
        rendered: Renders messages, with or without the generation prompt.

    Raises:
        UserError: When an answer or a tool call does not come out.
    """
    mark = _unused(text)
    for i, message in enumerate(messages):
        content, calls = message.get("content"), message.get("tool_calls")
        plain = isinstance(content, str) and content.strip() in text
        if message.get("role") != "assistant" or not (calls or content) or (plain and not calls):
            continue
        marked = [_replaced(messages, i, changed) for changed in _with_mark(message, mark)]
        shown = max(((rendered(some, False) or "").count(mark) for some in marked), default=1)
        if shown < len(calls or [mark]):
            said, known = ("calls tools", "tool calls") if calls else ("says something", "it")
            raise UserError(
                f"message {i + 1} {said}, which the chat template leaves out; "
                f"give a chat template that renders {known}."
            )


def locate(
    text: str, messages: Sequence[Message], i: int, rendered: Renderer, special: tuple[str, ...]
) -> tuple[int, int]:
    """The characters of message i, an assistant's turn, in the rendered conversation.

    Args:
        text: The rendered conversation.
        messages: The conversation.
        i: Which of them.
        rendered: Renders messages, with or without the generation prompt.
        special: The special tokens of the vocabulary.

    Returns:
        The range [start, stop), with the token that ends the turn if the template writes one.

    Raises:
        UserError: When it cannot be told.
    """
    ending = _ending(messages, i, rendered, special)
    found = _by_prefix(text, ending) or _by_mark(text, messages, i, rendered, ending)
    if found is None:
        raise UserError(
            f"message {i + 1}, a turn of the assistant, cannot be located in what the chat "
            "template renders; give a chat template with {% generation %} around such turns."
        )
    return found


def _ending(
    messages: Sequence[Message], i: int, rendered: Renderer, special: tuple[str, ...]
) -> _Ending:
    """The conversation as it is rendered when message i is the last one."""
    prompt, answered = rendered(messages[:i], True), rendered(messages[: i + 1], False)
    followed = rendered(messages[: i + 1], True)
    if answered and followed and not followed.startswith(answered):
        # What a template writes after the last message of all (Phi 3) is not the turn's.
        shared = os.path.commonprefix([answered, followed])  # noqa: RUF071
        end = max((shared.rfind(t) + len(t) for t in special if t in shared), default=0)
        if end > len(prompt or "") and any(t.startswith(shared[end:].strip()) for t in special):
            answered = shared[:end]
    return prompt, answered and answered.rstrip()


def _by_prefix(text: str, ending: _Ending) -> tuple[int, int] | None:
    """What the message adds to those before it, where nothing that follows changes that."""
    prompt, answered = ending
    if prompt is None or answered is None or not text.startswith(answered):
        return None
    adds = answered.startswith(prompt) and len(answered) > len(prompt)
    return (len(prompt), len(answered)) if adds else None


def _by_mark(
    text: str, messages: Sequence[Message], i: int, rendered: Renderer, ending: _Ending
) -> tuple[int, int] | None:
    """Where a character put into message i comes out: the turn is what is around it alone, too.

    For templates that render a message in another way when others follow: Qwen 3 drops thoughts,
    Mistral moves the system prompt and the tools to the last question.
    """
    prompt, answered = ending
    if answered is None:
        return None
    mark = _unused(text)
    for marked in _with_mark(messages[i], mark):
        whole = rendered(_replaced(messages, i, marked), False) or ""
        alone = rendered([*messages[:i], marked], False) or ""
        place, own = whole.find(mark), alone.find(mark)
        shown = place >= 0 and own >= 0 and whole.replace(mark, "") == text
        same = shown and alone.replace(mark, "").startswith(answered)
        if same and text.startswith(answered[own:], place):
            head = _head(answered[:own], prompt, messages[:i], rendered)
            start = None if head is None else _start(text, place, *head)
            if start is None and not messages[i].get("tool_calls"):
                start = place
            return None if start is None else (start, place + len(answered[own:]))
    return None


def _head(
    before: str, prompt: str | None, history: Sequence[Message], rendered: Renderer
) -> tuple[str, str] | None:
    """What opens a turn in the prompt, and what follows that in the text before the mark."""
    if prompt is None:
        return None
    opening = prompt.removeprefix(rendered(history, False) or "")
    if before.startswith(prompt):
        return opening or prompt, before[len(prompt) :]
    # The prompt tells more than the answered question does (Mistral): they agree in its end.
    size = bisect_left(range(len(prompt)), True, key=lambda k: prompt[~k:] not in before)
    shared = prompt[len(prompt) - size :]
    asked = str(history[-1].get("content") or "").strip() if history else ""
    if not shared.strip() or opening not in shared or asked not in shared:
        return None
    return opening or shared, before.rpartition(shared)[2]


def _start(text: str, place: int, opening: str, head: str) -> int | None:
    """Where the turn begins of which ``place`` is a part."""
    if text[:place].endswith(head):
        return place - len(head)
    # The head is shorter here (Qwen 3 writes empty thoughts at the end only).
    _, found, between = text[:place].rpartition(opening)
    return place - len(between) if found and head.endswith(between) else None


def _with_mark(message: Message, mark: str) -> Iterator[Message]:
    """Copies of a message, each with the character in another place where it may come out."""
    content = message.get("content")
    if message.get("tool_calls"):
        yield _with_marked_calls(message, mark)
    elif isinstance(content, str):
        # Before its words: some templates drop the white space there, or thoughts.
        for words in (content, content.rpartition(_END_OF_THINKING)[2]):
            for tail in (words, words.lstrip()):
                at = len(content) - len(tail)
                yield {**message, "content": content[:at] + mark + tail}


def _with_marked_calls(message: Message, mark: str) -> Message:
    calls = []
    for call in message["tool_calls"]:
        called = call.get("function", call)
        called = {**called, "name": f"{mark}{called.get('name')}"}
        calls.append({**call, "function": called} if "function" in call else called)
    return {**message, "tool_calls": calls}


def _replaced(messages: Sequence[Message], i: int, message: Message) -> list[Message]:
    return [*messages[:i], message, *messages[i + 1 :]]


def _unused(text: str) -> str:
    """A character for private use that does not occur in the text."""
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)
