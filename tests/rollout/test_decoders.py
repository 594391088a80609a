"""What the loop sees of a model against a full forward, and which models take which way."""

import copy
import inspect

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from torch.nn.functional import log_softmax

import lit_llm.rollout.llama as llama
import lit_llm.rollout.products as products
import lit_llm.rollout.sampling as sampling
from lit_llm.rollout.decoders import has_plain_cache
from lit_llm.rollout.draws import choose
from lit_llm.rollout.generation import Response
from lit_llm.rollout.llama import LlamaDecoder, llama_like
from tests.rollout.sampling_runs import (
    KINDS,
    SAMPLED,
    SEEDS,
    answers,
    loaded,
    lora,
    model_of,
)
from tests.rollout.test_generation import GREEDY, PAD, PROMPTS, by_hand


def seen_log_probs(model, monkeypatch, **options):
    """Log-probabilities of sampled tokens, as the loop saw them: one list a prompt."""
    seen = []

    def watched(logits, config, uniform):
        tokens = choose(logits, config, uniform)
        seen.append(log_softmax(logits.float(), -1).gather(1, tokens[:, None])[:, 0])
        return tokens

    monkeypatch.setattr(sampling, "choose", watched)
    responses = answers(model, config=SAMPLED, seeds=SEEDS, **options)
    order = sorted(range(5), key=lambda index: -len(PROMPTS[index]))  # of the one batch
    table = torch.stack(seen, dim=1)
    return [response.ids for response in responses], table[torch.tensor(order).argsort()]


