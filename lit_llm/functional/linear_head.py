"""The output projection taken a few rows at a time: what language_model and log_probs share.

Legend: C rows of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK_BYTES = 2**26
"""Logits held at once when no chunk size is given: 64 MB."""

_BLOCK_ELEMENTS = 2**19
"""Logits whose softmax is computed at once on a CPU: 2 MB of float32 stay in its cache."""


class LinearHead:
    """The output projection in the dtype of its products, and the gradients it collects."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        needs: tuple[bool, bool, bool] = (False, False, False),
    ) -> None:
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.needs_hidden, self.needs_weight, self.needs_bias = needs
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None
        # On a CPU, fresh memory for every product would add 15 % to the time of the product.
        self._logits: Tensor | None = None
        self._product: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(C, D) -> (C, V), valid until the next call; no later chunk may be larger."""
        if self._logits is None:
            self._logits = hidden.new_empty(len(hidden), len(self.weight))
        out = self._logits[: len(hidden)]
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def backward(self, hidden: Tensor, grad: Tensor) -> Tensor | None:
        """Adds to the gradients of weight and bias; returns that of ``hidden`` (C, D)."""
        wide = accumulation_dtype(grad.dtype)
        if self.needs_bias:
            total = grad.sum(dim=0, dtype=wide)
            self.grad_bias = total if self.grad_bias is None else self.grad_bias.add_(total)
        if self.needs_weight:
            # Half-precision products are summed over the chunks in float32.
            if self.grad_weight is None:
                self._product = grad.t() @ hidden
                self.grad_weight = self._product.to(wide)
            elif grad.dtype == wide:
                self.grad_weight.addmm_(grad.t(), hidden)
            else:
                self.grad_weight += torch.mm(grad.t(), hidden, out=self._product)
        return grad @ self.weight if self.needs_hidden else None

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of weight and bias; zeros where there was no row to learn from."""
        wide = accumulation_dtype(self.weight.dtype)
        if self.needs_weight and self.grad_weight is None:
            self.grad_weight = torch.zeros_like(self.weight, dtype=wide)
        if self.needs_bias and self.grad_bias is None and self.bias is not None:
            self.grad_bias = torch.zeros_like(self.bias, dtype=wide)
        return self.grad_weight, self.grad_bias


def log_prob_blocks(logits: Tensor, temperature: float = 1.0) -> Iterator[tuple[slice, Tensor]]:
    """Log-probabilities in float32 (or float64) of a few rows of (C, V) at a time.

    On a CPU the passes over the vocabulary are bound by memory: done in blocks that fit the cache
    they take a quarter of the time. The caller may overwrite the rows it was given.
    """
    wide = accumulation_dtype(logits.dtype)
    step = len(logits)
    if logits.device.type == "cpu":
        step = max(1, _BLOCK_ELEMENTS // logits.shape[1])
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        block = logits[rows].to(wide)
        yield rows, torch.log_softmax(block if temperature == 1.0 else block / temperature, dim=-1)


def add_at(values: Tensor, columns: Tensor, amount: float) -> Tensor:
    """Adds ``amount`` in place to one column (C, 1) of each row."""
    return values.scatter_add_(1, columns, values.new_full((), amount).expand_as(columns))


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of the products: autocast's where it is on (it leaves float64 alone)."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of softmax, losses and sums over chunks."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(hidden: Tensor) -> torch.autocast:
    """Within it, every operation keeps the dtypes it is given."""
    return torch.autocast(hidden.device.type, enabled=False)


def rows_per_chunk(vocabulary: int, dtype: torch.dtype, chunk_size: int | None) -> int:
    """``chunk_size``, or as many rows as take 64 MB of logits."""
    return chunk_size or max(1, _CHUNK_BYTES // max(1, vocabulary * dtype.itemsize))


def chunks(targets: Tensor, ignore_index: int, rows: int) -> Iterator[Tensor]:
    """Indices of the rows that count, in pieces of equal length (to one)."""
    kept = (targets != ignore_index).nonzero().squeeze(1)
    if kept.numel():
        yield from kept.tensor_split(-(-kept.numel() // rows))


def check_operands(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, chunk_size: int | None
) -> None:
    """Raise a ValueError for shapes that do not fit together and for a chunk without rows."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be (N, D) and weight (V, D), not {tuple(hidden.shape)} "
            f"and {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be ({hidden.shape[0]},), not {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), not {tuple(bias.shape)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
