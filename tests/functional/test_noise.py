import pytest
import torch

from lit_llm.functional import neftune_noise

# Two samples of 2 and 6 tokens in the first row, one of 3 and padding in the second.
LENGTHS = torch.tensor([[2, 2, 6, 6, 6, 6, 6, 6], [3, 3, 3, 0, 0, 0, 0, 0]])
WIDTH, ALPHA = 20_000, 5.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_uniform_within_its_bound(dtype):
    torch.manual_seed(0)
    embeddings = torch.randn(2, 8, WIDTH, dtype=dtype)
    noise = neftune_noise(embeddings, LENGTHS, ALPHA) - embeddings
    assert noise.dtype == dtype
    for length in (2, 3, 6):
        own = noise[length == LENGTHS].double()
        bound = ALPHA / (length * WIDTH) ** 0.5
        rounding = 1e-6  # of adding the embedding and taking it away
        assert own.abs().max() <= bound + rounding
        assert own.abs().max() > 0.999 * bound
        assert abs(own.mean()) < 5 * bound / 3**0.5 / own.numel() ** 0.5
        assert own.var().item() == pytest.approx(ALPHA**2 / (3 * length * WIDTH), rel=0.02)
    assert (noise[LENGTHS == 0] == 0).all()


def test_the_bound_is_exact_on_zeros():
    torch.manual_seed(0)
    noise = neftune_noise(torch.zeros(1, 4, 25), torch.full((1, 4), 4), 10.0)
    assert noise.abs().max() <= 1.0  # 10 / sqrt(4 * 25)
    assert noise.abs().max() > 0.9
    assert noise.unique().numel() > 90  # of 100: one number a value, not one a token


def test_half_precision_keeps_its_dtype():
    for dtype in (torch.bfloat16, torch.float16):
        out = neftune_noise(torch.zeros(1, 8, 64, dtype=dtype), torch.full((1, 8), 8), ALPHA)
        assert out.dtype == dtype
        assert out.abs().max().item() == pytest.approx(ALPHA / (8 * 64) ** 0.5, rel=0.05)


def test_gradient_is_one():
    embeddings = torch.randn(2, 8, 4, requires_grad=True)
    neftune_noise(embeddings, LENGTHS, ALPHA).sum().backward()
    assert (embeddings.grad == 1).all()


def test_the_global_generator_decides():
    embeddings = torch.zeros(2, 8, 4)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(neftune_noise(embeddings, LENGTHS, ALPHA))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_no_strength_no_noise():
    embeddings = torch.randn(2, 8, 4)
    assert torch.equal(neftune_noise(embeddings, LENGTHS, 0.0), embeddings)


def test_lengths_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"lengths must be \(2, 8\), not \(2, 1\)"):
        neftune_noise(torch.zeros(2, 8, 4), LENGTHS[:, :1], ALPHA)
