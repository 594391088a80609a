"""Tokens drawn against the softmax, and random numbers that belong to their rows."""

import math

import pytest
import torch

from lit_llm.rollout.draws import choose, uniforms
from lit_llm.rollout.generation import GenerationConfig
from tests.rollout.sampling_runs import BOTH, answers, model_of
from tests.rollout.test_generation import logits_of


def probabilities(logits, temperature=1.0, top_k=None, top_p=1.0):
    weights = (logits.double() / temperature).softmax(0)
    ranked = weights.sort(descending=True)
    if top_k is not None:
        weights[ranked.indices[top_k:]] = 0
    before = ranked.values.cumsum(0) - ranked.values  # mass of the more likely tokens
    weights[ranked.indices[before >= top_p]] = 0
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, 1.0), (0.7, None, 1.0), (2.0, 3, 1.0), (1.0, None, 0.6)],
)
@pytest.mark.parametrize("size", [7, 256, 700])  # blocks of 256
def test_points_fall_as_the_probabilities_are(size, temperature, top_k, top_p):
    torch.manual_seed(5)
    count = 4000
    logits = 2 * torch.randn(size)
    logits[torch.randperm(size)[: size // 3]] = -math.inf
    expected = probabilities(logits, temperature, top_k, top_p)
    config = GenerationConfig(1, temperature, top_k, top_p)
    points = (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) / count
    seen = choose(logits.expand(count, -1), config, points).bincount(minlength=size)
    # Evenly spaced points meet every interval as often as it is long.
    torch.testing.assert_close(seen / count, expected.float(), rtol=0, atol=1.5 / count)
    assert seen[expected == 0].sum() == 0


def test_a_token_without_probability_is_never_chosen():
    ends = torch.tensor([[0.0], [1 - 2.0**-40]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(6)
    config = GenerationConfig(1)
    for size in (3, 300, 2048):
        for _ in range(50):
            logits = 4 * torch.randn(size, generator=generator)
            keep = torch.randperm(size, generator=generator)[:2]
            only = torch.full((size,), -math.inf)
            only[keep] = logits[keep]
            assert set(choose(only.expand(2, -1), config, ends).tolist()) == set(keep.tolist())
            # Far down, probabilities are rounded to 0.
            steep = 100 * logits
            points = torch.rand(40, 1, generator=generator, dtype=torch.float64)
            chosen = choose(steep.expand(40, -1), config, points.clamp(max=1 - 2.0**-40))
            assert bool((steep.softmax(0)[chosen] > 0).all())


def test_random_numbers_belong_to_their_seed():
    seeds = [0, 1, 2, 2**63 - 1, 1]
    first = uniforms(seeds, 40)
    assert torch.equal(first[1], first[4]) and len(first.unique(dim=0)) == 4
    assert torch.equal(uniforms(seeds[::-1], 7), first.flip(0)[:, :7])
    assert bool((first >= 0).all() and (first < 1).all())
    # Neighbouring seeds, and the steps of one, know nothing of each other.
    many = uniforms(range(3000), 2)
    for column in many.T:
        histogram = column.mul(20).long().bincount(minlength=20)
        assert ((histogram - 150) ** 2 / 150).sum() < 19 + 5 * math.sqrt(2 * 19)
    for pair in (many.T, torch.stack([many[1:, 0], many[:-1, 0]])):
        assert abs(pair.corrcoef()[0, 1]) < 4 / math.sqrt(3000)


@BOTH
def test_samples_follow_the_softmax(kind):
    model = model_of(kind, vocab_size=40)
    with torch.no_grad():
        model.get_output_embeddings().weight /= 3  # flat enough for the tail to be seen
    count, prompt = 3000, [7, 3]
    expected = probabilities(logits_of(model, prompt), 1.3)
    config = GenerationConfig(1, 1.3)
    seen = answers(model, [prompt] * count, config, range(count), batch_size=count)
    counts = torch.tensor([ids[0] for ids, _ in seen]).bincount(minlength=40)
    chi2 = ((counts - count * expected) ** 2 / (count * expected)).sum()
    assert chi2 < 39 + 5 * math.sqrt(2 * 39)
