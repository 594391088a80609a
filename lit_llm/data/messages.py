"""Messages of a record: those of a chat template, of ShareGPT and of Alpaca, made one form.

Whatever does not fit is a ``UserError`` that names the place.
"""

import json
from collections.abc import Iterable
from typing import Any

from lit_llm.data.record_formats import json_type, text_of
from lit_llm.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
MESSAGE_FIELDS = ("messages", "conversations", "conversation")
# What a message may hold in place of content.
_OTHER_CONTENT = ("tool_calls", "function_call", "function_calls", "reasoning_content", "thinking")


def root_group(messages: list[dict[str, Any]]) -> str:
    """Group of a conversation: the text of the first question, so equal ones stay together."""
    first = next((message for message in messages if message["role"] == "user"), messages[0])
    return str(first["content"])


def messages_of(data: dict[str, Any], field: str, origin: str) -> list[dict[str, Any]]:
    """The messages of a field, with role and content or with from and value, as its first one.

    Raises:
        UserError: When it holds anything else, or nothing.
    """
    if is_sharegpt(data[field]):
        return sharegpt_messages(data, field, origin)
    return role_messages(data, field, origin)


def is_sharegpt(messages: object) -> bool:
    """Whether a list of messages begins with one that has ``from`` in place of ``role``."""
    first = messages[0] if isinstance(messages, list) and messages else None
    return isinstance(first, dict) and "from" in first and "role" not in first


def role_messages(data: dict[str, Any], field: str, origin: str) -> list[dict[str, Any]]:
    """The messages of a field, each with role and content."""
    return [_message(message, place) for message, place in _items(data, field, origin)]


def sharegpt_messages(data: dict[str, Any], field: str, origin: str) -> list[dict[str, Any]]:
    """The messages of a field, given with from and value."""
    messages = []
    for item, place in _items(data, field, origin):
        speaker = text_of(item, "from", place)
        if speaker not in _SHAREGPT_ROLES:
            raise UserError(
                f"{place}: speaker {speaker!r} is unknown; "
                f"those known are: {', '.join(_SHAREGPT_ROLES)}."
            )
        message = {"role": _SHAREGPT_ROLES[speaker], "content": text_of(item, "value", place)}
        weight = {"weight": item["weight"]} if "weight" in item else {}
        messages.append({**message, **_checked_others(weight, place)})
    return messages


def _items(data: dict[str, Any], field: str, origin: str) -> list[tuple[dict[str, Any], str]]:
    """The objects of a list and the place of each, for messages."""
    if not isinstance(data[field], list):
        raise UserError(
            f"{origin}: field {field!r} is {json_type(data[field])}, not a list of messages."
        )
    if not data[field]:
        raise UserError(f"{origin}: field {field!r} is an empty list; a message is needed.")
    found = []
    for number, item in enumerate(data[field], start=1):
        place = f"{origin}: message {number} of {field!r}"
        if not isinstance(item, dict):
            raise UserError(f"{place} is {json_type(item)}, not an object with a role and content.")
        found.append(({key: value for key, value in item.items() if value is not None}, place))
    return found


def _message(item: dict[str, Any], place: str) -> dict[str, Any]:
    role = text_of(item, "role", place)
    if role not in ROLES:
        raise UserError(f"{place}: role {role!r} is unknown; the roles are: {', '.join(ROLES)}.")
    if isinstance(item.get("content"), list):
        content = "".join(_part(part, place) for part in item["content"])
    elif "content" not in item and any(item.get(field) for field in _OTHER_CONTENT):
        content = ""
    else:
        content = text_of(item, "content", place)
    others = {key: item[key] for key in item if key not in ("role", "content")}
    return {"role": role, "content": content, **_checked_others(others, place)}


def _part(part: object, place: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else json_type(part)
        raise UserError(f"{place}: holds a part of type {kind!r}; only text can be trained on.")
    return text_of(part, "text", place)


def _checked_others(others: dict[str, Any], place: str) -> dict[str, Any]:
    if others.get("weight", 1) not in (0, 1):
        raise UserError(
            f"{place}: weight {others['weight']!r} must be 1, or 0 for an answer that is not "
            "trained on."
        )
    kept = {}
    for key, value in others.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
            kept[key] = value
        except UnicodeEncodeError as error:
            raise UserError(
                f"{place}: field {key!r} holds half of a surrogate pair, which is not Unicode text."
            ) from error
        except TypeError:
            pass  # a time stamp or bytes, of a .parquet: nothing that a template could print
    return kept


def _tools(data: dict[str, Any], origin: str) -> list[Any] | None:
    tools = data.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{origin}: field 'tools' is not JSON ({error}).") from error
    if tools and not isinstance(tools, list):
        raise UserError(f"{origin}: field 'tools' is {json_type(tools)}, not a list of tools.")
    return tools or None


def template_values(
    data: dict[str, Any], origin: str
) -> tuple[list[Any] | None, dict[str, Any] | None]:
    """The tools and the other values that a record has for the template."""
    options = data.get("chat_template_kwargs")
    if options and not isinstance(options, dict):
        raise UserError(
            f"{origin}: field 'chat_template_kwargs' is {json_type(options)}, not an object."
        )
    return _tools(data, origin), options or None


def with_system(
    messages: list[dict[str, Any]], data: dict[str, Any], origin: str
) -> list[dict[str, Any]]:
    """Messages after one of the record's field ``system``, if they do not begin with their own."""
    text = text_of(data, "system", origin) if "system" in data else ""
    if not text or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": text}, *messages]


def asked(
    data: dict[str, Any], origin: str, question: str, past: Iterable[tuple[str, str]] = ()
) -> list[dict[str, Any]]:
    """A question as the messages that ask it, after the system's and those of past turns."""
    messages = []
    for before, answer in past:
        messages.append({"role": "user", "content": before})
        messages.append({"role": "assistant", "content": answer})
    return with_system([*messages, {"role": "user", "content": question}], data, origin)


def alpaca_question(data: dict[str, Any], origin: str) -> list[dict[str, Any]]:
    """An instruction with maybe an input, a system message and a history, as messages."""
    question = text_of(data, "instruction", origin)
    if "input" in data and (context := text_of(data, "input", origin)).strip():
        question = f"{question}\n\n{context}"
    past = []
    for number, turn in enumerate(data.get("history", []), start=1):
        place = f"{origin}: turn {number} of 'history'"
        if not isinstance(turn, list) or len(turn) != 2:
            raise UserError(f"{place} is not a pair of a question and an answer.")
        pair = {"question": turn[0], "answer": turn[1]}
        past.append((text_of(pair, "question", place), text_of(pair, "answer", place)))
    return asked(data, origin, question, past)
