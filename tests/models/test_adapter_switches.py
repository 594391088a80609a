"""Adapters of policy and critic on one backbone: which are at work, and what is trained."""

from __future__ import annotations

import pytest
import torch

from lit_llm.models.adapter_switches import active_adapter, adapters_off, add_second_adapter
from lit_llm.models.adapters import AdapterConfig, add_adapter
from lit_llm.models.forward import hidden_states
from lit_llm.models.policy import policy_output

TOKENS = torch.arange(24).view(2, 12) % 97
MASK = torch.ones_like(TOKENS)
CONFIGS = {
    "lora": AdapterConfig(r=4),
    "dora": AdapterConfig(method="dora", r=4),
    "embedding": AdapterConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "whole layers": AdapterConfig(r=4, modules_to_save=["lm_head"]),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> AdapterConfig:
    return CONFIGS[request.param]


def adapted(tiny_model, config: AdapterConfig, model_type: str = "llama"):
    """A model with adapters of a policy and of a critic, each of them at work."""
    model = add_adapter(tiny_model(model_type), config)
    add_second_adapter(model, "value")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def logits(model) -> torch.Tensor:
    return model(TOKENS).logits  # type: ignore[no-any-return]


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def of_critic(name: str) -> bool:
    return "value" in name.split(".")


@torch.no_grad()
def test_without_adapters_it_is_the_model_they_were_put_on(tiny_model, config) -> None:
    model, base = adapted(tiny_model, config), tiny_model("llama")
    expected = logits(base)
    assert (logits(model) - expected).abs().max() > 0.1
    with adapters_off(model):
        torch.testing.assert_close(logits(model), expected)
        mask = MASK[:, -5:]
        found, plain = (policy_output(one, TOKENS, MASK, mask) for one in (model, base))
        torch.testing.assert_close(found.logprobs, plain.logprobs)
        with active_adapter(model, "value"):  # off is off
            torch.testing.assert_close(logits(model), expected)
    assert (logits(model) - expected).abs().max() > 0.1


@torch.no_grad()
def test_the_critics_adapters_are_those_that_peft_would_switch_to(tiny_model, config) -> None:
    model = adapted(tiny_model, config)
    policy = hidden_states(model, TOKENS, MASK)
    with active_adapter(model, "value"):
        critic = hidden_states(model, TOKENS, MASK)
    assert torch.equal(hidden_states(model, TOKENS, MASK), policy)
    assert (policy - critic).abs().max() > 0.1
    model.set_adapter("value")
    torch.testing.assert_close(hidden_states(model, TOKENS, MASK), critic)
    model.set_adapter("default")
    torch.testing.assert_close(hidden_states(model, TOKENS, MASK), policy)


def test_a_second_adapter_changes_nothing_of_the_first(tiny_model, config) -> None:
    model = add_adapter(tiny_model("llama"), config)
    before, alone = trained(model), logits(model)
    values = {name: parameter.clone() for name, parameter in model.named_parameters()}
    add_second_adapter(model, "value")
    assert torch.equal(logits(model), alone)
    added = trained(model) - before
    assert before <= trained(model)
    assert added and all("lora_" in name and of_critic(name) for name in added)
    assert not any("modules_to_save" in name for name in added)
    new = {name for name, _ in model.named_parameters()} - values.keys()
    assert new == added
    for name, value in values.items():
        assert torch.equal(model.get_parameter(name), value), name
    count = {kind: sum(kind in name for name in trained(model)) for kind in ("lora_A", "lora_B")}
    assert count["lora_A"] == count["lora_B"] == 2 * sum("lora_A" in name for name in before)


def test_what_is_trained_never_changes(tiny_model, config) -> None:
    model = adapted(tiny_model, config)
    before = trained(model)
    for _ in range(2):
        with active_adapter(model, "value"):
            assert trained(model) == before
            with adapters_off(model):
                assert trained(model) == before
            assert trained(model) == before
        assert trained(model) == before
    with adapters_off(model), active_adapter(model, "value"):
        assert trained(model) == before
    assert trained(model) == before


def test_one_backward_trains_both(tiny_model, config) -> None:
    """And each gets what it would get by itself."""
    model = adapted(tiny_model, config)

    def policy() -> torch.Tensor:
        return policy_output(model, TOKENS, MASK, MASK[:, -5:]).logprobs.sum()

    def critic() -> torch.Tensor:
        with active_adapter(model, "value"):
            return hidden_states(model, TOKENS, MASK)[:, -1].sum()

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    own, other = gradients(policy()), gradients(critic())
    both = gradients(policy() + critic())
    assert own.keys() | other.keys() == both.keys() == trained(model)
    assert not any(map(of_critic, own))
    assert all(of_critic(name) or "modules_to_save" in name for name in other)
    assert len(other) >= sum(map(of_critic, both)) > 0
    for name, gradient in both.items():
        expected = sum(part[name] for part in (own, other) if name in part)
        assert bool(gradient.any()), name
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-3)


def test_an_error_within_leaves_no_trace(tiny_model) -> None:
    model = adapted(tiny_model, CONFIGS["whole layers"])
    with torch.no_grad():
        expected = logits(model)
        for switch in (active_adapter(model, "value"), adapters_off(model)):
            with pytest.raises(RuntimeError, match="within"), switch:
                raise RuntimeError("within")
            assert torch.equal(logits(model), expected)
        with adapters_off(model):
            off = logits(model)
            with pytest.raises(RuntimeError, match="within"), adapters_off(model):
                raise RuntimeError("within")
            assert torch.equal(logits(model), off)  # the outer one still holds


@pytest.mark.parametrize("model_type", ["roberta", "llama"])
def test_only_adapters_are_trained_whatever_the_layers_are_called(
    tiny_model, model_type: str
) -> None:
    """BERT calls its projections query, key and value."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if model_type == "llama":
        base = tiny_model("llama")
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = AutoConfig.for_model(
            model_type, vocab_size=97, intermediate_size=48, is_decoder=True, **sizes
        )
        base = AutoModelForCausalLM.from_config(config)
    model = add_adapter(base, AdapterConfig(r=2))
    add_second_adapter(model, "value")
    assert all("lora_" in name for name in trained(model))
