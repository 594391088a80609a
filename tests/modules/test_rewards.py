"""Rewards of every kind, against transformers run on one text at a time."""

import math
from pathlib import Path

import pytest
import torch

from lit_llm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from lit_llm.errors import UserError
from lit_llm.modules.rewards import RewardConfig, Rewards, as_rewards, reward_names
from lit_llm.modules.scoring_model import ScoringModel
from lit_llm.rollout.rewards import RewardSample

TEXTS = ["which animal jumps over the lazy dog", "the quick brown fox jumps", "nobody knows it"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({w for text in TEXTS for w in text.split()})]
CHATS = [
    ("which animal jumps", "the quick fox", True),
    ("nobody knows it", "the lazy dog jumps over the lazy fox", False),
    ("which", "", True),
    ("which animal", "", False),
]


@pytest.fixture(scope="module")
def policy():
    """A byte-level tokenizer with a chat template, as our stages train it."""
    return train_tokenizer(TEXTS, 280)


@pytest.fixture(scope="module")
def words():
    """A tokenizer of words as BERT has it: pairs of texts with segments, no EOS, no template."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves a random model that scores texts, with weights large enough for errors to show."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    def save(tokenizer, model_type: str = "llama", labels: int = 1, **changes) -> str:
        torch.manual_seed(labels)
        values = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        values |= {"intermediate_size": 48, "max_position_embeddings": 96, "pad_token_id": 1}
        values |= {"vocab_size": len(tokenizer), "num_labels": labels} | changes
        config = AutoConfig.for_model(model_type, **values)
        model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8).add_(0.05 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("reward") / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


def chat_samples(tokenizer) -> list[RewardSample]:
    """Prompts and responses in ChatML, written out by hand."""
    samples = []
    for question, answer, stopped in CHATS:
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        end = "<|im_end|>" if stopped else ""
        samples.append(
            RewardSample(
                question,
                answer,
                tokenizer(prompt).input_ids,
                tokenizer(answer + end).input_ids,
                stopped,
                [{"role": "user", "content": question}],
            )
        )
    return samples


def plain_samples(tokenizer) -> list[RewardSample]:
    return [
        RewardSample(prompt, response, tokenizer(prompt).input_ids, [5], stopped)
        for prompt, response, stopped in [
            ("the quick brown", " fox jumps", True),
            ("the quick", "", False),
            ("nobody", " knows it, nobody knows the lazy fox", False),
        ]
    ]


def rewards(*configs, tokenizer, **options) -> Rewards:
    return Rewards(as_rewards(configs), tokenizer=tokenizer, **options)


def last_hidden(folder: str, ids: list[int]):
    """Hidden state of the last token of one text, and the head: transformers alone."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model.model(torch.tensor([ids])).last_hidden_state[0, -1], model.score.weight


def by_hand(folder: str, ids: list[int]) -> list[float]:
    hidden, weight = last_hidden(folder, ids)
    return (weight @ hidden).tolist()


def bert_by_hand(folder: str, tokenizer, *texts: str) -> torch.Tensor:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**tokenizer(*texts, return_tensors="pt")).logits[0]


# ----- models that read the policy's tokens -------------------------------------------------------


def test_a_reward_model_of_the_same_tokenizer_reads_the_sampled_tokens(saved, policy) -> None:
    folder = saved(
        policy, reward_mean=[0.5], reward_std=[2.0], reward_aggregation="mean", rope_theta=100.0
    )
    module = rewards(folder, tokenizer=policy, max_length=96)
    samples = chat_samples(policy)
    # Tokens that are not those of the text: nothing is tokenised anew.
    samples.append(RewardSample("x", "y", [40, 41, 9], [250, 7, 7], False, None))
    expected = [
        (by_hand(folder, sample.prompt_ids + sample.response_ids)[0] - 0.5) / 2.0
        for sample in samples
    ]
    assert torch.tensor(expected).std() > 0.05
    found = module(samples)
    assert (found.total.shape, found.total.dtype) == ((5,), torch.float32)
    assert found.total.tolist() == pytest.approx(expected, abs=1e-4)
    for place, sample in enumerate(samples):  # whatever stands beside it
        assert module([sample]).total.item() == pytest.approx(expected[place], abs=1e-4)
    small = rewards(folder, tokenizer=policy, batch_size=2)
    assert small(samples[::-1]).total.tolist() == pytest.approx(expected[::-1], abs=1e-4)
    assert module([]).total.shape == (0,)