def full_log_probs(model, responses, **options):
    """The same from one forward over prompts and answers, without a cache."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor(
        [[PAD] * (width - len(p)) + p + r for p, r in zip(PROMPTS, responses, strict=True)]
    )
    mask = torch.ones_like(ids)
    for row, prompt in enumerate(PROMPTS):
        mask[row, : width - len(prompt)] = 0
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, **{"enabled": False} | options):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        )
    logits = output.logits[:, width - 1 : -1].float()
    return log_softmax(logits, -1).gather(2, ids[:, width:, None])[..., 0]


def test_repeated_prompts_are_read_once(monkeypatch):
    model, read = model_of("llama"), []
    own = LlamaDecoder._read

    def watched(self, prompts, rows):
        read.extend(prompts)
        return own(self, prompts, rows)

    monkeypatch.setattr(LlamaDecoder, "_read", watched)
    answers(model, [[3, 4], [5], [3, 4], [3, 4]])
    assert sorted(read) == [(3, 4), (5,)]
    # Attention scores of two of these prompts at once: 2 * 2 * 2.
    monkeypatch.setattr(llama, "_PREFILL_SCORES", 11)
    counts = []
    monkeypatch.setattr(
        LlamaDecoder, "_read", lambda self, *rows: counts.append(len(rows[0])) or own(self, *rows)
    )
    answers(model, [[3, 4], [5], [6], [7, 8], [9]])
    assert counts == [2, 2, 1]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_in_the_loop_are_those_of_a_full_forward(kind, adapted, monkeypatch):
    model = model_of(kind)
    model = lora(model) if adapted else model
    responses, seen = seen_log_probs(model, monkeypatch)
    torch.testing.assert_close(seen, full_log_probs(model, responses), rtol=0, atol=1e-4)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_bfloat16_is_as_near_to_a_full_forward_as_rounding_lets_it_be(
    kind, weights, adapted, monkeypatch
):
    model = model_of(kind, dtype=weights)
    model = lora(model) if adapted else model
    dtypes = {parameter.dtype for parameter in model.parameters()}
    mixed = dtypes != {torch.bfloat16}
    responses, seen = seen_log_probs(model, monkeypatch, dtype=torch.bfloat16)
    full = full_log_probs(model, responses, enabled=mixed)
    exact = full_log_probs(copy.deepcopy(model).float(), responses)
    rounding = (full - exact).abs().mean()
    assert 1e-4 < rounding < 0.2
    assert (seen - full).abs().mean() < 2 * rounding
    assert {parameter.dtype for parameter in model.parameters()} == dtypes


@pytest.mark.parametrize(
    ("name", "value"),
    [("_PACKED_BYTES", 0), ("_PREFILL_SCORES", 1), ("can_pack", lambda weight: False)],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_other_layouts_compute_the_same(name, value, adapted, monkeypatch):
    model = model_of("qwen2")
    model = lora(model) if adapted else model
    expected = [by_hand(model, prompt, 12) for prompt in PROMPTS]
    monkeypatch.setattr(products if name == "can_pack" else llama, name, value)
    engine = loaded(model)
    assert [r.ids for r in engine.generate(PROMPTS, GREEDY, seeds=SEEDS)] == expected
    half = answers(model, dtype=torch.bfloat16)
    assert [len(response.ids) for response in half] == [12] * 5
    if name == "_PACKED_BYTES":
        held = engine._decoder._layers[0].gate._weights[0]
        base = model.get_base_model() if adapted else model
        gate = base.model.layers[0].mlp.gate_proj
        assert held.data_ptr() == getattr(gate, "base_layer", gate).weight.data_ptr()


def test_a_model_s_matrices_are_cast_once_and_the_rest_is_shared():
    model = lora(model_of("gpt2"))
    half = loaded(model, dtype=torch.bfloat16)._model
    assert half is not model
    copied = dict(half.named_parameters())
    for name, own in model.named_parameters():
        shared = own.ndim == 1 or "wte" in name or "wpe" in name
        assert copied[name].dtype == (torch.float32 if shared else torch.bfloat16), name
        assert (copied[name].data_ptr() == own.data_ptr()) == shared, name
    assert half.get_base_model().lm_head.weight.dtype == torch.bfloat16, "tied to an embedding"
    assert loaded(model, dtype=torch.float32)._model is model


def test_small_adapters_are_not_rounded_away_in_bfloat16():
    model = model_of("llama")
    with torch.no_grad():
        for parameter in model.parameters():  # as of a model that was published in bfloat16
            parameter.copy_(parameter.bfloat16())
    wrapped = lora(model, size=1e-4)
    # Of a merged matrix, hardly any number would change.
    layer = model.model.layers[0].mlp.up_proj
    before = layer.base_layer.weight
    merged = (before + layer.get_delta_weight("default")).bfloat16()
    assert (merged != before).float().mean() < 0.05
    engine = loaded(wrapped, dtype=torch.bfloat16)
    product = engine._decoder._layers[0].up
    x = torch.randn(4, 32).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        added = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
    down, up = product._adapter
    torch.testing.assert_close((x @ down) @ up, added, rtol=0.05, atol=1e-6)


def test_the_caller_s_autocast_decides_nothing():
    for kind in ("llama", "gpt2"):
        model = model_of(kind)
        expected = answers(model, config=SAMPLED)
        with torch.autocast("cpu", torch.bfloat16):
            assert answers(model, config=SAMPLED) == expected


def test_release_lets_go_of_the_weights():
    model = model_of("llama")
    engine = loaded(model)
    engine.release()
    assert engine._decoder is None and engine._model is None


def test_models_that_need_more_than_a_cache_go_to_generate():
    from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MistralConfig(**sizes, **layers, sliding_window=4, initializer_range=0.4)
    windowed = MistralForCausalLM(config)

    class Own(LlamaForCausalLM):
        def forward(self, input_ids, attention_mask, position_ids, past_key_values=None, **others):
            others |= {"attention_mask": attention_mask, "position_ids": position_ids}
            return super().forward(input_ids, past_key_values=past_key_values, **others)

    class Prepared(LlamaForCausalLM):
        def prepare_inputs_for_generation(self, *args, **others):
            return super().prepare_inputs_for_generation(*args, **others)

    Own.forward.__signature__ = inspect.signature(LlamaForCausalLM.forward)
    own, prepared = (kind(model_of("llama").config).eval() for kind in (Own, Prepared))
    prefixed = get_peft_model(
        model_of("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    for model in (windowed, own, prepared, prefixed):
        assert not has_plain_cache(model)
        assert loaded(model)._decoder is None
    expected = [by_hand(windowed, prompt, 12) for prompt in PROMPTS]
    assert [r.ids for r in answers(windowed, batch_size=1)] == expected
    stop = expected[0][3]
    first = answers(windowed, stops=[stop])[0]
    assert first == Response(expected[0][: expected[0].index(stop) + 1], True)
    config.sliding_window = None
    assert isinstance(loaded(MistralForCausalLM(config))._decoder, LlamaDecoder)


def test_blocks_that_somebody_changed_run_by_their_own_forward():
    model = model_of("llama")
    expected = answers(model)
    assert llama_like(model)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda m, inputs, output: -output)
    assert not llama_like(model)
    seen = answers(model)
    assert seen != expected
    assert [r.ids for r in seen] == [by_hand(model, prompt, 12) for prompt in PROMPTS]
    handle.remove()
    model(input_ids=torch.tensor([[1]]), output_hidden_states=True)  # leaves hooks of its own
    assert llama_like(model)
    layer = model.model.layers[0].mlp.down_proj
    own = layer.forward
    layer.forward = lambda x: 2 * own(x)
    assert not llama_like(model)
    assert [r.ids for r in answers(model)] == [by_hand(model, prompt, 12) for prompt in PROMPTS]
    del layer.forward
    assert not llama_like(lora(model_of("llama"), use_dora=True))
    model.model.norm = torch.nn.RMSNorm(32)
    assert not llama_like(model)
    assert [r.ids for r in answers(model)] == [by_hand(model, prompt, 12) for prompt in PROMPTS]


def test_the_cache_is_used(monkeypatch):
    model, lengths = model_of("gpt2"), []
    model.transformer.h[0].register_forward_pre_hook(
        lambda module, inputs: lengths.append(inputs[0].shape[1])
    )
    answers(model, [[3, 4, 5, 6]])
    assert lengths == [4] + [1] * 11
