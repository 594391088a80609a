"""Prompts as samples, and as a padded batch for people and checks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_llm.data.sample_table import SampleTable


@dataclass(frozen=True)
class Prompt:
    """What a model is to answer, or to continue.

    Attributes:
        ids: Its tokens, with the generation prompt of the chat template where it went through one.
        text: The last message of the user, or the plain text, whole where ``ids`` were cut.
        messages: The conversation up to the answer; None for plain text.
        reference: The answer that the data has, if any.
        answer_format: Regular expression that a well-formed answer matches as a whole.
        source: Number of its source, the index into ``source_labels``.
    """

    ids: list[int]
    text: str
    messages: list[dict[str, Any]] | None
    reference: str | None
    answer_format: str | None
    source: int


class PromptSamples(Dataset[Prompt]):
    """Item ``i`` is prompt ``i`` of a table.

    Args:
        table: Rows of prompts, as ``prompt_cache`` writes them.
        source: Number of their source.
    """

    def __init__(self, table: SampleTable, source: int) -> None:
        self.table = table
        self.source = source

    def __len__(self) -> int:
        """The number of prompts."""
        return len(self.table)

    def __getitem__(self, index: int) -> Prompt:
        """Prompt ``index``, counted from 0."""
        about = self.table.about(index)
        assert about is not None
        messages = about.get("messages")
        return Prompt(
            ids=self.table[index]["input_ids"].tolist(),
            text=about["prompt"] if messages is None else last_question(messages),
            messages=messages,
            reference=about.get("reference"),
            answer_format=about.get("answer_format"),
            source=self.source,
        )


def last_question(messages: Sequence[dict[str, Any]]) -> str:
    """What the user says last in a conversation; "" where no user says anything."""
    said = (message.get("content") for message in reversed(messages) if message["role"] == "user")
    return str(next(said, "") or "")


def left_padded(prompts: Sequence[Prompt], pad_id: int) -> dict[str, Tensor]:
    """Prompts as one batch, padded on the left, so that all of them end in the last column.

    Args:
        prompts: B prompts, of which the longest has P tokens.
        pad_id: Token that fills the rows.

    Returns:
        ``input_ids`` and ``attention_mask`` (B, P), and ``source`` (B,), all long.
    """
    width = max(len(prompt.ids) for prompt in prompts)
    rows = [[pad_id] * (width - len(prompt.ids)) + prompt.ids for prompt in prompts]
    lengths = torch.tensor([[len(prompt.ids)] for prompt in prompts])
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": (torch.arange(width) >= width - lengths).long(),
        "source": torch.tensor([prompt.source for prompt in prompts]),
    }
