"""Documents packed into blocks of one length, so that no training step is spent on padding.

The documents of a split are one stream of N tokens, each document closed by EOS. Consecutive blocks
share one token, so every token of the stream but its first is predicted exactly once.

Legend: N tokens of the stream, B samples of a batch, T sequence length.
"""

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lit_llm.errors import UserError

IGNORED = -100


class TokenStream(Protocol):
    """What packing reads: the tokens of a split, and where its documents start."""

    @property
    def tokens(self) -> NDArray[Any]:
        """(N,) token ids of all documents, each closed by EOS."""

    @property
    def starts(self) -> NDArray[np.int64]:
        """(documents,) ascending positions of the documents' first tokens; the first is 0."""


class PackedBlocks(Dataset[dict[str, Tensor]]):
    """Block ``i`` of a token stream is ``tokens[i * (T - 1) : i * (T - 1) + T]``.

    An item is a dict of ``input_ids`` (T,), ``labels`` (T,) aligned with the ids (the model shifts
    them) and ``source`` (); with ``isolate`` also ``document_ids`` (T,), counted from 0 within the
    block, and ``position_ids`` (T,), which restart with every document. All are long.

    Args:
        stream: Tokens and document starts; opened by the worker that reads it.
        seq_len: T, the tokens of a block, at least 2.
        pad_id: Fills the last block where it is short. Padding stands on the right and has label
            -100, so with causal attention it needs no mask.
        source: Index of the source, copied into every item.
        isolate: Keep documents apart. The first token of a document is then no target, since the
            tokens before it are not its context.
        keep_tail: Keep the last, short block, padded: nothing is lost from a held-out sum. Without
            it every block is full.

    Raises:
        UserError: When ``seq_len`` is below 2.
    """

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        *,
        pad_id: int,
        source: int = 0,
        isolate: bool = False,
        keep_tail: bool = False,
    ) -> None:
        if seq_len < 2:
            raise UserError(
                f"seq_len is {seq_len}: a block needs at least 2 tokens, one to read and one to "
                "predict."
            )
        self.stream = stream
        self.seq_len = seq_len
        self.pad_id = pad_id
        self.source = source
        self.isolate = isolate
        predictable = max(len(stream.tokens) - 1, 0)
        per_block = seq_len - 1
        self._blocks = -(-predictable // per_block) if keep_tail else predictable // per_block

    def __len__(self) -> int:
        """The number of blocks."""
        return self._blocks

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Block ``index``, counted from 0."""
        if not 0 <= index < self._blocks:
            raise IndexError(f"block {index} of {self._blocks}")
        start = index * (self.seq_len - 1)
        tokens = self.stream.tokens[start : start + self.seq_len]
        real = len(tokens)
        input_ids = torch.full((self.seq_len,), self.pad_id, dtype=torch.long)
        input_ids[:real] = torch.from_numpy(tokens.astype(np.int64))
        labels = input_ids.clone()
        labels[real:] = IGNORED
        block = {"input_ids": input_ids, "labels": labels, "source": torch.tensor(self.source)}
        if self.isolate:
            starts = self.stream.starts
            # A document that starts with the block has nothing before it here: the search excludes
            # `start`.
            first, last = np.searchsorted(starts, [start + 1, start + real])
            new = torch.from_numpy(starts[first:last] - start)
            labels[new] = IGNORED
            begins = torch.zeros(self.seq_len, dtype=torch.long)
            begins[new] = 1
            begins[real : real + 1] = 1  # padding is a document of its own
            positions = torch.arange(self.seq_len)
            block["document_ids"] = begins.cumsum(0)
            block["position_ids"] = positions - (positions * begins).cummax(0).values
        return block


def count_targets(batch: dict[str, Tensor]) -> int:
    """Tokens of a batch that are predicted: labels (B, T) but the first column, -100 left out."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())
