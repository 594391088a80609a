"""From one record to samples: the formats that data for supervised fine-tuning comes in.

Those that TRL's SFTTrainer reads (https://huggingface.co/docs/trl/dataset_formats), Alpaca and
ShareGPT. A reader gets the fields of a record that are not null, those that its format needs among
them, and its origin; whatever does not fit is a ``UserError`` that names the origin.
"""

from dataclasses import dataclass
from typing import Any

from lit_llm.data.messages import (
    MESSAGE_FIELDS,
    alpaca_question,
    asked,
    role_messages,
    root_group,
    sharegpt_messages,
    template_values,
    with_system,
)
from lit_llm.data.record_formats import text_of
from lit_llm.errors import UserError


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


def _conversation(messages: list[dict[str, Any]], data: dict[str, Any], origin: str) -> Sample:
    tools, options = template_values(data, origin)
    return Conversation(messages, origin, root_group(messages), tools, template_options=options)


def read_messages(data: dict[str, Any], origin: str) -> list[Sample]:
    """A list of messages with role and content; its assistant's turns are trained on."""
    field = next(field for field in MESSAGE_FIELDS if field in data)
    return [_conversation(role_messages(data, field, origin), data, origin)]


def read_sharegpt(data: dict[str, Any], origin: str) -> list[Sample]:
    """A list of messages with from and value, and maybe a field ``system``."""
    field = next(field for field in MESSAGE_FIELDS if field in data)
    messages = sharegpt_messages(data, field, origin)
    return [_conversation(with_system(messages, data, origin), data, origin)]


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
            for message in role_messages(data, "prompt", origin)
        ]
        messages += role_messages(data, "completion", origin)
        return [_conversation(messages, data, origin)]
    prompt = text_of(data, "prompt", origin)
    answers = _answers(data, "completion", origin)
    return [Completion(prompt, answer, origin, group=prompt) for answer in answers]


def _answered(
    prompt: list[dict[str, Any]], data: dict[str, Any], field: str, origin: str
) -> list[Sample]:
    return [
        _conversation([*prompt, {"role": "assistant", "content": answer}], data, origin)
        for answer in _answers(data, field, origin)
    ]


def read_chat_prompt_completion(data: dict[str, Any], origin: str) -> list[Sample]:
    """Two texts, made a user's and an assistant's turn."""
    prompt = asked(data, origin, text_of(data, "prompt", origin))
    return _answered(prompt, data, "completion", origin)


def read_alpaca(data: dict[str, Any], origin: str) -> list[Sample]:
    """An instruction with maybe an input, a system message and a history, and the output."""
    return _answered(alpaca_question(data, origin), data, "output", origin)


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
