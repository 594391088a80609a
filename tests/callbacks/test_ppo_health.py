"""The watch over PPO in real trainer loops: told, repeated, resumed, stopped."""

import json
import math
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from torch.utils.data import DataLoader

from lit_llm.callbacks.checkpoint import StepCheckpoint
from lit_llm.callbacks.graceful_stop import RunStopped
from lit_llm.callbacks.ppo_health import PPOHealth
from lit_llm.errors import UserError
from lit_llm.evaluation.ppo_health import HealthLimits


class Module(LightningModule):
    """An epoch of two steps is an iteration; its metrics are given."""

    keeps_metrics = True

    def __init__(self, metrics, kill_after=None):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.metrics = metrics  # of an iteration, from 1
        self.kill_after = kill_after
        self.iteration_metrics = {}

    def training_step(self, batch, batch_idx):
        self.iteration_metrics = {
            name: torch.tensor(value) if name == "objective/entropy" else value
            for name, value in self.metrics(self.current_epoch + 1).items()
        }
        return self.layer(batch).sum()

    def on_train_epoch_start(self):
        if self.kill_after is not None and self.current_epoch == self.kill_after:
            raise KeyboardInterrupt

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self):
        return DataLoader(torch.ones(2, 1), batch_size=1)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["metrics"] = dict(self.iteration_metrics)

    def on_load_checkpoint(self, checkpoint):
        if self.keeps_metrics:
            self.iteration_metrics = checkpoint["metrics"]


def trainer_of(folder, *callbacks, epochs=3, **options):
    return Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"devices": 1, "enable_checkpointing": False} | options,
    )


def rows_of(folder):
    return [json.loads(line) for line in (folder / "health.jsonl").read_text().splitlines()]


def seen(folder):
    return [(row["iteration"], row["severity"], row["name"]) for row in rows_of(folder)]


def far(iteration):
    """Past the limit from iteration 3 on: told from three iterations on, at the fourth."""
    return {"objective/kl": 3.0 if iteration < 3 else 50.0, "objective/entropy": 2.0}


def fit(folder, callback, metrics=far, ckpt_path=None, kill_after=None, every=None, **options):
    own = [callback]
    if every:
        own.append(StepCheckpoint(str(folder / "checkpoints"), every_n_steps=every))
        options["enable_checkpointing"] = True
    trainer = trainer_of(folder, *own, **options)
    module = Module(metrics, kill_after)
    trainer.fit(module, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def told(caught):
    return [str(one.message) for one in caught if "PPO health" in str(one.message)]


def test_a_healthy_run_is_silent_and_its_file_empty(tmp_path):
    (tmp_path / "health.jsonl").write_text('{"step": 9}\n')  # of a run that was started over
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, PPOHealth(), lambda iteration: {"objective/kl": 3.0})
    assert told(caught) == []
    assert (tmp_path / "health.jsonl").read_text() == ""


def test_a_diagnosis_is_told_and_written_and_again_after_a_while(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, PPOHealth(repeat_every=3), epochs=9)
    # The median of iterations 1 to 5 is the first that is past the limit: 3 3 50 50 50.
    assert seen(tmp_path) == [(5, "error", "kl_growth"), (8, "error", "kl_growth")]
    first, second = rows_of(tmp_path)
    assert first["step"] == 10 and "iterations 1 to 5" in first["text"]
    assert "iterations 4 to 8" in second["text"]
    assert told(caught) == [
        f"PPO health, error kl_growth: {row['text']}" for row in rows_of(tmp_path)
    ]


def test_what_gets_worse_is_told_at_once(tmp_path):
    def metrics(iteration):
        return {"policy/first_ratio_error": 0.01 if iteration < 3 else 0.5}

    with pytest.warns(UserWarning, match="off_policy_start"):
        fit(tmp_path, PPOHealth(), metrics, epochs=5)
    assert seen(tmp_path) == [(1, "warning", "off_policy_start"), (3, "error", "off_policy_start")]


def test_off_does_not_look(tmp_path):
    fit(tmp_path, PPOHealth("off"), lambda _: {"objective/kl": math.nan})
    assert not (tmp_path / "health.jsonl").exists()


def test_limits_are_those_given(tmp_path):
    fit(tmp_path, PPOHealth(limits=HealthLimits(kl=60.0)), epochs=8)
    assert seen(tmp_path) == []


