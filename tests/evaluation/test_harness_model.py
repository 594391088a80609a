"""The model behind lm-evaluation-harness, beside the harness's own ``hf`` model."""

import copy
import logging
import os
from pathlib import Path

import pytest
import torch

from lit_llm.errors import UserError
from tests.evaluation.tiny_models import TEXTS, greedy, log_probs, model, tokenizer

pytest.importorskip("lm_eval", reason="needs the extra eval: pip install 'lit-llm[eval]'")

KINDS = ("plain", "bos", "eos")
LONG = "the dog barks over the fox, and " * 20


def request(kind, *arguments, task=None, item=0):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0, metadata=(task, item, 1))


def adapter(*args, **options):
    from lit_llm.evaluation.harness_model import HarnessModel

    return HarnessModel(*args, **options)


def reference(network, own, batch_size=3, **options):
    """The harness's own model; it changes what it is given."""
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = copy.deepcopy(own)
    return HFLM(pretrained=network, tokenizer=own, batch_size=batch_size, **options)


def scored(network, own):
    """Contexts and continuations of every sort, one of them what the model itself would say."""
    start = "The quick brown"
    # None that another pair begins with: where two read the same but are split at other places,
    # the harness's own model scores the shorter continuation at the wrong place (0.4.13).
    starts = [text[:length] for text in (TEXTS[0], TEXTS[2]) for length in (5, 13, 20, 28)]
    likely = [(text, greedy(network, own(text)["input_ids"], 1)) for text in starts]
    said = next(
        (text, own.decode(ids))
        for text, ids in likely
        if own(text + own.decode(ids))["input_ids"] == own(text)["input_ids"] + ids
    )
    begun = own.decode(own.bos_token_id if own.bos_token_id is not None else own.eos_token_id)
    pairs = [
        (start, " fox"),
        (start, " dog"),  # these two differ in their last tokens only
        (start, " fox jumps over the lazy dog"),
        said,
        ("", "A question"),
        ("", begun + "A question"),
        ("is asked. ", "An answer"),  # the space is the continuation's
        (begun + "The dog", " barks"),
        (LONG, " lazy dog"),
        ("yes", ", no, " + LONG[:120]),
        ("Die Straße führt", " über 😀"),
    ]
    return [request("loglikelihood", *pair) for pair in pairs]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", ["llama", "gpt2", "granite"])
def test_continuations_score_as_with_the_harness_s_own_model(network, kind):
    own, network = tokenizer(kind), model(network)
    requests = scored(network, own)
    expected = reference(network, own).loglikelihood(requests, disable_tqdm=True)
    for batch_tokens in (1, 100, 4096):
        found = adapter(network, own, batch_tokens=batch_tokens).loglikelihood(requests)
        assert [score for score, _ in found] == pytest.approx([s for s, _ in expected], abs=1e-4)
        assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert {True, False} == {is_greedy for _, is_greedy in expected}


@pytest.mark.parametrize("kind", KINDS)
def test_texts_score_as_with_the_harness_s_own_model(kind):
    own, network = tokenizer(kind), model()
    texts = [LONG, "A question is asked.", "fox", LONG[:200], "", "😀"]
    requests = [request("loglikelihood_rolling", text) for text in texts]
    expected = reference(network, own).loglikelihood_rolling(requests, disable_tqdm=True)
    for batch_tokens in (1, 4096):
        lm = adapter(network, own, batch_tokens=batch_tokens)
        assert lm.loglikelihood_rolling(requests) == pytest.approx(expected, abs=1e-3, rel=1e-6)
    assert min(expected) < -100


