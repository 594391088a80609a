"""The sampling loop against transformers, by hand, and against itself in other batches."""

import copy

import pytest
import torch
from peft import LoraConfig

import lit_llm.rollout.sampling as sampling
from lit_llm.errors import UserError
from lit_llm.rollout.generation import GenerationConfig, Response
from lit_llm.rollout.llama import LlamaDecoder
from lit_llm.rollout.sampling import SamplingEngine
from tests.rollout.sampling_runs import (
    BOTH,
    KINDS,
    SAMPLED,
    SEEDS,
    answers,
    loaded,
    lora,
    model_of,
)
from tests.rollout.test_generation import GREEDY, PAD, PROMPTS, by_hand


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
