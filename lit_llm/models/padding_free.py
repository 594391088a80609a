"""A batch as one row without padding, the form in which FlashAttention isolates documents.

transformers tells documents apart by their positions only in a batch of one row: in
``modeling_flash_attention_utils`` a larger batch attends across its documents, without a word.

Legend: B batch, T sequence, N real tokens of the batch, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PaddingFree(NamedTuple):
    """The real tokens of a batch, side by side.

    Attributes:
        input_ids: (1, N) token ids, row after row.
        position_ids: (1, N), from 0 in each document.
        places: (N,) where in the B * T places of the batch each of them was.
        shape: B and T.
    """

    input_ids: Tensor
    position_ids: Tensor
    places: Tensor
    shape: tuple[int, int]

    def restore(self, values: Tensor) -> Tensor:
        """Puts values of the real tokens back into the shape of the batch.

        Args:
            values: (N, ...) one entry a token.

        Returns:
            (B, T, ...), 0 at padding.
        """
        empty = values.new_zeros(self.shape[0] * self.shape[1], *values.shape[1:])
        return empty.index_copy(0, self.places, values).unflatten(0, self.shape)


def without_padding(input_ids: Tensor, document_ids: Tensor) -> PaddingFree:
    """Lays the documents of a batch side by side in one row.

    Args:
        input_ids: (B, T) token ids.
        document_ids: (B, T) long; runs of equal ids within a row are documents, negative ids are
            padding, on either side or in between.

    Returns:
        The real tokens. Documents are found again by their positions, which begin at 0.
    """
    rows, length = input_ids.shape
    places = (document_ids.flatten() >= 0).nonzero().squeeze(1)
    documents = document_ids.flatten()[places]
    row = places.div(length, rounding_mode="floor")
    begins = torch.ones_like(places, dtype=torch.bool)
    begins[1:] = (documents[1:] != documents[:-1]) | (row[1:] != row[:-1])
    order = torch.arange(len(places), device=places.device)
    begin = order.masked_fill(~begins, 0).cummax(0).values
    return PaddingFree(
        input_ids=input_ids.flatten()[places][None],
        position_ids=(order - begin)[None],
        places=places,
        shape=(rows, length),
    )
