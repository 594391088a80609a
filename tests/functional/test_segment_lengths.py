"""Lengths of the segments of a row, counted by hand."""

import torch

from lit_llm.functional import segment_lengths


def test_each_token_knows_the_length_of_its_segment() -> None:
    segments = torch.tensor([[0, 0, 0, 1, 2, 2, -1], [0, 1, 1, 1, 1, -1, -1]])
    expected = [[3, 3, 3, 1, 2, 2, 0], [1, 4, 4, 4, 4, 0, 0]]
    assert segment_lengths(segments).tolist() == expected


def test_a_row_of_padding_has_no_length() -> None:
    assert segment_lengths(torch.full((1, 3), -1)).tolist() == [[0, 0, 0]]