def test_which_tokenizers_are_the_policys(saved, policy) -> None:
    from tokenizers import pre_tokenizers

    folder = saved(policy)

    def reads_text(change=lambda tokenizer: None, size: int = 280) -> bool:
        other = train_tokenizer(TEXTS, size)
        change(other)
        return ScoringModel("r", folder, tokenizer=other).tokenizer is not None

    assert not reads_text()
    assert not reads_text(lambda other: other.add_special_tokens({"pad_token": "<|more|>"}))
    marked = CHAT_TEMPLATE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    assert not reads_text(lambda other: setattr(other, "chat_template", marked))
    assert reads_text(size=265)
    assert reads_text(lambda other: other.add_tokens(["brown fox"]))
    other_turns = CHAT_TEMPLATE.replace("message['role'] +", "message['role'] | upper +")
    assert other_turns != CHAT_TEMPLATE
    assert reads_text(lambda other: setattr(other, "chat_template", other_turns))

    def cut_anew(other) -> None:  # the same vocabulary, applied in another way
        other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)

    assert reads_text(cut_anew)
    # Also where there is no template to tell it by.
    own = train_tokenizer(TEXTS, 280)
    own.chat_template = None
    folder = saved(own)
    assert reads_text()
    assert not reads_text(lambda other: setattr(other, "chat_template", None))
    assert reads_text(lambda other: (cut_anew(other), setattr(other, "chat_template", None)))


def test_heads_are_standardised_each_and_put_together(saved, policy) -> None:
    statistics = {"reward_mean": [1.0, -1.0, 0.0], "reward_std": [0.5, 2.0, 1.0]}
    folder = saved(
        policy, labels=3, problem_type="regression", reward_aggregation="min", **statistics
    )
    samples = chat_samples(policy)[:2]
    for sample, found in zip(
        samples, rewards(folder, tokenizer=policy)(samples).total, strict=True
    ):
        a, b, c = by_hand(folder, sample.prompt_ids + sample.response_ids)
        assert found.item() == pytest.approx(min((a - 1) / 0.5, (b + 1) / 2, c), abs=1e-4)


def test_a_class_of_a_causal_classifier(saved, policy) -> None:
    names = {0: "bad", 1: "fair", 2: "Good"}
    folder = saved(policy, labels=3, id2label=names, label2id={v: k for k, v in names.items()})
    samples = chat_samples(policy)[:2]
    for label, number in ((2, 2), ("Good", 2), ("good", 2), ("2", None), (0, 0), ("fair", 1)):
        if number is None:
            continue
        found = rewards(RewardConfig(model=folder, label=label), tokenizer=policy)(samples).total
        for sample, value in zip(samples, found, strict=True):
            logits = by_hand(folder, sample.prompt_ids + sample.response_ids)
            expected = logits[number] - math.log(sum(math.exp(logit) for logit in logits))
            assert value.item() == pytest.approx(expected, abs=1e-4)
    known = "its labels are: 0 \\(bad\\), 1 \\(fair\\), 2 \\(Good\\)"
    for label, words in ((None, "needs a label"), (3, "no label 3"), (-1, "no"), ("best", "best")):
        with pytest.raises(UserError, match=f"reward mood: .*{words}.*{known}"):
            rewards(RewardConfig(model=folder, label=label, name="mood"), tokenizer=policy)


def test_longer_texts_than_the_model_reads_are_refused_before_the_first(saved, policy) -> None:
    folder = saved(policy)
    rewards(folder, tokenizer=policy, max_length=96)
    with pytest.raises(UserError, match=r"reads 96 tokens, but prompt and response may have 97"):
        rewards(folder, tokenizer=policy, max_length=97)


# ----- models that read text ----------------------------------------------------------------------