def asked(network, own, count=24):
    """Prompts, and for each of them a text that the model says soon."""
    prompts = ["The quick", LONG, "A question is asked.", "yes, no", "déjà vu", "An answer is"]
    until = []
    for prompt in prompts:
        ids = own(prompt)["input_ids"][-(64 - count) :]
        said = own.decode(greedy(network, ids, count), skip_special_tokens=True)
        until.append(said[6:9])
    assert all(until)
    return prompts, until


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_harness_s_own_model(kind):
    own, network = tokenizer(kind), model()
    prompts, until = asked(network, own)
    settings = [{"until": [text, until[0]], "max_gen_toks": 24} for text in until]
    settings[3] = {"until": [], "max_gen_toks": 10, "do_sample": False, "temperature": 0.0}
    settings[4] = {"until": until[4], "max_gen_toks": 24}  # a text for a list of one
    requests = [
        request("generate_until", prompt, own_settings)
        for prompt, own_settings in zip(prompts, settings, strict=True)
    ]
    expected = reference(network, own, 1).generate_until(requests, disable_tqdm=True)
    for batch_tokens in (1, 4096):
        lm = adapter(network, own, batch_tokens=batch_tokens)
        assert lm.generate_until(requests) == expected
        assert lm.stopped == [number != 3 for number in range(6)]
    cut = [text not in answer for text, answer in zip(until, expected, strict=True)]
    assert all(cut[:3] + cut[4:])


def test_a_context_may_be_shorter_than_the_model_s_positions():
    own, network = tokenizer(), model()
    their, lm = reference(network, own, max_length=30), adapter(network, own, max_length=30)
    pair = [request("loglikelihood", LONG, " lazy dog")]
    assert lm.loglikelihood(pair)[0][0] == pytest.approx(
        their.loglikelihood(pair, disable_tqdm=True)[0][0], abs=1e-4
    )
    text = [request("loglikelihood_rolling", LONG)]
    wanted = their.loglikelihood_rolling(text, disable_tqdm=True)
    assert lm.loglikelihood_rolling(text) == pytest.approx(wanted, rel=1e-6)
    question = [request("generate_until", LONG, {"until": [], "max_gen_toks": 20})]
    answer = lm.generate_until(question)
    assert answer == their.generate_until(question, disable_tqdm=True)
    whole = greedy(network, own(LONG)["input_ids"][-10:], 20)
    assert answer == [own.decode(whole, skip_special_tokens=True)]


@pytest.mark.skipif("LIT_LLM_MODELS" not in os.environ, reason="LIT_LLM_MODELS is not set")
def test_a_trained_model_scores_and_answers_as_with_the_harness_s_own():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(os.environ["LIT_LLM_MODELS"]) / "stories260k"
    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    own = AutoTokenizer.from_pretrained(folder)
    their, lm = reference(network, own), adapter(network, own)
    start = "Once upon a time, there was a"
    pairs = [(start, " little girl"), (start, " dog"), ("", "One day"), ("Tom said ", "hello.")]
    requests = [request("loglikelihood", *pair) for pair in pairs]
    expected = their.loglikelihood(requests, disable_tqdm=True)
    for found, wanted in zip(lm.loglikelihood(requests), expected, strict=True):
        assert found == (pytest.approx(wanted[0], abs=1e-4), wanted[1])
    texts = [request("loglikelihood_rolling", f"{start} little girl. " * 60)]
    wanted = their.loglikelihood_rolling(texts, disable_tqdm=True)
    assert lm.loglikelihood_rolling(texts) == pytest.approx(wanted, rel=1e-6)
    settings = {"until": [".", "\n"], "max_gen_toks": 60}
    questions = [request("generate_until", text, settings) for text in (start, "Lily and Tom")]
    assert lm.generate_until(questions) == their.generate_until(questions, disable_tqdm=True)


