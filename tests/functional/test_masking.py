"""Shifted labels, the block-diagonal mask and sums under a mask, against hand-written ones."""

import math

import pytest
import torch
import torch.nn.functional as F

from lit_llm.functional import (
    block_diagonal_causal_mask,
    masked_mean,
    masked_sum,
    shift_labels,
)


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


@pytest.mark.parametrize("bad", [math.nan, math.inf, 7.0])
@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_sums_and_means_of_what_the_mask_keeps(bad: float, dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, 2.0, bad], [bad, bad, bad], [3.0, bad, 6.0]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]]).to(dtype)
    assert masked_sum(values, mask).item() == 12.0
    assert masked_sum(values, mask, 1).tolist() == [3.0, 0.0, 9.0]
    assert masked_sum(values, mask, 0).tolist() == [4.0, 2.0, 6.0]
    assert masked_mean(values, mask).item() == 3.0
    assert masked_mean(values, mask, 1).tolist() == [1.5, 0.0, 4.5]
    assert masked_mean(values, mask, 0).tolist() == [2.0, 2.0, 6.0]
    for function, slope in ((masked_sum, 1.0), (masked_mean, 0.25)):
        leaf = values.clone().requires_grad_()
        function(leaf, mask).backward()
        assert torch.equal(leaf.grad, slope * mask.float())


def test_sums_under_a_mask_are_wide_and_shapes_have_to_fit() -> None:
    ones = torch.ones(1, 300, dtype=torch.bfloat16)
    assert masked_sum(ones, ones).dtype == masked_mean(ones, ones).dtype == torch.float32
    assert masked_sum(ones, ones).item() == 300.0
    assert masked_sum(ones.double(), ones).dtype == torch.float64
    for function in (masked_sum, masked_mean):
        with pytest.raises(ValueError, match=r"\(1, 300\) and \(300,\)"):
            function(ones, ones[0])
