"""Blocked attention against torch's own, which it must equal."""

import pytest
import torch
import torch.nn.functional as F

from lit_llm.functional.attention import blocked_causal_attention

SHAPES = [(2, 4, 4, 16, 8), (1, 6, 2, 23, 8), (3, 9, 3, 40, 4)]  # B, H, K, T, D


def _operands(shape, dtype):
    b, h, k, t, d = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(b, h, t, d), (b, k, t, d), (b, k, t, d), (b, h, t, d)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes]


def _results(attention, query, key, value, grad):
    leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    out = attention(*leaves)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def _torchs(query, key, value, **kwargs):
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True, **kwargs
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_rows", [5, 8, 64])
def test_output_and_gradients_equal_torchs(shape, block_rows):
    operands = _operands(shape, torch.float64)

    got = _results(lambda *x: blocked_causal_attention(*x, block_rows=block_rows), *operands)

    for ours, expected in zip(got, _results(_torchs, *operands), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_the_scale_is_applied():
    query, key, value, _ = _operands(SHAPES[1], torch.float64)
    ours = blocked_causal_attention(query, key, value, scale=0.3)
    torch.testing.assert_close(ours, _torchs(query, key, value, scale=0.3), rtol=1e-10, atol=1e-12)


def test_bfloat16_is_off_by_its_own_rounding_only():
    operands = _operands((2, 9, 3, 300, 64), torch.bfloat16)
    exact = _results(_torchs, *(x.double() for x in operands))
    for ours, expected in zip(_results(blocked_causal_attention, *operands), exact, strict=True):
        assert (ours.double() - expected).norm() < 2**-7 * expected.norm()


def test_transposed_operands_give_the_same():
    operands = _operands(SHAPES[2], torch.float64)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands]
    for ours, expected in zip(
        _results(blocked_causal_attention, *strided),
        _results(blocked_causal_attention, *operands),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)


def test_the_operator_keeps_torchs_rules():
    query, key, value, _ = _operands(SHAPES[1], torch.float64)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    torch.library.opcheck(torch.ops.lit_llm.blocked_causal_attention, (*leaves, 0.5, 8))


def test_shapes_that_do_not_fit_are_refused():
    query, key, value, _ = _operands(SHAPES[1], torch.float64)
    with pytest.raises(ValueError, match="do not fit together"):
        blocked_causal_attention(query[:, :5], key, value)
    with pytest.raises(ValueError, match="do not fit together"):
        blocked_causal_attention(query[:, :, :7], key, value)