@pytest.mark.thorough
def test_a_task_gives_what_it_gives_on_the_exported_folder(tmp_path):
    """Through the harness itself: a choice, and an answer that is written."""
    import json

    from lm_eval import simple_evaluate

    own, network = tokenizer(), model(positions=128)
    network.save_pretrained(tmp_path / "model")
    own.save_pretrained(tmp_path / "model")
    choices = [" fox", " dog", " answer is given", " question"]
    docs = [{"text": text, "label": n} for n, text in enumerate(("The quick", "A", "no", "An"))]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    tasks = [
        {**data, "task": "choose", "doc_to_target": "label", "doc_to_choice": choices}
        | {"output_type": "multiple_choice"},
        {**data, "task": "write", "doc_to_target": "{{text}}", "output_type": "generate_until"}
        | {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 8}},
    ]

    def run(lm, **options):
        found = simple_evaluate(
            model=lm, tasks=tasks, bootstrap_iters=0, log_samples=True, **options
        )
        scores = {name: found["results"][name] for name in ("choose", "write")}
        answers = [sample["resps"] for name in scores for sample in found["samples"][name]]
        return scores, answers

    folder = {"pretrained": str(tmp_path / "model"), "device": "cpu", "dtype": "float32"}
    wanted_scores, wanted = run("hf", model_args=folder)
    scores, answers = run(adapter(network, own))
    assert scores == wanted_scores
    assert len(answers) == 8
    for mine, theirs in zip(answers[:4], wanted[:4], strict=True):
        for (one,), (other,) in zip(mine, theirs, strict=True):
            assert float(one[0]) == pytest.approx(float(other[0]), abs=1e-4)
    assert answers[4:] == wanted[4:]


# ----- how it is done ---------------------------------------------------------------------------


def test_choices_of_one_token_share_a_row_and_the_head_sees_targets_only(monkeypatch):
    own, network = tokenizer(), model()
    rows, heads = [], []
    hook = network.model.register_forward_pre_hook(
        lambda module, args, given: rows.append(given["input_ids"].shape), with_kwargs=True
    )
    other = network.lm_head.register_forward_hook(lambda *_: heads.append(1))
    try:
        choices = [own.decode(i) for i in range(70, 90)]
        lm = adapter(network, own)
        found = lm.loglikelihood([request("loglikelihood", "A dog", c) for c in choices])
    finally:
        hook.remove()
        other.remove()
    ids = own("A dog")["input_ids"]
    assert rows == [(1, len(ids))] and not heads
    expected = log_probs(network, ids)[-1]
    targets = [own("A dog" + c)["input_ids"][len(ids) :] for c in choices]
    assert all(len(target) == 1 for target in targets)
    assert [s for s, _ in found] == pytest.approx(
        [float(expected[t[0]]) for t in targets], abs=1e-4
    )


def test_a_shared_row_scores_each_continuation_at_its_own_place():
    own, network = tokenizer(), model()
    ids = own("A question is asked")["input_ids"]
    lm = adapter(network, own)
    found = lm.token_scores([(ids[:n], ids[n:]) for n in (1, 4, len(ids) - 1)])
    rows = log_probs(network, ids)
    steps = [float(rows[n - 1, ids[n]]) for n in range(1, len(ids))]
    assert found == pytest.approx([sum(steps), sum(steps[3:]), steps[-1]], abs=1e-4)


def test_batches_hold_so_many_tokens_and_the_longest_row_comes_first():
    own, network, shapes = tokenizer(), model(), []
    hook = network.model.register_forward_pre_hook(
        lambda module, args, given: shapes.append(given["input_ids"].shape), with_kwargs=True
    )
    texts = [LONG[: 5 + 7 * n] for n in range(12)]
    try:
        lm = adapter(network, own, batch_tokens=200)
        lm.loglikelihood([request("loglikelihood", text, " fox jumps") for text in texts])
    finally:
        hook.remove()
    assert sum(rows for rows, _ in shapes) == 12
    assert all(rows == 1 or rows * width <= 200 for rows, width in shapes)
    assert [width for _, width in shapes] == sorted((w for _, w in shapes), reverse=True)
    assert max(rows for rows, _ in shapes) > 2


def test_no_trace_is_left_in_a_model_that_trains():
    own, network = tokenizer(), copy.deepcopy(model("gpt2")).train()
    network.transformer.h[0].eval()
    modes = [module.training for module in network.modules()]
    assert any(module.p > 0 for module in network.modules() if isinstance(module, torch.nn.Dropout))
    state = copy.deepcopy(own.init_kwargs), own.padding_side, own.pad_token
    before = torch.get_rng_state()
    lm = adapter(network, own)
    requests = scored(model("gpt2"), own)
    assert lm.loglikelihood(requests) == adapter(model("gpt2"), own).loglikelihood(requests)
    lm.generate_until([request("generate_until", "A", {"max_gen_toks": 3, "do_sample": True})])
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in network.modules()] == modes
    assert (own.init_kwargs, own.padding_side, own.pad_token) == state
    assert all(parameter.grad is None for parameter in network.parameters())


