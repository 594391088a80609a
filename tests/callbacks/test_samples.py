"""Sampling continues prompts and leaves no trace in training."""

import json
from types import SimpleNamespace

import pytest
import torch

from lit_llm.callbacks.samples import SampleContinuations
from lit_llm.data.tokenizer import train_tokenizer
from lit_llm.errors import UserError
from lit_llm.models.build import build_model
from lit_llm.models.config import BaseModelConfig


def parts(tmp_path):
    tokenizer = train_tokenizer(["the red bird sings"] * 5, vocab_size=280)
    torch.manual_seed(0)
    model = build_model(
        BaseModelConfig(preset="llama-1m", dropout=0.1), vocab_size=len(tokenizer), seq_len=24
    )
    data = SimpleNamespace(
        tokenizer=tokenizer, heldout_texts=lambda split: iter([" ", "one two three", "four"])
    )
    module = SimpleNamespace(model=model, device=torch.device("cpu"))
    trainer = SimpleNamespace(
        is_global_zero=True,
        datamodule=data,
        sanity_checking=False,
        global_step=7,
        default_root_dir=tmp_path,
        loggers=[],
    )
    return trainer, module


def test_prompts_are_held_out_beginnings_and_nothing_else_changes(tmp_path):
    trainer, module = parts(tmp_path)
    expected = torch.get_rng_state()
    callback = SampleContinuations(max_new_tokens=5)
    callback.on_validation_end(trainer, module)
    assert torch.equal(torch.get_rng_state(), expected)
    assert module.model.training
    rows = callback.state_dict()["rows"]
    assert [row[:2] for row in rows] == [[7, "one two three"], [7, "four"]]
    callback.on_validation_end(trainer, module)
    assert callback.state_dict()["rows"] == rows, "the same step is sampled with the same seed"


def test_rows_go_on_after_a_resume(tmp_path):
    trainer, module = parts(tmp_path)
    callback = SampleContinuations(prompts=["a"], max_new_tokens=2)
    callback.load_state_dict({"rows": [[3, "a", "b"]]})
    callback.on_validation_end(trainer, module)
    assert [row[0] for row in callback.state_dict()["rows"]] == [3, 7]


def test_the_check_before_training_is_not_sampled(tmp_path):
    trainer, module = parts(tmp_path)
    trainer.sanity_checking = True
    callback = SampleContinuations()
    callback.on_validation_end(trainer, module)
    assert callback.state_dict()["rows"] == []


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match="prompt"):
        SampleContinuations(prompts=["a", ""])


def test_a_continuation_is_the_model_s_up_to_the_end_of_the_text(tmp_path):
    trainer, module = parts(tmp_path)
    tokenizer = trainer.datamodule.tokenizer
    prompt = ids = tokenizer("the red")["input_ids"]
    module.model.eval()
    with torch.no_grad():
        for _ in range(5):
            logits = module.model(input_ids=torch.tensor([ids])).logits[0, -1]
            ids = [*ids, int(logits.argmax())]
    said = ids[len(prompt) :]
    texts = []
    for end in (tokenizer.eos_token, tokenizer.convert_ids_to_tokens(said[2])):
        tokenizer.eos_token = end
        callback = SampleContinuations(prompts=["the red"], max_new_tokens=5, temperature=0)
        callback.on_validation_end(trainer, module)
        texts.append(callback.state_dict()["rows"][0][2])
    # The end itself is shown, so that a model that ends its texts can be told from one that cannot.
    assert texts == [tokenizer.decode(said), tokenizer.decode(said[: said.index(said[2]) + 1])]
    row = json.loads((tmp_path / "samples.jsonl").read_text())
    assert row == {"step": 7, "prompt": "the red", "continuation": texts[1]}


def test_a_setting_that_cannot_work_is_refused_before_training():
    with pytest.raises(UserError, match="temperature"):
        SampleContinuations(temperature=-1.0)
    SampleContinuations(max_new_tokens=0)  # turns it off
