"""Preferences of Anthropic's "hh-rlhf": two transcripts of a human and an assistant.

Bai et al., 2022, "Training a Helpful and Harmless Assistant with Reinforcement Learning from Human
Feedback" (https://arxiv.org/abs/2204.05862).
"""

import re
from typing import Any

from lit_llm.data.preference_formats import Messages, Preference, compared, margin_of
from lit_llm.data.record_formats import text_of
from lit_llm.errors import UserError

_LABEL = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(text: object) -> bool:
    """Whether a value is a text that begins with what a human says."""
    return isinstance(text, str) and text.lstrip().startswith("Human:")


def read_hh(data: dict[str, Any], origin: str) -> list[Preference]:
    """Transcripts, chosen and rejected, whose beginning is the prompt.

    A speaker's name counts after an empty line only, and two turns of one speaker are one message:
    the assistant sometimes wrote the name itself. A field ``prompt``, which some copies of the data
    have, is put before answers that are no transcripts of their own.
    """
    told = []
    for field in ("chosen", "rejected"):
        text = text_of(data, field, origin)
        if "prompt" in data and not is_transcript(text):
            text = text_of(data, "prompt", origin) + text
        told.append(_messages(text, field, origin))
    return [compared(None, told, data, origin, margins=margin_of(data, origin))]


def _messages(text: str, field: str, origin: str) -> Messages:
    before, *parts = _LABEL.split(text.lstrip())
    if before or not parts:
        raise UserError(
            f"{origin}: field {field!r} does not begin with 'Human:' or 'Assistant:', "
            "which the format hh needs."
        )
    messages: Messages = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, said = _ROLES[speaker], said.strip()
        if messages and messages[-1]["role"] == role:
            said = f"{messages.pop()['content']}\n\n{said}".strip()
        messages.append({"role": role, "content": said})
    return messages
