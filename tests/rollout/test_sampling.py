"""The sampling loop against transformers, by hand, and against itself in other batches."""

import copy
import inspect
import math

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch.nn.functional import log_softmax

import lit_llm.rollout.llama as llama
import lit_llm.rollout.products as products
import lit_llm.rollout.sampling as sampling
from lit_llm.errors import UserError
from lit_llm.rollout.decoders import ModelDecoder, has_plain_cache
from lit_llm.rollout.draws import choose, uniforms
from lit_llm.rollout.engine import EngineFactory
from lit_llm.rollout.generation import GenerationConfig, Response
from lit_llm.rollout.llama import LlamaDecoder, llama_like
from lit_llm.rollout.sampling import SamplingEngine
from tests.rollout.test_generation import GREEDY, PAD, PROMPTS, by_hand, logits_of, tiny

FACTORY: EngineFactory = SamplingEngine
SEEDS = [11, 12, 13, 14, 15]
SAMPLED = GenerationConfig(max_new_tokens=12)
KINDS = {
    "llama": LlamaDecoder,
    "qwen2": LlamaDecoder,  # biases
    "qwen3": LlamaDecoder,  # norms of queries and keys
    "gpt2": ModelDecoder,  # learned positions
    "olmo2": ModelDecoder,  # rotary positions, other blocks
}
BOTH = pytest.mark.parametrize("kind", ["llama", "gpt2"])


def model_of(kind, **options):
    """A small model whose biases and norms are not those of a new one."""
    model = tiny(kind, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def loaded(model, stops=(), batch_size=5, dtype=None):
    engine = FACTORY(pad_token_id=PAD, stop_token_ids=stops, batch_size=batch_size, dtype=dtype)
    engine.load(model)
    return engine


def answers(model, prompts=PROMPTS, config=GREEDY, seeds=None, **options):
    seeds = range(len(prompts)) if seeds is None else seeds
    return loaded(model, **options).generate(prompts, config, seeds=seeds)


def lora(model, size=0.3, **options):
    options = {"r": 2, "target_modules": "all-linear"} | options
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return wrapped


# The tokens of a loop, of generate, and of one row alone


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_generate_and_of_a_loop_by_hand(kind):
    from transformers import GenerationConfig as TransformersConfig

    model = model_of(kind)
    expected = [by_hand(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS)
    width = max(map(len, PROMPTS))
    generated = model.generate(
        input_ids=torch.tensor([[PAD] * (width - len(p)) + p for p in PROMPTS]),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS]),
        generation_config=TransformersConfig(max_new_tokens=12, pad_token_id=PAD),
    )
    assert generated[:, width:].tolist() == expected
    engine = loaded(model)
    assert type(engine._decoder) is KINDS[kind]
    for batch_size in (1, 2, 5):
        seen = answers(model, batch_size=batch_size)
        assert seen == [Response(ids, False) for ids in expected]
    assert engine.generate([], GREEDY, seeds=[]) == []


@BOTH
def test_samples_depend_on_their_own_prompt_and_seed_only(kind):
    model = model_of(kind)
    whole = answers(model, config=SAMPLED, seeds=SEEDS)
    stops = [whole[0].ids[4], whole[3].ids[7]]  # rows end, and leave the batch, at different steps
    first = answers(model, config=SAMPLED, seeds=SEEDS, stops=stops)
    assert len({len(response.ids) for response in first}) > 2
    for batch_size in (1, 2, 3):
        seen = answers(model, config=SAMPLED, seeds=SEEDS, stops=stops, batch_size=batch_size)
        assert seen == first
    seen = answers(model, PROMPTS[::-1], SAMPLED, SEEDS[::-1], stops=stops)
    assert seen[::-1] == first
    assert answers(model, PROMPTS[3:], SAMPLED, SEEDS[3:], stops=stops) == first[3:]
    assert answers(model, config=SAMPLED, seeds=range(5), stops=stops) != first
    short = answers(model, config=GenerationConfig(max_new_tokens=4), seeds=SEEDS)
    assert [response.ids for response in short] == [response.ids[:4] for response in whole]


@BOTH
def test_the_same_prompt_several_times_is_that_many_samples(kind):
    model = model_of(kind)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[3], PROMPTS[0], PROMPTS[1]]
    seeds = range(6)
    seen = answers(model, prompts, SAMPLED, seeds, batch_size=6)
    assert seen == answers(model, prompts, SAMPLED, seeds, batch_size=1)
    assert len({tuple(response.ids) for response in seen}) == 6
    greedy = answers(model, prompts, batch_size=6)
    assert [r.ids for r in greedy] == [by_hand(model, prompt, 12) for prompt in prompts]


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


@BOTH
def test_an_answer_keeps_the_first_stop_token_it_ends_with(kind):
    model = model_of(kind)
    whole = [by_hand(model, prompt, 12) for prompt in PROMPTS]
    stops = [whole[0][6], whole[0][3]]
    expected = []
    for ids in whole:
        ends = [place for place, token in enumerate(ids) if token in stops]
        expected.append(Response(ids[: ends[0] + 1] if ends else ids, bool(ends)))
    assert 1 <= len(expected[0].ids) <= 4 and expected[0].stopped
    assert answers(model, stops=stops) == expected
    # The padding token may be a stop token.
    engine = SamplingEngine(pad_token_id=stops[0], stop_token_ids=stops, batch_size=5)
    engine.load(model)
    assert engine.generate(PROMPTS, GREEDY, seeds=SEEDS) == expected


