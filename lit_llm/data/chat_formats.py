"""From one record to samples: the formats that data for supervised fine-tuning comes in.

Those that TRL's SFTTrainer reads (https://huggingface.co/docs/trl/dataset_formats), Alpaca and
ShareGPT. A reader gets the fields of a record that are not null, those that its format needs among
them, and its origin; whatever does not fit is a ``UserError`` that names the origin.
"""

import json
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Conversation:
    """Messages that go through the chat template.

    Attributes:
        messages: Each with ``role`` and ``content``, maybe ``tool_calls``, ``name`` and whatever
            else a template may ask for. An assistant's message with ``weight`` 0 is not trained on.
        origin: Where it stands, for people: ``"file:line"``.
        group: Conversations of one group never cross splits.
        tools: Descriptions of the tools, for the template.
        answer_format: Regular expression that a well-formed answer to the last question matches as
            a whole (``re.fullmatch`` with ``re.DOTALL``).
        template_options: More values for the template, such as ``enable_thinking``
            (``chat_template_kwargs`` in TRL's data sets).
    """

    messages: list[dict[str, Any]]
    origin: str
    group: str
    tools: list[Any] | None = None
    answer_format: str | None = None
    template_options: dict[str, Any] | None = None


@dataclass(frozen=True)
class Completion:
    """Plain text, without a template: prompt and completion joined as they are.

    Attributes:
        prompt: Not trained on; empty for a text that is trained on as a whole.
        completion: What is trained on.
        origin: Where it stands, for people.
        group: Completions of one group never cross splits.
    """

    prompt: str
    completion: str
    origin: str
    group: str


@dataclass(frozen=True)
class Tokens:
    """A text that is tokenised already.

    Attributes:
        input_ids: Its tokens.
        trained: For each token whether it is trained on.
        origin: Where it stands, for people.
        group: Texts of one group never cross splits.
    """

    input_ids: list[int]
    trained: list[bool]
    origin: str
    group: str


Sample = Conversation | Completion | Tokens


def root_group(messages: list[dict[str, Any]]) -> str:
    """Group of a conversation: the text of the first question, so equal ones stay together."""
    first = next((message for message in messages if message["role"] == "user"), messages[0])
    return str(first["content"])


def _messages(data: dict[str, Any], field: str, origin: str) -> list[dict[str, Any]]:
    return [_message(message, place) for message, place in _items(data, field, origin)]


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


def _conversation(messages: list[dict[str, Any]], data: dict[str, Any], origin: str) -> Sample:
    options = data.get("chat_template_kwargs")
    if options and not isinstance(options, dict):
        raise UserError(
            f"{origin}: field 'chat_template_kwargs' is {json_type(options)}, not an object."
        )
    tools = _tools(data, origin)
    return Conversation(
        messages, origin, root_group(messages), tools, template_options=options or None
    )


def read_messages(data: dict[str, Any], origin: str) -> list[Sample]:
    """A list of messages with role and content; its assistant's turns are trained on."""
    field = next(field for field in MESSAGE_FIELDS if field in data)
    return [_conversation(_messages(data, field, origin), data, origin)]


def read_sharegpt(data: dict[str, Any], origin: str) -> list[Sample]:
    """A list of messages with from and value, and maybe a field ``system``."""
    field = next(field for field in MESSAGE_FIELDS if field in data)
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
    if messages[0]["role"] != "system":
        messages = [*_system(data, origin), *messages]
    return [_conversation(messages, data, origin)]


def _system(data: dict[str, Any], origin: str) -> list[dict[str, Any]]:
    text = text_of(data, "system", origin) if "system" in data else ""
    return [{"role": "system", "content": text}] if text else []


def _answers(data: dict[str, Any], field: str, origin: str) -> list[str]:
    """The answer, or each of a list of them: every reference answer makes a sample of its own."""
    if not isinstance(data[field], list):
        return [text_of(data, field, origin)]
    if not data[field]:
        raise UserError(f"{origin}: field {field!r} is an empty list; an answer is needed.")
    return [text_of({field: answer}, field, origin) for answer in data[field]]


def read_prompt_completion(data: dict[str, Any], origin: str) -> list[Sample]:
    """Two texts without the template, or two lists of messages with it.

    Of the messages those of the completion are trained on.
    """
    if isinstance(data["prompt"], list):
        messages = [
            {**message, "weight": 0} if message["role"] == "assistant" else message
            for message in _messages(data, "prompt", origin)
        ]
        messages += _messages(data, "completion", origin)
        return [_conversation(messages, data, origin)]
    prompt = text_of(data, "prompt", origin)
    answers = _answers(data, "completion", origin)
    return [Completion(prompt, answer, origin, group=prompt) for answer in answers]


def _turns(
    data: dict[str, Any], origin: str, past: list[tuple[str, str]], question: str, field: str
) -> list[Sample]:
    samples = []
    for answer in _answers(data, field, origin):
        messages = _system(data, origin)
        for asked, answered in [*past, (question, answer)]:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answered})
        samples.append(_conversation(messages, data, origin))
    return samples


def read_chat_prompt_completion(data: dict[str, Any], origin: str) -> list[Sample]:
    """Two texts, made a user's and an assistant's turn."""
    return _turns(data, origin, [], text_of(data, "prompt", origin), "completion")


def read_alpaca(data: dict[str, Any], origin: str) -> list[Sample]:
    """An instruction with maybe an input, a system message and a history, and the output."""
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
    return _turns(data, origin, past, question, "output")


def read_text(data: dict[str, Any], origin: str) -> list[Sample]:
    """A text that is trained on as a whole."""
    text = text_of(data, "text", origin)
    return [Completion("", text, origin, group=text)]


def read_tokens(data: dict[str, Any], origin: str) -> list[Sample]:
    """Tokens with labels or masks; those that attention_mask leaves out are left out."""
    columns = ("input_ids", "labels", "completion_mask", "assistant_masks", "attention_mask")
    found = {column: _integers(data, column, origin) for column in columns if column in data}
    ids = found["input_ids"]
    for column, values in found.items():
        if len(values) != len(ids):
            raise UserError(
                f"{origin}: field {column!r} has {len(values)} values for {len(ids)} tokens."
            )
    if "labels" in found:
        pairs = zip(ids, found["labels"], strict=True)
        if wrong := [label for token, label in pairs if label not in (-100, token)]:
            raise UserError(
                f"{origin}: label {wrong[0]} is neither -100 nor the token at its place; "
                "labels are not shifted."
            )
        trained = [label != -100 for label in found["labels"]]
    else:
        masks = [found[name] for name in ("completion_mask", "assistant_masks") if name in found]
        trained = [all(values) for values in zip(*masks, strict=True)] or [True] * len(ids)
    real = found.get("attention_mask", [1] * len(ids))
    kept = [(token, own) for token, own, is_real in zip(ids, trained, real, strict=True) if is_real]
    prompt = [token for token, own in kept]
    if any(own for _, own in kept):
        prompt = prompt[: [own for _, own in kept].index(True)] or prompt
    return [
        Tokens([token for token, _ in kept], [own for _, own in kept], origin, group=str(prompt))
    ]


def _integers(data: dict[str, Any], field: str, origin: str) -> list[int]:
    values = data[field]
    if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
        raise UserError(f"{origin}: field {field!r} is not a list of whole numbers.")
    if not values or (field == "input_ids" and min(values) < 0):
        raise UserError(f"{origin}: field {field!r} is empty or holds a negative number.")
    return values
