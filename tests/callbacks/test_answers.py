"""Held-out questions answered in real trainer loops, on one rank and on two."""

import json
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from lit_llm.callbacks.answers import SampleAnswers
from lit_llm.data.tokenizer import train_tokenizer
from lit_llm.errors import UserError
from lit_llm.models.build import build_model
from lit_llm.models.config import BaseModelConfig

LENGTH = 6


class Question(NamedTuple):
    prompt_ids: list[int]
    prompt: str
    reference: str
    answer_format: str | None


class Module(LightningModule):
    """A tiny model that does not change."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "initializer_range": 0.4,
        }
        self.model: Any = build_model(
            BaseModelConfig(config=config, dropout=0.1), vocab_size=vocab_size, seq_len=64
        )

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.model(input_ids=batch, labels=batch).loss)

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.model(input_ids=batch, labels=batch).loss)

    def on_validation_epoch_end(self):
        self.log("val/other", 1.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Data(LightningDataModule):
    def __init__(self, tokenizer, questions, stops=()) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.pad_token_id = tokenizer.pad_token_id
        self.stop_token_ids = list(stops)
        self.questions = questions
        self.asked: list[tuple[str, int]] = []

    def heldout_questions(self, split, count):
        self.asked.append((split, count))
        return self.questions[split][:count]

    def loader(self):
        return DataLoader(torch.arange(4, 20).view(4, 4), batch_size=1)

    train_dataloader = val_dataloader = test_dataloader = loader


@torch.no_grad()
def greedy(model, prompt):
    """The most likely tokens, all of the text read anew each time."""
    model.eval()
    ids = list(prompt)
    for _ in range(LENGTH):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture
def parts():
    """Module, data, and what the model answers: the first of four answers stops by itself."""
    tokenizer = train_tokenizer(["the red bird sings"] * 5, vocab_size=280)
    module = Module(len(tokenizer))
    texts = ["the red", "bird", "sings the bird", "red red red"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    ids = [greedy(module.model, prompt) for prompt in prompts]
    stop = ids[0][3]
    answers = []
    for row in ids:
        end = row.index(stop) if stop in row else None
        answers.append((tokenizer.decode(row[:end]), end is not None))
    assert [stopped for _, stopped in answers].count(True) in (1, 2, 3)
    # The references are the answers themselves but for one, which shares no word with its answer.
    questions = [
        Question(prompt, text, answer if number else "nothing of it", None)
        for number, (prompt, text, (answer, _)) in enumerate(
            zip(prompts, texts, answers, strict=True)
        )
    ]
    data = Data(tokenizer, {"validation": questions[:3], "test": questions}, [stop])
    return module, data, answers


def trainer_of(tmp_path, callback, **options):
    return Trainer(
        default_root_dir=tmp_path,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"devices": 1} | options,
    )


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_same_questions_are_answered_at_every_validation(parts, tmp_path):
    module, data, answers = parts
    callback = SampleAnswers(count=2, max_new_tokens=LENGTH)
    options = {"max_steps": 4, "val_check_interval": 2, "num_sanity_val_steps": 1}
    trainer = trainer_of(tmp_path, callback, **options)
    trainer.fit(module, datamodule=data)
    assert data.asked == [("validation", 2)] * 2, "the check before training is left out"
    rows = rows_of(tmp_path / "answers.jsonl")
    assert rows == [
        {
            "step": step,
            "question": question.prompt,
            "answer": text,
            "reference": question.reference,
            "stopped": stopped,
        }
        for step in (2, 4)
        for question, (text, stopped) in zip(
            data.questions["validation"][:2], answers[:2], strict=True
        )
    ]
    assert not (tmp_path / "test_answers.jsonl").exists()
    metrics = trainer.callback_metrics
    assert metrics["val/stop_rate"] == sum(stopped for _, stopped in answers[:2]) / 2
    assert 0 <= metrics["val/well_formed_rate"] <= metrics["val/stop_rate"]
    # F is 0 for the first, and 1 for the second where it holds a word.
    assert metrics["val/rouge_l"] == float(any(c.isalnum() for c in answers[1][0])) / 2
    assert metrics["val/other"] == 1.0


def test_the_test_s_result_holds_the_measures_and_each_evaluation_its_rows(parts, tmp_path):
    module, data, answers = parts
    callback = SampleAnswers(count=0, test_count=3, max_new_tokens=LENGTH, batch_size=2)
    trainer = trainer_of(tmp_path, callback, max_steps=4, limit_val_batches=0)
    for _ in range(2):  # again at the same step: the rows are replaced
        (result,) = trainer.test(module, datamodule=data, verbose=False)
        assert result["test/stop_rate"] == pytest.approx(sum(s for _, s in answers[:3]) / 3)
        assert {"test/well_formed_rate", "test/rouge_l", "test/loss"} <= result.keys()
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    rows = rows_of(tmp_path / "test_answers.jsonl")
    assert [row["step"] for row in rows] == [0] * 3 + [4] * 3
    assert [row["answer"] for row in rows] == [text for text, _ in answers[:3]] * 2
    assert not (tmp_path / "answers.jsonl").exists()


def test_a_format_and_a_special_token_decide_what_is_well_formed(parts, tmp_path):
    module, data, _ = parts
    tokenizer = data.tokenizer
    # A model that says <|im_start|> and then stops; the stop token itself is no part of the answer.
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    said = iter([start, end])

    def generate(**inputs):
        return torch.cat([inputs["input_ids"], torch.tensor([[next(said), next(said)]])], dim=1)

    module.model.generate = generate
    data.stop_token_ids = [end]
    trainer = trainer_of(tmp_path, SampleAnswers(test_count=1, max_new_tokens=LENGTH))
    (result,) = trainer.test(module, datamodule=data, verbose=False)
    assert result["test/stop_rate"] == 1 and result["test/well_formed_rate"] == 0
    assert rows_of(tmp_path / "test_answers.jsonl")[0]["answer"] == "<|im_start|>"
    said = iter([tokenizer("7")["input_ids"][0], end] * 2)
    for pattern, rate in ((r"\d", 1), (r"\d\d", 0)):
        data.questions["test"][0] = data.questions["test"][0]._replace(answer_format=pattern)
        (result,) = trainer.test(module, datamodule=data, verbose=False)
        assert result["test/well_formed_rate"] == rate


def test_rows_go_on_after_a_resume_and_random_numbers_stay(parts, tmp_path):
    module, data, _ = parts
    callback = SampleAnswers(count=1, max_new_tokens=LENGTH, temperature=1.0)
    old = [3, "q", "a", "r", True]
    state = {"rows": [old, [9, "q", "b", "r", True]], "test_rows": [[0, "t", "a", "r", False]]}
    callback.load_state_dict(state)
    logged = {}
    module = SimpleNamespace(model=module.model.train(), log=logged.__setitem__)
    trainer = SimpleNamespace(
        datamodule=data,
        sanity_checking=False,
        global_step=9,
        global_rank=0,
        world_size=1,
        is_global_zero=True,
        default_root_dir=tmp_path,
        loggers=[],
    )
    before = torch.get_rng_state()
    callback.on_validation_epoch_end(trainer, module)
    assert torch.equal(torch.get_rng_state(), before) and module.model.training
    first = callback.state_dict()
    assert first["rows"][0] == old and [row[0] for row in first["rows"]] == [3, 9]
    assert first["test_rows"] == state["test_rows"]
    callback.on_validation_epoch_end(trainer, module)
    assert callback.state_dict() == first, "the same step is sampled with the same seed"
    assert logged.keys() == {"val/stop_rate", "val/well_formed_rate", "val/rouge_l"}


@pytest.mark.parametrize("count", [1, 3])  # fewer questions than ranks, and an odd number
def test_two_ranks_share_the_questions(parts, tmp_path, count):
    module, data, answers = parts
    results = []
    for name, options in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_fork"})):
        callback = SampleAnswers(test_count=count, max_new_tokens=LENGTH)
        trainer = trainer_of(tmp_path / name, callback, use_distributed_sampler=False, **options)
        (result,) = trainer.test(module, datamodule=data, verbose=False)
        results.append({key: value for key, value in result.items() if key != "test/loss"})
    assert results[1] == results[0] and len(results[0]) == 3
    one, two = (tmp_path / name / "test_answers.jsonl" for name in ("one", "two"))
    assert two.read_text() == one.read_text()
    assert [row["answer"] for row in rows_of(two)] == [text for text, _ in answers[:count]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": -1}, "count must be at least 0, got -1"),
        ({"test_count": -1}, "test_count must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must be 0"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        SampleAnswers(**values)