def test_another_tokenizer_reads_through_its_own_template(saved, policy) -> None:
    own = train_tokenizer([text.upper() for text in TEXTS], 300)
    folder = saved(own)
    found = rewards(folder, tokenizer=policy)(chat_samples(policy)).total
    # The same text in the tokens of the reward model, ended where it was ended.
    texts = [sample.prompt_ids + sample.response_ids for sample in chat_samples(own)]
    assert own.chat_template == CHAT_TEMPLATE
    expected = [by_hand(folder, ids)[0] for ids in texts]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_the_same_tokenizer_with_another_template_reads_through_its_own(saved, policy) -> None:
    own = train_tokenizer(TEXTS, 280)
    own.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role[0] }}: {{ m.content }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>a: {% endif %}"
    )
    folder = saved(own)
    samples = chat_samples(policy)[:2]
    texts = [
        "<|im_start|>u: which animal jumps<|im_end|>\n<|im_start|>a: the quick fox<|im_end|>",
        "<|im_start|>u: nobody knows it<|im_end|>\n"
        "<|im_start|>a: the lazy dog jumps over the lazy fox",
    ]
    expected = [by_hand(folder, own(text).input_ids)[0] for text in texts]
    found = rewards(folder, tokenizer=policy)(samples).total
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_plain_texts_are_joined_and_ended_where_they_were(saved, policy) -> None:
    own = train_tokenizer([text.upper() for text in TEXTS], 300)
    folder = saved(own)
    found = rewards(folder, tokenizer=policy)(plain_samples(policy)).total
    texts = [
        "the quick brown fox jumps<|endoftext|>",
        "the quick",
        "nobody knows it, nobody knows the lazy fox",
    ]
    expected = [by_hand(folder, own(text).input_ids)[0] for text in texts]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_bert_reads_question_and_response_as_a_pair(saved, policy, words) -> None:
    folder = saved(words, "bert", type_vocab_size=2)
    samples = chat_samples(policy)
    expected = [
        bert_by_hand(folder, words, sample.prompt, sample.response).item() for sample in samples
    ]
    # The segments matter, and which tokens are padding.
    assert bert_by_hand(folder, words, "which animal jumps the quick fox").item() != expected[0]
    for size in (1, 3, 16):
        module = rewards(folder, tokenizer=policy, batch_size=size)
        assert module(samples).total.tolist() == pytest.approx(expected, abs=1e-4)


