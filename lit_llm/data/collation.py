"""Samples of different lengths made one batch, padded on the right.

Legend: B samples of a batch, n tokens of a sample, T tokens of a row of the batch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llm.data.packing import IGNORED


class PadCollator:
    """Pad items to the longest of their batch.

    The batch has ``input_ids`` and ``labels`` (B, T), -100 at padding, and ``source`` (B,). Packed
    items (those with ``document_ids``) keep ``document_ids`` (B, T), -1 at padding, and
    ``position_ids`` (B, T), which count from 0 again there; others get ``attention_mask`` (B, T), 1
    at real tokens. All of it follows from the lengths, so the padding token may be any, that which
    ends a text too.

    Args:
        pad_id: Token that fills the rows.
        multiple_of: T is a multiple of this, so that few shapes occur.
        max_len: T is never above it, whatever ``multiple_of`` says; none means no limit.
    """

    def __init__(self, pad_id: int, multiple_of: int = 8, max_len: int | None = None) -> None:
        self.pad_id = pad_id
        self.multiple_of = multiple_of
        self.max_len = max_len

    def __call__(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Make a batch of items that are all packed, or none of them.

        Raises:
            ValueError: When an item is longer than ``max_len``.
        """
        lengths = torch.tensor([[len(item["input_ids"])] for item in items])
        longest = int(lengths.max())
        width = -(-longest // self.multiple_of) * self.multiple_of
        if self.max_len is not None:
            if longest > self.max_len:
                raise ValueError(f"an item of {longest} tokens is above max_len={self.max_len}")
            width = min(width, self.max_len)
        columns = torch.arange(width)
        batch = {
            "input_ids": _padded([item["input_ids"] for item in items], width, self.pad_id),
            "labels": _padded([item["labels"] for item in items], width, IGNORED),
            "source": torch.stack([item["source"] for item in items]),
        }
        if "document_ids" not in items[0]:
            batch["attention_mask"] = (columns < lengths).long()
            return batch
        positions = _padded([item["position_ids"] for item in items], width, 0)
        batch["position_ids"] = torch.where(columns < lengths, positions, columns - lengths)
        batch["document_ids"] = _padded([item["document_ids"] for item in items], width, -1)
        return batch


def _padded(rows: Sequence[Tensor], width: int, value: int) -> Tensor:
    return torch.stack([F.pad(row, (0, width - len(row)), value=value) for row in rows])
