"""Batched sampling against a loop by hand, and no trace of it afterwards."""

import math

import pytest
import torch

from lit_llm.errors import UserError
from lit_llm.models.build import build_model
from lit_llm.models.config import BaseModelConfig
from lit_llm.rollout.generation import GenerationConfig, Response, generate, stream

PAD, STOP = 0, 5
GREEDY = GenerationConfig(max_new_tokens=12, temperature=0.0)
PROMPTS = [[7, 3], [9, 8, 7, 6, 4, 3, 11, 12, 13], [1], [14, 2, 9, 9, 10], [3, 3, 3]]
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}


def tiny(model_type="llama", positions=32, vocab_size=32, **options):
    torch.manual_seed(1)
    config = GPT2 if model_type == "gpt2" else {"model_type": model_type, **TINY}
    model = build_model(
        BaseModelConfig(config=config | {"initializer_range": 0.4}, **options),
        vocab_size=vocab_size,
        seq_len=positions,
    )
    return model


def run(model, prompts, config=GREEDY, stops=(), **options):
    return generate(model, prompts, config, pad_token_id=PAD, stop_token_ids=stops, **options)


@torch.no_grad()
def by_hand(model, prompt, count):
    """The most likely token, again and again, all of the text read anew each time."""
    model.eval()
    ids = list(prompt)
    for _ in range(count):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])  # rotary and learned positions
def test_greedy_answers_are_those_of_a_loop_without_cache_and_padding(model_type):
    model = tiny(model_type)
    expected = [Response(by_hand(model, prompt, 12), False) for prompt in PROMPTS]
    assert len({tuple(response.ids) for response in expected}) == len(PROMPTS)
    assert run(model, PROMPTS, batch_size=len(PROMPTS)) == expected
    assert run(model, PROMPTS, batch_size=2) == expected
    assert [run(model, [prompt])[0] for prompt in PROMPTS] == expected
    assert run(model, []) == []


def test_an_answer_ends_before_its_first_stop_token():
    model = tiny()
    whole = [by_hand(model, prompt, 12) for prompt in PROMPTS]
    # Two stop tokens, both sampled by the first answer, one of them twice or not at all by others.
    stops = [whole[0][6], whole[0][3]]
    expected = []
    for ids in whole:
        ends = [place for place, token in enumerate(ids) if token in stops]
        expected.append(Response(ids[: ends[0]] if ends else ids, bool(ends)))
    assert len(expected[0].ids) <= 3 and expected[0].stopped
    assert run(model, PROMPTS, stops=stops) == expected
    # Padding with a stop token ends nothing.
    assert generate(model, PROMPTS, GREEDY, pad_token_id=stops[0], stop_token_ids=stops) == expected


def test_a_stop_token_in_the_prompt_ends_nothing():
    model = tiny()
    whole = by_hand(model, PROMPTS[1], 12)
    stop = next(token for token in PROMPTS[1] if token not in whole)
    assert run(model, [PROMPTS[1]], stops=[stop]) == [Response(whole, False)]


