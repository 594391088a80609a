"""What a policy says of responses, against plain transformers on one text at a time."""

from __future__ import annotations

import copy

import pytest
import torch

from lit_llm.models.adapters import AdapterConfig, add_adapter
from lit_llm.models.forward import supports_fused_head
from lit_llm.models.policy import PolicyOutput, policy_output

PAD = 0
# Holds and ends with the id that pads; one of a single token, one as long as the batch is wide.
PROMPTS = [[5, 9, 3, 11], [8], [96, 0, 7, 20, 21], [4, 4]]
RESPONSES = [[17, 30, 2], [12, 0, 44, 61, 2], [50], [9, 0]]
WIDTH = 6


def batch(extra: int = 0):
    """Prompts padded on the left, responses on the right, both by more than they need."""
    before = max(map(len, PROMPTS)) + extra
    ids = torch.full((len(PROMPTS), before + WIDTH), PAD)
    real = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        place = slice(before - len(prompt), before + len(response))
        ids[row, place] = torch.tensor(prompt + response)
        real[row, place] = 1
    return ids, real, real[:, before:].clone()


def by_transformers(model, temperature: float) -> PolicyOutput:
    """Each text alone and without padding, all of its logits, 0 where there is no token."""
    logprobs, entropy = (torch.zeros(len(PROMPTS), WIDTH) for _ in range(2))
    states = []
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        output = model(torch.tensor([prompt + response]), output_hidden_states=True)
        before = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        logs = (output.logits[0, before].float() / temperature).log_softmax(-1)
        for column, token in enumerate(response):
            logprobs[row, column] = logs[column, token]
            entropy[row, column] = -(logs[column].exp() * logs[column]).sum()
        states.append(output.hidden_states[-1][0, before])
    return PolicyOutput(logprobs, entropy, states)  # type: ignore[arg-type]


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gemma2", "granite", "cohere"])
@torch.no_grad()
def test_it_says_what_transformers_says(
    tiny_model, model_type: str, temperature: float, extra: int
) -> None:
    model = tiny_model(model_type)
    fused = model_type in ("llama", "gpt2")
    # OPT projects its embeddings, the others cap or scale their logits.
    assert supports_fused_head(model) == fused or model_type == "opt"
    expected = by_transformers(model, temperature)
    ids, real, mask = batch(extra)
    found = policy_output(model, ids, real, mask, temperature=temperature)
    assert found.logprobs.dtype == found.entropy.dtype == torch.float32
    assert expected.logprobs.min() < -3
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(found.entropy, expected.entropy, atol=2e-4, rtol=1e-4)
    for row, states in enumerate(expected.hidden):
        own = found.hidden[row, : len(states)]
        torch.testing.assert_close(own, states, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_the_temperature_shows_where_logits_are_capped(tiny_model) -> None:
    """Capped first, then divided: the other order gives other log-probabilities."""
    model = tiny_model("gemma2")
    ids, real, mask = batch()
    logits = model(torch.tensor([PROMPTS[0] + RESPONSES[0]])).logits[0, 3]
    assert logits.abs().max() <= 1  # the cap
    found = policy_output(model, ids, real, mask, temperature=0.25).logprobs[0, 0]
    assert found == pytest.approx(float((4 * logits).log_softmax(-1)[17]), abs=1e-4)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_take_part(tiny_model, method: str) -> None:
    model = add_adapter(tiny_model("llama"), AdapterConfig(method=method, r=4)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        plain = copy.deepcopy(model).merge_and_unload()
        expected, without = by_transformers(plain, 1.0), by_transformers(tiny_model("llama"), 1.0)
    found = policy_output(model, *batch())
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.entropy, expected.entropy, atol=1e-3, rtol=1e-3)
    assert (expected.logprobs - without.logprobs).abs().max() > 0.1


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_gradients_are_those_of_transformers(tiny_model, model_type: str) -> None:
    model = tiny_model(model_type)
    torch.manual_seed(3)
    weights = torch.randn(2, len(PROMPTS), WIDTH)

    def gradients(output: PolicyOutput):
        ((weights[0] * output.logprobs).sum() + (weights[1] * output.entropy).sum()).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        return found

    expected = gradients(by_transformers(model, 0.8))
    found = gradients(policy_output(model, *batch(2), temperature=0.8))
    for name, gradient in expected.items():
        size = float(gradient.norm())
        assert size > 0, name
        assert float((found[name] - gradient).norm()) < 1e-3 * size, name


def test_nothing_outside_the_mask_shows(tiny_model) -> None:
    """What stands in the padding changes no value, and its columns are 0."""
    model = tiny_model("llama")
    ids, real, mask = batch(2)
    other = torch.where(real == 1, ids, 33)
    with torch.no_grad():
        first, second = (policy_output(model, tokens, real, mask) for tokens in (ids, other))
    for values, others in zip(first[:2], second[:2], strict=True):
        assert torch.equal(values, others)
        assert bool((values[mask == 0] == 0).all())
        assert bool((values[mask == 1] != 0).all())
