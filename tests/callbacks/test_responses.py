"""Responses written down in real trainer loops: few after validations, all at the test."""

import json
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lit_llm.callbacks.checkpoint import StepCheckpoint
from lit_llm.callbacks.responses import Responses
from lit_llm.errors import UserError
from lit_llm.evaluation.responses import EvaluatedResponse


def response(index, score, text="yes", **changes):
    own = EvaluatedResponse(
        index=index,
        prompt=f"ask {index} ⟶",
        response=text,
        length=3,
        stopped=index != 1,
        score=score,
        scores={"rule": score / 2, "judge": 0.25},
        kl=1.5,
        repetition=0.125,
    )
    return replace(own, **changes)


class Module(LightningModule):
    """Evaluates after its last batch, in its own hook, as later as may be; on the first rank."""

    def __init__(self, count=3):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.count = count
        self.evaluated = []
        self.has_baseline = True

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def on_validation_epoch_start(self):
        self.evaluated = []

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch, batch_idx):
        pass

    test_step = validation_step

    def on_validation_epoch_end(self):
        if self.trainer.is_global_zero:
            step = float(self.trainer.global_step)
            self.evaluated = [response(index, step) for index in reversed(range(self.count))]

    def on_test_epoch_end(self):
        if self.trainer.is_global_zero:
            # 1 against 0, 1 against 1, 1 against 2
            pairs = [(i, response(i, float(i), "no")) for i in range(self.count)]
            self.evaluated = [
                response(i, 1.0, baseline=other if self.has_baseline else None)
                for i, other in pairs
            ]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def loader(self):
        return DataLoader(torch.ones(4, 1), batch_size=1)

    train_dataloader = val_dataloader = test_dataloader = loader


def trainer_of(folder, *callbacks, **options):
    defaults = {"max_steps": 4, "val_check_interval": 2, "num_sanity_val_steps": 1, "devices": 1}
    defaults |= {"enable_checkpointing": False}
    return Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **defaults | options,
    )


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_first_responses_are_shown_after_every_validation(tmp_path):
    trainer_of(tmp_path, Responses(count=2)).fit(Module())
    assert rows_of(tmp_path / "responses.jsonl") == [
        {
            "step": step,
            "prompt": f"ask {index} ⟶",
            "response": "yes",
            "score": step,
            "kl": 1.5,
            "length": 3,
            "stopped": index == 0,
        }
        for step in (2, 4)
        for index in (0, 1)
    ]
    assert not (tmp_path / "test_responses.jsonl").exists()


def test_the_test_puts_each_response_beside_the_reference_s(tmp_path):
    module = Module()
    trainer_of(tmp_path, Responses(count=2)).test(module, verbose=False)
    rows = rows_of(tmp_path / "test_responses.jsonl")
    assert [row["index"] for row in rows] == [0, 1, 2], "all of them"
    assert [row["winner"] for row in rows] == ["policy", "tie", "reference"]
    assert rows[2] == {
        "step": 0,
        "index": 2,
        "prompt": "ask 2 ⟶",
        "response": "yes",
        "score": 1.0,
        "kl": 1.5,
        "length": 3,
        "stopped": True,
        "repetition": 0.125,
        "scores": {"rule": 0.5, "judge": 0.25},
        "baseline": "no",
        "baseline_score": 2.0,
        "baseline_scores": {"rule": 1.0, "judge": 0.25},
        "winner": "reference",
    }
    assert not (tmp_path / "responses.jsonl").exists()


def test_a_run_keeps_the_test_before_and_the_test_after(tmp_path):
    module, callback = Module(), Responses()
    trainer = trainer_of(tmp_path, callback, limit_val_batches=0)
    module.has_baseline = False
    trainer.test(module, verbose=False)
    trainer.fit(module)
    module.has_baseline = True
    trainer.test(module, verbose=False)
    rows = rows_of(tmp_path / "test_responses.jsonl")
    assert [row["step"] for row in rows] == [0] * 3 + [4] * 3
    assert [row["winner"] for row in rows] == [None] * 3 + ["policy", "tie", "reference"]
    assert rows[0]["baseline"] is None and rows[0]["baseline_scores"] is None


def test_tables_have_no_hole_after_a_resume(tmp_path):
    """The checkpoint of step 2 is older than its validation, which is not repeated."""

    def run(module, max_steps=4, **options):
        saving = StepCheckpoint(str(tmp_path / "checkpoints"), every_n_steps=2)
        own = {"enable_checkpointing": True, "max_steps": max_steps}
        trainer = trainer_of(tmp_path, Responses(count=1), saving, **own)
        if not options:
            trainer.test(module, verbose=False)
        trainer.fit(module, weights_only=True, **options)
        trainer.test(module, verbose=False)

    run(Module())
    names = ("responses.jsonl", "test_responses.jsonl")
    straight = [rows_of(tmp_path / name) for name in names]
    assert [[row["step"] for row in rows] for rows in straight] == [[2, 4], [0, 0, 0, 4, 4, 4]]
    run(Module(), ckpt_path=tmp_path / "checkpoints" / "step=00000002.ckpt")
    assert [rows_of(tmp_path / name) for name in names] == straight
    # A run that was over goes on: its last test stays.
    run(Module(), max_steps=6, ckpt_path=tmp_path / "checkpoints" / "step=00000004.ckpt")
    longer = [[row["step"] for row in rows_of(tmp_path / name)] for name in names]
    assert longer == [[2, 4, 6], [0, 0, 0, 4, 4, 4, 6, 6, 6]]


def test_none_are_shown_and_none_need_be_there(tmp_path):
    trainer_of(tmp_path, Responses(count=0)).fit(Module())
    trainer = trainer_of(tmp_path, Responses())
    trainer.fit(Module(count=0))
    trainer.test(Module(count=0), verbose=False)
    assert not list(tmp_path.glob("*.jsonl"))


def test_the_first_of_two_ranks_writes(tmp_path):
    callback = Responses()
    options = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    trainer_of(tmp_path, callback, max_steps=2, **options).fit(Module())
    assert [row["prompt"] for row in rows_of(tmp_path / "responses.jsonl")] == [
        f"ask {index} ⟶" for index in range(3)
    ]


def test_an_impossible_setting_is_refused():
    with pytest.raises(UserError, match="count must be at least 0, got -1"):
        Responses(count=-1)