class Letters:
    """A tokenizer of 32 tokens: a letter each, but the last six, which are two."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(97 + i) if i < 26 else chr(71 + i) * 2 for i in ids)


def test_an_answer_ends_with_the_token_that_completes_a_stop_string():
    model, letters = tiny(), Letters()
    whole = [by_hand(model, prompt, 12) for prompt in PROMPTS]
    # Three tokens of the first answer; two of the third, of which half of the second is enough.
    stops = [letters.decode(whole[0][4:7]), letters.decode(whole[2][7:9])[:-1]]
    expected = []
    for ids in whole:
        ends = [
            n for n in range(1, 13) if any(string in letters.decode(ids[:n]) for string in stops)
        ]
        expected.append(Response(ids[: ends[0]] if ends else ids, bool(ends)))
    assert [len(response.ids) for response in expected] == [7, 12, 9, 12, 12]
    for batch_size in (1, 2, len(PROMPTS)):
        options = {"stop_strings": stops, "tokenizer": letters, "batch_size": batch_size}
        assert run(model, PROMPTS, **options) == expected


def test_a_stop_string_after_a_stop_token_or_in_the_prompt_ends_nothing():
    model, letters = tiny(), Letters()
    whole = by_hand(model, PROMPTS[1], 12)
    options = {"stop_strings": [letters.decode(whole[4:6])], "tokenizer": letters}
    place = whole.index(whole[2])
    assert run(model, [PROMPTS[1]], stops=[whole[2]], **options) == [Response(whole[:place], True)]
    kept = run(model, [PROMPTS[1]], stops=[whole[2]], keep_stop_token=True, **options)
    assert kept == [Response(whole[: place + 1], True)]
    given = letters.decode(PROMPTS[1][:2])
    assert given not in letters.decode(whole)
    found = run(model, [PROMPTS[1]], stop_strings=[given], tokenizer=letters)
    assert found == [Response(whole, False)]
    # Nor does one that begins in the prompt.
    across = letters.decode([PROMPTS[1][-1], whole[0]])
    assert across not in letters.decode(whole)
    found = run(model, [PROMPTS[1]], stop_strings=[across], tokenizer=letters)
    assert found == [Response(whole, False)]


@pytest.mark.parametrize(("strings", "tokenizer"), [([""], Letters()), (["a"], None)])
def test_stop_strings_that_nothing_can_be_done_with_are_refused(strings, tokenizer):
    with pytest.raises(ValueError, match="stop strings"):
        run(tiny(), [[1]], stop_strings=strings, tokenizer=tokenizer)


def test_a_model_s_own_generation_config_decides_nothing():
    from transformers import GenerationConfig as TransformersConfig

    model = tiny()
    expected = [by_hand(model, prompt, 12) for prompt in PROMPTS]
    own = TransformersConfig(
        do_sample=True,
        temperature=3.0,
        top_k=2,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        suppress_tokens=[expected[0][0]],
        eos_token_id=list(range(32)),
        forced_eos_token_id=5,
        min_length=3,
        max_length=4,
        num_beams=2,
    )
    model.generation_config = own
    assert [response.ids for response in run(model, PROMPTS)] == expected
    assert model.generation_config is own


def logits_of(model, prompt):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([prompt])).logits[0, -1].double()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, None, 1.0), (2.0, 3, 1.0), (1.0, None, 0.6)]
)
def test_samples_follow_the_softmax(temperature, top_k, top_p):
    model = tiny(vocab_size=80)  # more than the 50 tokens that transformers keeps by default
    with torch.no_grad():
        model.lm_head.weight /= 3  # flat enough for the tail to be seen
    count, prompt = 4000, [7, 3]
    logits = logits_of(model, prompt) / temperature
    weights = logits.softmax(0)
    ranked = weights.sort(descending=True)
    keep = torch.ones(80, dtype=torch.bool)
    if top_k is not None:
        keep[ranked.indices[top_k:]] = False
    if top_p < 1:
        before = ranked.values.cumsum(0) - ranked.values  # mass of the more likely tokens
        keep[ranked.indices[before >= top_p]] = False
        assert 2 <= int(keep.sum()) < 40
    expected = torch.where(keep, weights, 0.0)
    expected = expected / expected.sum()
    config = GenerationConfig(1, temperature, top_k, top_p)
    responses = run(model, [prompt] * count, config, batch_size=count)
    seen = torch.tensor([ids[0] for ids, _ in responses]).bincount(minlength=80)
    assert seen[~keep].sum() == 0
    chi2 = ((seen - count * expected)[keep] ** 2 / (count * expected[keep])).sum()
    freedom = int(keep.sum()) - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


def test_the_seed_decides_the_sampling_and_nothing_of_it_stays():
    model = tiny(dropout=0.1)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    config = GenerationConfig(max_new_tokens=8)
    first = run(model, PROMPTS, config, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.manual_seed(4)
    assert run(model, PROMPTS, config, seed=1) == first, "dropout must be off, the seed decides"
    assert run(model, PROMPTS, config, seed=2) != first


def test_modes_and_random_numbers_are_put_back_after_an_error(monkeypatch):
    model = tiny().train()
    own, before = model.generation_config, torch.get_rng_state()
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, PROMPTS)
    assert model.training and model.generation_config is own
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_cache_is_used(checkpointing):
    model = tiny(gradient_checkpointing=checkpointing)
    lengths = []
    hook = lambda module, inputs: lengths.append(inputs[0].shape[1])  # noqa: E731
    model.model.layers[0].register_forward_pre_hook(hook)
    run(model, [[3, 4, 5, 6]])
    assert lengths == [4] + [1] * 11


def test_compiled_blocks_are_not_compiled_for_it():
    from lit_llm.models.compile import compile_blocks

    model = tiny()
    expected = run(model, PROMPTS[:2])
    compile_blocks(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert run(model, PROMPTS[:2]) == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_bfloat16_and_peft():
    from peft import LoraConfig, get_peft_model

    half = run(tiny(dtype="bfloat16"), PROMPTS)
    assert [len(response.ids) for response in half] == [12] * len(PROMPTS)
    base = tiny()
    expected = run(base, PROMPTS)
    wrapped = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    )
    own = base.generation_config
    own.repetition_penalty = 9.0
    assert run(wrapped, PROMPTS) == expected, "an adapter starts as nothing"
    assert base.generation_config is own
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    adapted = run(wrapped, PROMPTS)
    assert adapted != expected, "the adapter must take part"
    assert adapted[0].ids == by_hand(wrapped, PROMPTS[0], 12)


def test_prompts_keep_their_end_where_the_model_has_too_few_positions():
    model = tiny("gpt2", positions=16)
    long = list(range(1, 31))
    assert run(model, [long])[0].ids == by_hand(model, long[-4:], 12)
    far = GenerationConfig(max_new_tokens=100, temperature=0.0)
    assert run(model, [long], far)[0].ids == by_hand(model, long[-1:], 15)


def test_a_stream_is_the_answer_token_by_token():
    model = tiny().train()
    whole = by_hand(model, PROMPTS[0], 12)
    model.train()
    before = torch.get_rng_state()
    options = {"pad_token_id": PAD, "stop_token_ids": [whole[7]]}
    assert list(stream(model, PROMPTS[0], GREEDY, **options)) == whole[: whole.index(whole[7])]
    assert torch.equal(torch.get_rng_state(), before) and model.training
    sampled = GenerationConfig(max_new_tokens=8)
    (expected,) = run(model, [PROMPTS[0]], sampled, seed=4)
    assert list(stream(model, PROMPTS[0], sampled, **options | {"stop_token_ids": []}, seed=4)) == (
        expected.ids
    )


def test_a_closed_stream_samples_no_further():
    model = tiny(positions=4096)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    config = GenerationConfig(max_new_tokens=4000)
    tokens = stream(model, [1, 2], config, pad_token_id=PAD, stop_token_ids=[])
    for _ in range(3):
        next(tokens)
    tokens.close()
    assert 3 <= len(calls) < 1000
    done = len(calls)
    assert model.training and len(calls) == done


def test_an_error_while_streaming_is_the_reader_s(monkeypatch):
    model = tiny()
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(stream(model, [1], GREEDY, pad_token_id=PAD, stop_token_ids=[]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": 1e-9}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": float("inf")}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must lie above 0"),
        ({"top_p": 1.1}, "top_p must lie above 0"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        GenerationConfig(**values)


def test_an_empty_prompt_and_an_empty_batch_are_refused():
    model = tiny()
    with pytest.raises(UserError, match="prompt 1 is empty"):
        run(model, [[1], []])
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        run(model, [[1]], batch_size=0)
