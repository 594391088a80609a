"""Questions that models answer: which they are, how they are asked, what is measured."""

import json

import pytest
import torch

from lit_llm.data.splits import assign_split
from lit_llm.errors import UserError
from lit_llm.evaluation.questions import answer_questions, read_questions


@pytest.fixture(scope="module")
def lm():
    """A random model with a tokenizer of ours."""
    from lit_llm.data.tokenizer import train_tokenizer
    from lit_llm.evaluation.harness_model import HarnessModel
    from lit_llm.models import BaseModelConfig, build_model, vocabulary_of

    tokenizer = train_tokenizer(["say one two three four five?"] * 4, vocab_size=280)
    torch.manual_seed(0)
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = build_model(BaseModelConfig(config=config), seq_len=64, **vocabulary_of(tokenizer))
    return HarnessModel(model.eval(), tokenizer)


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "asked.jsonl"
    rows = [{"prompt": f"say {word}?", "answer": word} for word in "one two three four".split()]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    return path


def test_the_same_question_is_asked_once_and_the_same_ones_are_drawn(asked):
    name, all_of_them = read_questions(str(asked), 10)
    assert name == "asked-questions"
    assert sorted(question.text for question in all_of_them) == [
        "say four?",
        "say one?",
        "say three?",
        "say two?",
    ]
    _, drawn = read_questions(f"mine={asked}", 2)
    assert [q.item for q in drawn] == [q.item for q in all_of_them[:2]]
    draws = {tuple(q.text for q in read_questions(str(asked), 2, seed=n)[1]) for n in range(12)}
    assert len(draws) > 3


@pytest.mark.thorough  # seconds to collect
def test_of_what_is_embedded_the_held_out_questions_are_asked():
    name, questions = read_questions("python-docs", 20)
    assert name == "python-docs-questions" and len(questions) == 20
    assert {assign_split(question.record.group) for question in questions} == {"test"}


def test_a_source_that_asks_nothing_is_refused(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "assistant", "content": "Yes."}]}) + "\n")
    with pytest.raises(UserError, match="holds no question"):
        read_questions(str(path), 3)


def test_answers_are_those_of_transformers(lm, asked):
    """Greedy decoding of each prompt by itself, through our template, as transformers does it."""
    _, questions = read_questions(str(asked), 4)
    answers, found = answer_questions(lm, "asked", questions, max_new_tokens=6)
    assert lm.tokenizer.chat_template is None or "assistant" in lm.tokenizer.chat_template
    measured = {own.metric: own for own in found}
    total, tokens = 0.0, 0
    for question, answer in zip(questions, answers, strict=True):
        text = f"<|im_start|>user\n{question.text}<|im_end|>\n<|im_start|>assistant\n"
        ids = lm.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        stops = lm.tokenizer.convert_tokens_to_ids(["<|im_end|>", lm.tokenizer.eos_token])
        output = lm.model.generate(
            ids, max_new_tokens=6, do_sample=False, eos_token_id=stops, pad_token_id=0
        )
        new = output[0, ids.shape[1] :]
        kept = [int(token) for token in new if int(token) not in stops]
        assert answer.answer == lm.tokenizer.decode(kept)
        assert answer.stopped == (int(new[-1]) in stops)
        with torch.no_grad():
            log_probs = lm.model(output).logits.log_softmax(-1)
        steps = log_probs[0, ids.shape[1] - 1 : -1].gather(1, new[:, None])
        total, tokens = total - float(steps.sum()), tokens + len(new)
    assert measured["self_perplexity"].value == pytest.approx(
        float(torch.tensor(total / tokens).exp()), rel=1e-4
    )
    assert measured["rouge_l"].count == 4
    assert "well_formed_rate" not in measured  # the data names no form


def test_items_are_the_same_for_every_model(lm, asked):
    _, questions = read_questions(str(asked), 4)
    answers, found = answer_questions(lm, "asked", questions, max_new_tokens=2)
    assert [answer.item for answer in answers] == [question.item for question in questions]
    items = next(own.items for own in found if own.metric == "rouge_l")
    assert items.keys == [question.item for question in questions]