def test_bert_reads_a_continued_text_as_one(saved, policy, words) -> None:
    folder = saved(words, "bert", labels=2)
    samples = plain_samples(policy)
    found = rewards(RewardConfig(model=folder, label=1), tokenizer=policy)(samples).total
    expected = [
        bert_by_hand(folder, words, sample.prompt + sample.response).log_softmax(0)[1].item()
        for sample in samples
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_labels_that_do_not_exclude_each_other(saved, policy, words, kind: str) -> None:
    folder = saved(words, "bert", labels=2, problem_type=kind)
    sample = plain_samples(policy)[0]
    found = rewards(RewardConfig(model=folder, label=0), tokenizer=policy)([sample]).total
    logit = bert_by_hand(folder, words, sample.prompt + sample.response)[0].item()
    expected = -math.log(1 + math.exp(-logit)) if kind.startswith("multi") else logit
    assert found.item() == pytest.approx(expected, abs=1e-4)


def test_longer_texts_lose_their_beginning_and_that_is_told(saved, policy, words) -> None:
    folder = saved(words, "bert", max_position_embeddings=8)
    long = RewardSample("lazy dog lazy dog lazy", " the quick brown fox", [1], [1], True)
    module = rewards(RewardConfig(model=folder, name="bert"), tokenizer=policy)
    with pytest.warns(UserWarning, match="reward bert: its model reads 8 tokens") as told:
        found = [module([long]).total.item(), module([long]).total.item()]
    assert len(told) == 1
    # Eight tokens with [CLS] and [SEP].
    kept = bert_by_hand(folder, words, "dog lazy the quick brown fox").item()
    assert found == pytest.approx([kept, kept], abs=1e-4)
    own = train_tokenizer([text.upper() for text in TEXTS], 300)
    folder = saved(own, max_position_embeddings=12)
    module = rewards(folder, tokenizer=policy)
    with pytest.warns(UserWarning, match="reads 12 tokens"):
        found = [module([long]).total.item()]
    ids = own("lazy dog lazy dog lazy the quick brown fox<|endoftext|>").input_ids
    assert found == pytest.approx(by_hand(folder, ids[-12:]), abs=1e-4)


def test_no_words_at_all_have_a_score(saved, policy, words) -> None:
    empty = [
        RewardSample("", "", [1], [], False),
        RewardSample("", "", [1], [], False, [{"role": "user", "content": ""}]),
    ]
    other = train_tokenizer([text.upper() for text in TEXTS], 300)
    for folder in (saved(words, "bert"), saved(other)):
        module = rewards(folder, tokenizer=policy)
        alone = [module([sample]).total.item() for sample in empty]
        assert module(empty).total.tolist() == pytest.approx(alone, abs=1e-4)


def test_a_template_that_refuses_is_told_with_the_sample(saved, policy) -> None:
    own = train_tokenizer([text.upper() for text in TEXTS], 300)
    own.chat_template = "{{ raise_exception('no system role') if messages[0].role == 'system' }}"
    own.chat_template += CHAT_TEMPLATE
    module = rewards(RewardConfig(model=saved(own), name="strict"), tokenizer=policy)
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    sample = RewardSample("q", "an answer", [1], [2], True, chat)
    words = "reward strict: the chat template refuses .*no system role; .*'an answer'"
    with pytest.raises(UserError, match=words):
        module([*chat_samples(policy), sample])


# ----- the module ---------------------------------------------------------------------------------


def test_rewards_are_weighted_and_kept_apart(saved, policy) -> None:
    folder = saved(policy)
    module = rewards(
        RewardConfig(model=folder, weight=-0.5, name="disliked"),
        RewardConfig(function="length_window", options={"shortest": 3, "unit": "words"}, weight=3),
        {"function": "regex", "options": {"pattern": "fox"}, "weight": 0},
        tokenizer=policy,
    )
    samples = chat_samples(policy)
    total, parts = module(samples)
    assert module.names == list(parts) == ["disliked", "length_window", "regex"]
    own = torch.tensor(
        [by_hand(folder, sample.prompt_ids + sample.response_ids)[0] for sample in samples]
    )
    torch.testing.assert_close(parts["disliked"], own, rtol=0, atol=1e-4)
    assert parts["length_window"].tolist() == [1, 1, 0, 0]
    assert parts["regex"].tolist() == [1, 1, 0, 0]
    expected = -0.5 * own + 3 * torch.tensor([1.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-4)
    assert rewards(tokenizer=policy)(samples).total.tolist() == [0, 0, 0, 0]


def test_models_are_frozen_and_never_in_training_mode(saved, policy, words) -> None:
    causal = saved(policy, attention_dropout=0.5)
    bert = saved(words, "bert", hidden_dropout_prob=0.5)
    module = rewards(causal, RewardConfig(model=bert), tokenizer=policy)
    assert len(module.models) == 2
    outer = torch.nn.ModuleList([module])
    outer.train()
    assert not any(part.training for part in module.modules())
    assert not any(parameter.requires_grad for parameter in outer.parameters())
    samples = chat_samples(policy)
    torch.testing.assert_close(module(samples).total, module(samples).total, rtol=0, atol=0)
    assert not module(samples).total.requires_grad


def test_scores_do_not_depend_on_the_precision_of_the_training(saved, policy, words) -> None:
    module = rewards(saved(policy), saved(words, "bert"), tokenizer=policy)
    samples = chat_samples(policy)
    plain = module(samples).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(samples).total, plain)
    half = rewards(saved(policy), saved(words, "bert"), tokenizer=policy, dtype="bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    rounded = half(samples).total
    assert not torch.equal(rounded, plain)
    torch.testing.assert_close(rounded, plain, rtol=0.1, atol=0.3)


def test_a_model_without_a_finite_score_is_told_with_the_sample(saved, policy) -> None:
    module = rewards(RewardConfig(model=saved(policy), name="sick"), tokenizer=policy)
    with torch.no_grad():
        module.models[0].score.weight.fill_(math.nan)
    with pytest.raises(UserError, match="reward sick: gave nan.*'which animal jumps'"):
        module(chat_samples(policy))


def test_folders_that_hold_no_reward(saved, policy, words, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with pytest.raises(UserError, match="does not exist"):
        rewards(RewardConfig(model=str(tmp_path / "nowhere")), tokenizer=policy)
    config = AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1, vocab_size=9)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "lm")
    with pytest.raises(UserError, match="reward lm: .*scores texts, but a GPT2LMHeadModel"):
        rewards(str(tmp_path / "lm"), tokenizer=policy)
    bert = saved(words, "bert")
    weights = Path(bert) / "model.safetensors"
    tensors = load_file(weights)
    del tensors["classifier.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"reward \w+: .*lack 1 tensors.*'classifier.weight'"):
        rewards(bert, tokenizer=policy)
    for file in Path(bert).glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        rewards(bert, tokenizer=policy)


# ----- configs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "either a model or a function"),
        ({"model": "a", "function": "regex"}, "either a model or a function"),
        ({"model": "runs/a", "options": {"x": 1}}, "reward a: options are a function's"),
        ({"function": "regex", "label": 0}, "reward regex: a label belongs to a classifier"),
        ({"model": "a", "weight": math.inf}, "reward a: the weight must be a finite number"),
        ({"model": "a", "name": "a/b"}, "reward a/b: a name is a part"),
        ({"model": "a", "name": ""}, "a name is a part"),
    ],
)
def test_configs_that_make_no_sense(fields, words: str) -> None:
    with pytest.raises(UserError, match=words):
        RewardConfig(**fields)