@pytest.mark.filterwarnings("ignore:PPO health")
def test_stop_saves_and_ends_with_one_sentence_and_can_be_gone_on_from(tmp_path):
    with pytest.raises(RunStopped) as stopped:
        fit(tmp_path, PPOHealth("stop"), epochs=9)
    path = tmp_path / "checkpoints" / "step=00000010.ckpt"
    (sentence,) = stopped.value.args
    assert "\n" not in sentence and f"after iteration 5, saved {path}" in sentence
    assert "kl_growth: objective/kl was 50 nats" in sentence and "--resume" in sentence
    assert seen(tmp_path) == [(5, "error", "kl_growth")]
    # As it is: the sixth iteration comes next, and what was told is not told again so soon.
    callback = PPOHealth("warn")
    trainer = fit(tmp_path, callback, ckpt_path=path, epochs=9)
    assert trainer.global_step == 18
    history = callback.state_dict()["history"]
    assert [row["iteration"] for row in history] == list(range(1, 10))
    assert history[0] == {"iteration": 1, "objective/kl": 3.0, "objective/entropy": 2.0}
    assert seen(tmp_path) == [(5, "error", "kl_growth")]
    # With stop it stops where it has not recovered.
    with pytest.raises(RunStopped, match="after iteration 6"):
        fit(tmp_path, PPOHealth("stop"), ckpt_path=path, epochs=9)


@pytest.mark.filterwarnings("ignore:PPO health")
def test_a_warning_stops_nothing_and_nan_is_not_saved(tmp_path):
    def metrics(iteration):
        return {"policy/clipfrac": 0.9, "loss/policy": 1.0 if iteration < 5 else math.nan}

    with pytest.raises(RunStopped, match="after iteration 5 without a checkpoint of it; nan: In"):
        fit(tmp_path, PPOHealth("stop"), metrics, epochs=9)
    assert seen(tmp_path) == [(3, "warning", "clipping"), (5, "error", "nan")]
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.filterwarnings("ignore:PPO health")
@pytest.mark.parametrize(
    ("kill_after", "keeps_metrics"),
    [(4, True), (5, True), (5, False)],  # the iteration before, and that of the diagnosis
)
def test_a_resumed_run_says_what_the_straight_run_says(
    tmp_path, monkeypatch, kill_after, keeps_metrics
):
    """The checkpoint is of an iteration's last step, and older than what was said of it."""
    monkeypatch.setattr(Module, "keeps_metrics", keeps_metrics)

    def run(name, **options):
        fit(tmp_path / name, PPOHealth(repeat_every=3), epochs=9, every=2, **options)

    run("straight")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run("resumed", kill_after=kill_after)
    newest = sorted((tmp_path / "resumed" / "checkpoints").glob("*.ckpt"))[-1]
    assert newest.stem == f"step={2 * kill_after:08d}"
    run("resumed", ckpt_path=newest)
    assert seen(tmp_path / "straight") == [(5, "error", "kl_growth"), (8, "error", "kl_growth")]
    assert seen(tmp_path / "resumed") == seen(tmp_path / "straight")
    if keeps_metrics:  # otherwise the history misses the iteration that was told already
        assert rows_of(tmp_path / "resumed") == rows_of(tmp_path / "straight")


@pytest.mark.filterwarnings("ignore:PPO health")
def test_what_was_told_after_the_checkpoint_gives_way_to_what_is_told_now(tmp_path):
    """The run was killed two iterations after its newest checkpoint."""
    fit(tmp_path, PPOHealth(), epochs=2, every=4)
    state = sorted((tmp_path / "checkpoints").glob("*.ckpt"))[-1]
    assert state.stem == "step=00000004"
    fit(tmp_path, PPOHealth(), ckpt_path=state, epochs=5)
    assert seen(tmp_path) == [(5, "error", "kl_growth")]
    fit(tmp_path, PPOHealth(), lambda _: {"objective/kl": 3.0}, ckpt_path=state, epochs=5)
    assert seen(tmp_path) == []


@pytest.mark.filterwarnings("ignore:PPO health")
def test_two_ranks_stop_together_and_write_once(tmp_path):
    for name, options in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_fork"})):
        with pytest.raises(Exception, match="after iteration 5, saved"):  # of a child: wrapped
            fit(tmp_path / name, PPOHealth("stop"), epochs=9, **options)
        (path,) = (tmp_path / name / "checkpoints").glob("*.ckpt")
        assert torch.load(path, weights_only=True)["epoch"] == 4
    # An iteration of two ranks is one step.
    one, two = ([row | {"step": 0} for row in rows_of(tmp_path / name)] for name in ("one", "two"))
    assert one == two and len(one) == 1


def test_the_command_line_knows_the_limits():
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(PPOHealth, "health")
    config = parser.parse_args(["--health.action", "stop", "--health.limits.kl", "12"])
    callback = parser.instantiate(config).health
    assert callback.action == "stop" and callback.limits == HealthLimits(kl=12.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"action": "halt"}, "action 'halt': use warn, stop or off"),
        ({"repeat_every": 0}, "repeat_every must be at least 1, got 0"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        PPOHealth(**values)
