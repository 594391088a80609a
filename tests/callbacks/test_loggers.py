"""Which loggers a run gets, and an offline W&B run that can be read back."""

import json
import subprocess
import sys
from pathlib import Path

import pretrain
import pytest

from lit_llm.callbacks.loggers import LoggingConfig, build_loggers, wandb_logged_in


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A machine where nobody is logged in."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def names(loggers):
    return [type(logger).__name__ for logger in loggers]


def test_offline_unless_logged_in(nobody, tmp_path, monkeypatch):
    assert not wandb_logged_in()
    loggers = build_loggers(LoggingConfig(), tmp_path)
    assert names(loggers) == ["CSVLogger", "WandbLogger"]
    assert loggers[1]._offline
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    assert wandb_logged_in()
    assert not build_loggers(LoggingConfig(), tmp_path)[1]._offline
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert build_loggers(LoggingConfig("online"), tmp_path)[1]._offline


def test_off_and_tensorboard(nobody, tmp_path):
    loggers = build_loggers(LoggingConfig("off", tensorboard=True), tmp_path)
    assert names(loggers) == ["CSVLogger", "TensorBoardLogger"]


def test_a_resumed_run_stays_one_offline_run_with_its_table(tiny, tmp_path, monkeypatch):
    """The files are those that ``wandb sync`` reads: metrics, the samples' table, one run id."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = [
        f"--config={tiny / 'tiny.yaml'}",
        f"--output_dir={tmp_path}",
        "--logging.wandb=offline",
    ]
    pretrain.main([*first, "--trainer.max_steps=4"])
    import wandb

    assert wandb.run is None, "the run is over, so that the next stage gets one of its own"
    checkpoint = next((tmp_path / "checkpoints").glob("step=00000004.ckpt"))
    pretrain.main([*first, f"--resume={checkpoint}"])
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1, "a resumed run must keep its id"
    written = b"".join(file.read_bytes() for file in files)
    for key in (b"train/loss", b"val/perplexity", b"perf/tokens_per_s", b"samples"):
        assert key in written
    command = [str(Path(sys.executable).with_name("wandb")), "sync", "--dry-run"]
    answer = subprocess.run(
        [*command, *(str(file.parent.resolve()) for file in files)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "Would sync 2 run(s)" in answer.stdout + answer.stderr
    tables = list(Path(tmp_path).glob("wandb/offline-run-*/files/media/table/samples*.json"))
    assert tables
    newest = max(tables, key=lambda path: len(path.read_text()))
    table = json.loads(newest.read_text())
    assert table["columns"] == ["step", "prompt", "continuation"]
    assert {row[0] for row in table["data"]} == {4, 8, 12}, "the table grows over a resume"