@BOTH
def test_stop_tokens_in_the_prompt_and_at_the_last_step(kind):
    model = model_of(kind)
    whole = by_hand(model, PROMPTS[1], 12)
    inside = next(token for token in PROMPTS[1] if token not in whole)
    assert answers(model, [PROMPTS[1]], stops=[inside]) == [Response(whole, False)]
    end = next(place for place in range(11, 0, -1) if whole[place] not in whole[:place])
    config = GenerationConfig(max_new_tokens=end + 1, temperature=0.0)
    expected = [Response(whole[: end + 1], True)]
    assert answers(model, [PROMPTS[1]], config, stops=[whole[end]]) == expected


@BOTH
def test_sampling_ends_when_all_rows_have_ended(kind, monkeypatch):
    model, steps = model_of(kind), []
    whole = by_hand(model, PROMPTS[0], 12)
    own = KINDS[kind].step
    monkeypatch.setattr(
        KINDS[kind], "step", lambda self, tokens: steps.append(len(tokens)) or own(self, tokens)
    )
    end = whole.index(whole[3])
    answers(model, [PROMPTS[0]] * 4, stops=[whole[3]])
    assert steps == [4] * end
    steps.clear()
    sampled = answers(model, config=SAMPLED, seeds=SEEDS)
    assert steps == [5] * 11
    steps.clear()
    stops = [sampled[0].ids[4], sampled[3].ids[7]]
    stopped = answers(model, config=SAMPLED, seeds=SEEDS, stops=stops)
    assert steps[-1] < 4, "rows that ended leave the batch"
    assert len(steps) == min(11, max(len(response.ids) for response in stopped) - 1)


@BOTH
def test_prompts_keep_their_end_where_the_model_has_too_few_positions(kind):
    model = model_of(kind, positions=16)
    long = list(range(1, 31))
    assert answers(model, [long])[0].ids == by_hand(model, long[-4:], 12)
    far = GenerationConfig(max_new_tokens=100, temperature=0.0)
    assert answers(model, [long], far)[0].ids == by_hand(model, long[-1:], 15)


def test_an_empty_prompt_and_an_empty_batch_are_refused():
    with pytest.raises(UserError, match="prompt 1 is empty"):
        answers(model_of("llama"), [[1], []])
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        loaded(model_of("llama"), batch_size=0)


# The distribution


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


# The policy that is sampled from


@BOTH
def test_no_trace_stays_in_the_training(kind):
    model = lora(model_of(kind, dropout=0.1)).train()
    model.get_base_model().get_input_embeddings().eval()
    modes = [module.training for module in model.modules()]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    versions = [parameter._version for parameter in model.parameters()]
    values = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = answers(model, config=SAMPLED, seeds=SEEDS)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == needs
    assert [parameter._version for parameter in model.parameters()] == versions
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name])
    torch.manual_seed(4)
    assert answers(model, config=SAMPLED, seeds=SEEDS) == first, "dropout must be off"
    # Nothing was left behind that autograd refuses.
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()


@BOTH
def test_modes_and_random_numbers_are_put_back_after_an_error(kind, monkeypatch):
    model = model_of(kind).train()
    engine = loaded(model)
    before = torch.get_rng_state()
    monkeypatch.setattr(sampling, "choose", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate(PROMPTS, GREEDY, seeds=SEEDS)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@BOTH
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_adapters_take_part_until_they_are_switched_off(kind, dtype):
    base = model_of(kind)
    expected = answers(base, dtype=dtype)
    wrapped = lora(base)
    adapted = answers(wrapped, dtype=dtype)
    assert adapted != expected
    if dtype is None:
        assert [r.ids for r in adapted] == [by_hand(wrapped, prompt, 12) for prompt in PROMPTS]
    with wrapped.disable_adapter():
        assert answers(wrapped, dtype=dtype) == expected
    assert answers(wrapped, dtype=dtype) == adapted


def test_modules_that_peft_trains_whole_take_part():
    base = model_of("llama")
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    base.config.tie_word_embeddings = False
    expected = answers(base)
    wrapped = lora(base, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    engine = loaded(wrapped)
    assert isinstance(engine._decoder, LlamaDecoder)
    seen = [response.ids for response in engine.generate(PROMPTS, GREEDY, seeds=SEEDS)]
    assert seen == [by_hand(wrapped, prompt, 12) for prompt in PROMPTS]
    assert seen != [response.ids for response in expected]
    with wrapped.disable_adapter():
        assert answers(wrapped) == expected


def test_of_several_adapters_the_active_one_takes_part():
    wrapped = lora(model_of("llama"))
    wrapped.add_adapter(
        "value", LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    )
    expected = answers(wrapped)
    wrapped.set_adapter("value")  # new, so it changes nothing
    with wrapped.disable_adapter():
        assert answers(wrapped) == (base := answers(wrapped))
    wrapped.set_adapter("value")
    assert answers(wrapped) == base != expected
    wrapped.set_adapter("default")
    wrapped.merge_adapter()
    assert answers(wrapped) == expected


@BOTH
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_new_load_sees_the_weights_after_a_step(kind, dtype):
    model = model_of(kind)
    engine = loaded(model, dtype=dtype)
    before = engine.generate(PROMPTS, GREEDY, seeds=SEEDS)
    engine.release()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ids = torch.tensor([PROMPTS[1]])
    model.eval()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    engine.load(model)
    after = engine.generate(PROMPTS, GREEDY, seeds=SEEDS)
    assert after != before
    if dtype is None:
        assert [r.ids for r in after] == [by_hand(model, prompt, 12) for prompt in PROMPTS]
    else:
        assert after == answers(copy.deepcopy(model), dtype=dtype)


def test_the_caller_s_autocast_decides_nothing():
    for kind in ("llama", "gpt2"):
        model = model_of(kind)
        expected = answers(model, config=SAMPLED)
        with torch.autocast("cpu", torch.bfloat16):
            assert answers(model, config=SAMPLED) == expected


# Which models


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