def test_adapters_take_part():
    from peft import LoraConfig, get_peft_model

    own = tokenizer()
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    wrapped = get_peft_model(copy.deepcopy(model()), config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    ids = own("A dog barks")["input_ids"]
    context = own("A dog")["input_ids"]
    rows = log_probs(wrapped, ids)
    expected = sum(float(rows[n - 1, ids[n]]) for n in range(len(context), len(ids)))
    lm = adapter(wrapped, own)
    ((found, _),) = lm.loglikelihood([request("loglikelihood", "A dog", " barks")])
    assert found == pytest.approx(expected, abs=1e-4)
    (answer,) = lm.generate_until([request("generate_until", "A dog", {"max_gen_toks": 6})])
    assert answer == own.decode(greedy(wrapped, context, 6), skip_special_tokens=True)


def test_half_precision_is_of_the_products_and_not_of_the_softmax():
    own, network = tokenizer(), model()
    requests = scored(network, own)
    exact = [score for score, _ in adapter(network, own).loglikelihood(requests)]
    half = [s for s, _ in adapter(network, own, dtype=torch.bfloat16).loglikelihood(requests)]
    assert half != pytest.approx(exact, abs=1e-4)
    assert half == pytest.approx(exact, rel=0.1, abs=0.3)
    assert next(network.parameters()).dtype == torch.float32
    # A number that bfloat16 cannot hold.
    assert all(float(torch.tensor(score).bfloat16()) != score for score in half)


def test_given_tokens_score_after_given_tokens():
    own, network = tokenizer(), model()
    ids = own(LONG)["input_ids"][:60]
    lm = adapter(network, own)
    found = lm.token_scores([(ids[:10], ids[10:30]), (ids[:3], []), (ids[:1], ids[1:60])])
    rows = log_probs(network, ids)
    steps = [float(rows[n - 1, ids[n]]) for n in range(1, 60)]
    assert found == pytest.approx([sum(steps[9:29]), 0.0, sum(steps)], abs=1e-3)


def test_a_stop_string_that_is_a_special_token_ends_a_row_while_others_go_on():
    own, network = tokenizer(), copy.deepcopy(model())
    ids = own("The quick")["input_ids"]
    said = greedy(network, ids, 12)
    end = own.convert_tokens_to_ids("<|im_end|>")
    place = next(n for n in range(3, 12) if said[n] not in said[:n])
    with torch.no_grad():  # the two tokens change places
        weight = network.lm_head.weight
        weight[[said[place], end]] = weight[[end, said[place]]].clone()
    prompts = ["The quick", *(text[:30] for text in TEXTS)]
    expected = []
    for text in prompts:
        whole = greedy(network, own(text)["input_ids"], 12)
        expected.append(whole[: whole.index(end)] if end in whole else whole)
    assert max(map(len, expected)) > len(expected[0]) == place
    settings = {"until": ["<|im_end|>"], "max_gen_toks": 12}
    lm = adapter(network, own)
    answers = lm.generate_until([request("generate_until", text, settings) for text in prompts])
    assert answers == [own.decode(ids) for ids in expected]
    assert lm.stopped == [len(ids) < 12 for ids in expected]


def test_what_the_model_s_own_settings_stop_at_stops_it():
    own, network = tokenizer(), copy.deepcopy(model())
    said = greedy(network, own("A dog")["input_ids"], 10)
    place = next(n for n in range(2, 10) if said[n] not in said[:n])
    network.generation_config.eos_token_id = [own.eos_token_id, said[place]]
    network.generation_config.repetition_penalty = 5.0
    lm = adapter(network, own)
    (answer,) = lm.generate_until([request("generate_until", "A dog", {"max_gen_toks": 10})])
    assert answer == own.decode(said[:place]) and lm.stopped == [True]


def test_sampled_answers_come_from_the_seed():
    own, network = tokenizer(), model()
    settings = {"do_sample": True, "temperature": 2.0, "top_p": 0.9, "max_gen_toks": 12}
    # One prompt a batch, twelve times the same one, as tasks with repeats ask for.
    requests = [request("generate_until", "A dog", settings)] * 12
    first = adapter(network, own, batch_tokens=1).generate_until(requests)
    assert len(set(first)) > 6
    assert adapter(network, own, batch_tokens=1).generate_until(requests) == first
    assert adapter(network, own, batch_tokens=1, seed=1).generate_until(requests) != first
    cold = {**settings, "top_p": 1e-6}
    greedily = adapter(network, own).generate_until([request("generate_until", "A dog", cold)])
    plain = {"max_gen_toks": 12}
    assert greedily == adapter(network, own).generate_until(
        [request("generate_until", "A dog", plain)]
    )


def test_a_temperature_alone_asks_for_sampling():
    from lit_llm.evaluation.answer_settings import answer_settings

    def read(**asked):
        given = {"eos": "<e>", "max_length": 64, "max_gen_toks": 20, "task": "t"}
        return answer_settings(asked, **given)

    config, until = read(until=["\n", ""], temperature=0.5, top_k=7, num_beams=1)
    assert (config.temperature, config.top_k, config.max_new_tokens) == (0.5, 7, 20)
    assert until == ["\n", "<e>"]
    assert read(do_sample=False, temperature=0.5)[0].temperature == 0
    assert read(do_sample=True)[0].temperature == 1
    assert read(max_new_tokens=3)[0].max_new_tokens == 3


@pytest.mark.parametrize("system", [True, False])
def test_a_chat_is_rendered_as_by_the_harness_s_own_model(system):
    own, network = tokenizer(), model()
    if not system:
        own.chat_template = (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        )
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A question?"},
        {"role": "assistant", "content": "An ans"},
    ]
    their, lm = reference(network, own), adapter(network, own)
    assert lm.apply_chat_template(chat[:2]) == their.apply_chat_template(chat[:2])
    assert ("Be brief." in lm.apply_chat_template(chat[:2])) == system
    half = lm.apply_chat_template(chat, add_generation_prompt=False)
    assert half == their.apply_chat_template(chat, add_generation_prompt=False)
    assert half.endswith("An ans")
    assert lm.chat_template(True) == own.chat_template
    assert lm.tokenizer_name == their.tokenizer_name