def test_names_come_from_folders_and_functions_and_differ() -> None:
    configs = as_rewards(
        [
            RewardConfig(model="runs/reward/model"),
            RewardConfig(model="../reward/model/"),
            RewardConfig(model="organisation/a reward+model"),
            "package.module:kind",
            RewardConfig(function="own.py:kind"),
            RewardConfig(function="regex", name="kind_2"),
            RewardConfig(model="/model"),
        ]
    )
    names = ["reward", "reward_2", "a-reward-model", "kind", "kind_3", "kind_2", "model"]
    assert reward_names(configs) == names
    with pytest.raises(UserError, match="two rewards have the name 'kind_2'"):
        reward_names([*configs, RewardConfig(function="exact_match", name="kind_2")])


def test_a_text_is_a_folder_a_rule_a_function_or_a_name_on_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "with:colon"
    folder.mkdir()
    models = [str(folder), "organisation/name"]
    functions = ["regex", "own.py:f", "folder/own.py:f", "package.module:f"]
    found = as_rewards([*models, *functions])
    assert [one.model for one in found[:2]] == models
    assert [one.function for one in found[2:]] == functions
    assert as_rewards([{"model": "a", "weight": 2.0}]) == [RewardConfig(model="a", weight=2.0)]
    for text in ("exact_mach", "folder/own.py", ""):
        with pytest.raises(UserError, match=r"no such rule \(exact_match, length_window, regex\)"):
            as_rewards([text])


def test_a_mistake_of_a_function_is_told_before_the_first_sample(policy) -> None:
    config = RewardConfig(function="length_window", options={"longest": -1})
    with pytest.raises(UserError, match="longest must be a whole number"):
        rewards(config, tokenizer=policy)
    with pytest.raises(UserError, match="batch_size"):
        rewards("regex", tokenizer=policy, batch_size=0)


def test_a_sampled_token_that_only_the_policy_has_is_read_as_unknown(saved, policy) -> None:
    """A padding token added to the policy's tokenizer has no row in the reward model."""
    folder = saved(policy)
    other = train_tokenizer(TEXTS, 280)
    other.add_special_tokens({"pad_token": "<|more|>"})
    scorer = ScoringModel("r", folder, tokenizer=other)
    assert scorer.tokenizer is None
    beyond = scorer.model.config.vocab_size
    said = RewardSample("x", "y", [5, 6], [7, beyond], False)
    assert torch.isfinite(scorer([said])).all()
    own = policy.pad_token_id
    assert scorer([said]).item() == pytest.approx(
        scorer([RewardSample("x", "y", [5, 6], [7, own], False)]).item()
    )
