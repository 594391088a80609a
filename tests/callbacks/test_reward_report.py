"""The report of a reward model in real test loops, on one rank and on two."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from lit_llm.callbacks import reward_report as callbacks
from lit_llm.callbacks.reward_report import RewardReport
from lit_llm.errors import UserError
from lit_llm.evaluation import reward_report
from lit_llm.evaluation.preference_measures import ScoredPairs
from lit_llm.evaluation.reward_verdict import Verdict

COUNT = 12


class Module(LightningModule):
    """Scores a pair by its number: right in every set but for the first pair."""

    def __init__(self, wrong=1) -> None:
        super().__init__()
        self.wrong = wrong
        self.seen: dict[str, list[torch.Tensor]] = {}

    def on_test_epoch_start(self):
        self.seen = {}

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen.setdefault(("test", "ood")[dataloader_idx], []).append(batch)

    @property
    def scored_pairs(self):
        return {name: self.pairs(torch.cat(batches)) for name, batches in self.seen.items()}

    def pairs(self, number):
        if self.trainer.world_size > 1:
            number = self.all_gather(number).flatten().sort().values
        better = torch.where(number < self.wrong, -1.0, 1.0)
        zeros = torch.zeros_like(number)
        return ScoredPairs(
            better, 0 * better, 5 + number, 4 + zeros, zeros, number, zeros, 0 * better
        )

    def on_test_epoch_end(self):
        self.log("test/accuracy", 0.5)


class Data(LightningDataModule):
    source_labels = ("docs",)

    def __init__(self, sets=1, held_out=COUNT) -> None:
        super().__init__()
        self.sets = sets
        self.asked = []
        self.ood_sources = ["second"] * (sets - 1)
        pairs = [held_out, 0, *[1000] * (sets - 1)]  # of sources, of val_sources, of the second set
        counts = [SimpleNamespace(splits={"test": {"pairs": own}}) for own in pairs]
        self.cache = SimpleNamespace(counts=counts)

    def test_dataloader(self):
        loaders = [DataLoader(torch.arange(COUNT), batch_size=4) for _ in range(self.sets)]
        return loaders if self.sets > 1 else loaders[0]

    def train_pair_lengths(self):
        return torch.tensor([[3, 9], [2, 8], [9, 3]])

    def pair_about(self, source, split, row):
        self.asked.append((source, split, row))
        texts = ["good", f"bad {row}"]
        return {"prompt": "Why?", "answers": texts, "pairs": [[0, 1]], "kinds": None}


def trainer_of(tmp_path, callback, steps=1, **options):
    trainer = Trainer(
        default_root_dir=tmp_path,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"devices": 1} | options,
    )
    progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
    progress.optimizer.step.total.completed = steps
    assert trainer.global_step == steps
    return trainer


def test_the_test_s_result_holds_the_measures_and_the_folder_the_report(tmp_path):
    data = Data(sets=2)
    trainer = trainer_of(tmp_path, RewardReport(mistakes=1, bins=4))
    results = trainer.test(Module(wrong=3), datamodule=data, verbose=False)
    result = {name: value for one in results for name, value in one.items()}
    for prefix in ("test", "ood"):
        # Wilson's interval of 9 of 12, by scipy.stats.binomtest.
        assert result[f"{prefix}/accuracy_low"] == pytest.approx(0.467695, abs=1e-5)
        assert result[f"{prefix}/accuracy_high"] == pytest.approx(0.911059, abs=1e-5)
        # All differences are 1: one bin, confidence 0.731 against 9 of 12.
        assert result[f"{prefix}/ece"] == pytest.approx(0.75 - 0.7310586, abs=1e-5)
        # Shorter was right more often in training, and never is here.
        assert result[f"{prefix}/length_judge"] == 0
        assert result[f"{prefix}/length_correlation"] > 0
    assert result["test/accuracy"] == 0.5, "the module's own stays"
    page = (tmp_path / "reward_report.md").read_text()
    assert "There are 12 held-out pairs" in page and "bad 0" in page and "bad 1" not in page
    assert (tmp_path / "reward_report.png").exists()
    numbers = json.loads((tmp_path / "reward_report.json").read_text())
    assert numbers["measures"].keys() == {"test", "ood"}
    assert {(source, split) for source, split, _ in data.asked} == {(0, "test")}


@pytest.fixture
def no_picture(monkeypatch):
    """Leave out what takes most of the time."""
    monkeypatch.setattr(reward_report, "plot_reward_report", lambda *_: None)


@pytest.mark.usefixtures("no_picture")
def test_every_test_is_about_its_own_pairs(tmp_path):
    callback, module = RewardReport(), Module(wrong=COUNT)
    trainer = trainer_of(tmp_path, callback)
    accuracy = []
    for module.wrong in (COUNT, 0):
        trainer.test(module, datamodule=Data(), verbose=False)
        numbers = json.loads((tmp_path / "reward_report.json").read_text())
        accuracy.append(numbers["measures"]["test"]["accuracy"]["value"])
        assert numbers["measures"].keys() == {"test"}
    assert accuracy == [0, 1]


@pytest.mark.usefixtures("no_picture")
def test_two_ranks_write_one_report(tmp_path):
    results = []
    for name, options in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_fork"})):
        trainer = trainer_of(tmp_path / name, RewardReport(), **options)
        (result,) = trainer.test(Module(), datamodule=Data(), verbose=False)
        results.append(result)
    assert results[0] == results[1] and len(results[0]) == 6
    one, two = ((tmp_path / name / "reward_report.json").read_text() for name in ("one", "two"))
    assert one == two


def test_without_pairs_there_is_a_warning_and_no_report(tmp_path):
    class Nothing(Module):
        scored_pairs = {}  # noqa: RUF012

    trainer = trainer_of(tmp_path, RewardReport())
    with pytest.warns(UserWarning, match="no held-out pairs were scored"):
        trainer.test(Nothing(), datamodule=Data(), verbose=False)
    assert not list(tmp_path.glob("reward_report*"))


def test_a_model_that_is_not_trained_is_measured_but_not_judged(tmp_path, caplog):
    trainer = trainer_of(tmp_path, RewardReport(), steps=0)
    with caplog.at_level(logging.INFO):
        (result,) = trainer.test(Module(), datamodule=Data(), verbose=False)
    assert "test/ece" in result and "test/accuracy_low" in result
    assert not list(tmp_path.glob("reward_report*"))
    assert "PPO" not in caplog.text


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize(("sets", "limit"), [(1, 2), (2, 2), (2, 1.0)])
def test_a_part_of_the_held_out_pairs_is_told(tmp_path, sets, limit):
    trainer = trainer_of(tmp_path, RewardReport(), limit_test_batches=limit)
    trainer.test(Module(), datamodule=Data(sets), verbose=False)
    page = (tmp_path / "reward_report.md").read_text()
    assert ("- Only 8 of 12 held-out pairs were scored." in page) == (limit == 2)
    assert page.count("Only ") == (limit == 2)


@pytest.mark.usefixtures("no_picture")
def test_the_verdict_is_printed_with_what_failed(tmp_path, caplog, monkeypatch):
    def told(fit):
        verdict = Verdict(fit, ["It is right.", "It is long."], ["Take care."])
        monkeypatch.setattr(callbacks, "write_reward_report", lambda *_: verdict)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            trainer_of(tmp_path, RewardReport()).test(Module(), datamodule=Data(), verbose=False)
        return caplog.messages

    assert "Reward model: NOT fit to drive PPO\n- It is right.\n- It is long." in told(False)
    assert "Reward model: fit to drive PPO" in told(True)


@pytest.mark.parametrize(("name", "value", "least"), [("mistakes", -1, 0), ("bins", 0, 1)])
def test_impossible_settings_are_refused(name, value, least):
    with pytest.raises(UserError, match=f"{name} must be at least {least}, got {value}"):
        RewardReport(**{name: value})
