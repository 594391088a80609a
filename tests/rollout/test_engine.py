"""The engine on transformers' own ``generate``, which every other one is an alternative to."""

import torch

from lit_llm.rollout.engine import EngineFactory, RolloutEngine, TransformersEngine
from lit_llm.rollout.generation import GenerationConfig, Response
from tests.rollout.test_generation import GREEDY, PAD, PROMPTS, by_hand, tiny

FACTORY: EngineFactory = TransformersEngine
SEEDS = range(len(PROMPTS))


def engine(model, stops=(), batch_size=2, dtype=None) -> RolloutEngine:
    built = FACTORY(pad_token_id=PAD, stop_token_ids=stops, batch_size=batch_size, dtype=dtype)
    built.load(model)
    return built


def test_answers_keep_their_stop_token():
    model = tiny()
    whole = [by_hand(model, prompt, 12) for prompt in PROMPTS]
    stop = whole[0][3]
    expected = [
        Response(ids[: ids.index(stop) + 1], True) if stop in ids else Response(ids, False)
        for ids in whole
    ]
    assert engine(model, [stop]).generate(PROMPTS, GREEDY, seeds=SEEDS) == expected
    assert engine(model).generate([], GREEDY, seeds=[]) == []


def test_the_seeds_decide_the_sampling():
    model = tiny()
    config = GenerationConfig(max_new_tokens=8)
    first = engine(model).generate(PROMPTS, config, seeds=[3, 1, 4, 1, 5])
    torch.manual_seed(7)
    assert engine(model).generate(PROMPTS, config, seeds=[3, 1, 4, 1, 5]) == first
    assert engine(model).generate(PROMPTS, config, seeds=[3, 1, 4, 1, 6]) != first


def test_products_have_the_dtype_asked_for():
    model, seen = tiny(), []
    model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, inputs, output: seen.append(output.dtype)
    )
    for dtype in (None, torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):  # of a caller, which decides nothing
            engine(model, dtype=dtype).generate([[1]], GenerationConfig(1), seeds=[0])
    assert seen == [torch.float32, torch.float32, torch.bfloat16]


def test_release_lets_go_of_the_model():
    model = tiny()
    built = engine(model)
    built.release()
    assert model not in vars(built).values()
