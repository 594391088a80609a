"""Shifted labels and the block-diagonal mask, against hand-written ones."""

import torch
import torch.nn.functional as F

from lit_llm.functional import block_diagonal_causal_mask, shift_labels


def test_labels_shift_once_to_the_left() -> None:
    labels = torch.tensor([[1, 2, -100, 4], [5, 6, 7, 8]])
    assert shift_labels(labels).tolist() == [[2, -100, 4, -100], [6, 7, 8, -100]]
    assert labels.tolist() == [[1, 2, -100, 4], [5, 6, 7, 8]]
    assert shift_labels(labels[:, :1]).tolist() == [[-100], [-100]]


def test_block_diagonal_causal_mask() -> None:
    mask = block_diagonal_causal_mask(torch.tensor([[0, 0, 1, 1, 1], [3, 3, 3, -1, -1]]))
    assert mask.shape == (2, 1, 5, 5) and mask.dtype == torch.bool
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert mask[1, 0, :3, 3:].eq(False).all() and mask[1, 0, 3:, :3].eq(False).all()


def test_rows_of_padding_keep_the_diagonal_and_stay_finite() -> None:
    mask = block_diagonal_causal_mask(torch.full((1, 4), -1))
    assert mask.diagonal(dim1=-2, dim2=-1).all()
    query = torch.randn(1, 2, 4, 3)
    assert F.scaled_dot_product_attention(query, query, query, attn_mask=mask).isfinite().all()