def test_what_decides_the_results_is_told_and_how_fast_they_come_is_not():
    """Beside the weights: a result of other tokens or another template is not this one's."""
    own, network = tokenizer(), model()
    first = adapter(network, own).identity
    assert adapter(network, tokenizer(), batch_tokens=7).identity == first
    adapter(network, own).loglikelihood([request("loglikelihood", "A", " question")])
    assert adapter(network, own).identity == first
    templated = copy.deepcopy(own)
    templated.chat_template = "{{ messages }}"
    stopping = copy.deepcopy(network)
    stopping.generation_config.eos_token_id = [5]
    rotated = copy.deepcopy(network)
    rotated.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    others = [
        adapter(network, templated),
        adapter(network, tokenizer("bos")),
        adapter(network, own, dtype=torch.bfloat16),
        adapter(network, own, max_length=32),
        adapter(stopping, own),
        adapter(rotated, own),
    ]
    assert all(other.identity != first for other in others)


# ----- several processes ------------------------------------------------------------------------


def test_ranks_do_a_share_each_and_have_all_results(monkeypatch):
    """Two threads for two processes."""
    import threading

    import torch.distributed as dist

    from lit_llm.evaluation.windows import dealt

    meet, table, done = threading.Barrier(2), {}, {}

    def gather(parts, own, group):
        table[group] = own
        meet.wait(timeout=20)
        parts[:] = [table[0], table[1]]
        meet.wait(timeout=20)

    monkeypatch.setattr(dist, "get_rank", lambda group: group)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)

    def on(rank):
        for count in (5, 1, 0):
            seen = []
            work = lambda share, seen=seen: seen.extend(share) or [-item for item in share]  # noqa: E731
            found = dealt(work, list(range(1, count + 1)), rank)
            done[rank, count] = seen, found

    threads = [threading.Thread(target=on, args=[rank]) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = [-1, -2, -3, -4, -5]
    assert done[0, 5] == ([1, 3, 5], everything) and done[1, 5] == ([2, 4], everything)
    assert done[0, 1] == ([1], [-1]) and done[1, 1] == ([], [-1])
    assert done[0, 0] == done[1, 0] == ([], [])


def run_on_rank():
    """All three kinds of requests, with the group of all ranks."""
    import torch.distributed as dist

    own, network = tokenizer(), model()
    ranks = dist.group.WORLD if dist.is_initialized() else None
    requests, rows = scored(network, own), []
    hook = lambda module, args, given: rows.append(len(given["input_ids"]))  # noqa: E731
    handle = network.model.register_forward_pre_hook(hook, with_kwargs=True)
    lm = adapter(network, own, ranks=ranks)
    assert (lm.rank, lm.world_size) == (0, 1)
    scores = lm.loglikelihood(requests)
    handle.remove()
    texts = lm.loglikelihood_rolling([request("loglikelihood_rolling", LONG)])
    prompts, until = asked(network, own)
    answers = lm.generate_until(
        [
            request("generate_until", text, {"until": stop, "max_gen_toks": 24})
            for text, stop in zip(prompts, until, strict=True)
        ]
    )
    return scores, texts, answers, lm.stopped, sum(rows)


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.xdist_group("two_ranks")
def test_two_processes_give_what_one_does():
    from tests.strategies.world import World

    world = World(2)
    try:
        first, second = world.run(f"{__name__}:run_on_rank")
    finally:
        world.close()
    scores, *others, rows = run_on_rank()
    assert first[:4] == second[:4]
    assert [s for s, _ in first[0]] == pytest.approx([s for s, _ in scores], abs=1e-4)
    assert first[1] == pytest.approx(others[0], abs=1e-3)
    assert list(first[2:4]) == others[1:]
    assert first[4] + second[4] == rows and abs(first[4] - second[4]) <= 1


# ----- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        ("A dog", "", "task t, item 3: the continuation '' adds no token"),
        ("", "", "task t, item 3: the continuation"),
        ("", "<|endoftext|>", "adds no token"),
        ("A dog", LONG, r"task t, item 3: the continuation has \d+ tokens, but .* is 64"),
    ],
)
def test_continuations_that_cannot_be_scored_are_refused(context, continuation, message):
    lm = adapter(model(), tokenizer())
    wrong = request("loglikelihood", context, continuation, task="t", item=3)
    fine = request("loglikelihood", "A dog", " barks", task="t", item=2)
    with pytest.raises(UserError, match=message):
        lm.loglikelihood([fine, wrong])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": 64}, "task t, item 3: answers of up to 64 tokens leave no room .* of 64"),
        ({}, "answers of up to 256 tokens leave no room"),
        ({"max_gen_toks": 4, "num_beams": 10}, "the setting num_beams=10 of its answers is not"),
    ],
)
def test_answers_that_cannot_be_given_are_refused(settings, message):
    lm = adapter(model(), tokenizer())
    with pytest.raises(UserError, match=message):
        lm.generate_until([request("generate_until", "A", settings, task="t", item=3)])


def test_models_and_tokenizers_that_cannot_be_asked_are_refused():
    own = tokenizer("eos")
    own.eos_token = None
    with pytest.raises(UserError, match="neither a BOS nor an EOS token"):
        adapter(model(), own)
    with pytest.raises(UserError, match="context of 1 tokens is too short"):
        adapter(model(), tokenizer(), max_length=1)
    with pytest.raises(UserError, match="batch_tokens must be at least 1, got 0"):
        adapter(model(), tokenizer(), batch_tokens=0).loglikelihood(
            [request("loglikelihood", "A", " dog")]
        )
