"""Choosing a checkpoint: the newest whole one, and a clear word when it is not."""

import os
from pathlib import Path

import pytest
import torch
import yaml

from lit_llm.errors import UserError
from lit_llm.strategies.checkpoint_io import AtomicCheckpointIO, read_checkpoint
from lit_llm.strategies.resume import check_settings, find_checkpoint


def _write(folder: Path, step: int) -> Path:
    path = folder / f"step={step:08d}.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.arange(9999.0)}}, path)
    return path


def _cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def test_the_newest_is_chosen_and_its_tensors_are_right(tmp_path: Path) -> None:
    _write(tmp_path, 5)
    newest = _write(tmp_path, 40)
    assert find_checkpoint(tmp_path, "auto") == newest
    assert torch.equal(read_checkpoint(newest)["state_dict"]["w"], torch.arange(9999.0))
    assert find_checkpoint(tmp_path, "never") is None
    assert find_checkpoint(tmp_path / "absent", "auto") is None


def test_a_truncated_one_is_refused_and_the_one_before_offered(tmp_path: Path) -> None:
    whole = _write(tmp_path, 5)
    _cut(_write(tmp_path, 10))
    _cut(_write(tmp_path, 20))
    with pytest.raises(UserError, match=r"step=00000020.ckpt is cut off .*") as caught:
        find_checkpoint(tmp_path, "auto")
    assert f"--resume {whole}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_whole_one_says_how_to_start_over(tmp_path: Path) -> None:
    _cut(_write(tmp_path, 5))
    with pytest.raises(UserError, match="--resume never"):
        find_checkpoint(tmp_path, "auto")


def test_a_missing_path_and_a_foreign_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint at"):
        find_checkpoint(tmp_path, str(tmp_path / "absent.ckpt"))
    other = tmp_path / "other.ckpt"
    torch.save({"weights": 1}, other)
    with pytest.raises(UserError, match="no Lightning checkpoint"):
        find_checkpoint(tmp_path, str(other))


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/harm",)

    path = tmp_path / "step=00000001.ckpt"
    torch.save({"state_dict": {}, "extra": Harmful()}, path)
    with pytest.raises(UserError):
        read_checkpoint(path)
    assert not (tmp_path / "harm").exists()


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path, 5)
    before = path.read_bytes()

    def fail(checkpoint: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, path)
    assert path.read_bytes() == before
    assert find_checkpoint(tmp_path, "auto") == path


def test_settings_that_matter_are_compared(tmp_path: Path) -> None:
    settings = {
        "output_dir": "a",
        "model": {"optimizer": {"init_args": {"lr": 1e-3}}},
        "trainer": {"devices": 1, "max_steps": 10, "log_every_n_steps": 5},
    }
    path = tmp_path / "config.yaml"
    check_settings(path, settings)
    path.write_text(yaml.safe_dump(settings))
    settings["output_dir"] = "b"
    settings["trainer"] |= {"devices": 2, "log_every_n_steps": 1}  # type: ignore[operator]
    check_settings(path, settings)
    settings["model"]["optimizer"]["init_args"]["lr"] = 3e-3  # type: ignore[index]
    with pytest.raises(UserError, match=r"init_args.lr: 0.001 there, 0.003 now"):
        check_settings(path, settings)


def test_what_is_only_tested_may_change_and_what_takes_from_training_not(tmp_path: Path) -> None:
    data = {"ood_sources": [{"path": "a"}], "val_micro_batch_size": 1, "val_fraction": 0.1}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"data": {**data, "val_sources": None}}))
    data |= {"ood_sources": None, "val_micro_batch_size": 2, "val_sources": None}
    check_settings(path, {"data": data})
    for change in ({"val_fraction": 0.2}, {"val_sources": [{"path": "b"}]}):
        with pytest.raises(UserError, match=f"data.{next(iter(change))}: "):
            check_settings(path, {"data": data | change})


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"micro": 2, "accumulate": 4, "devices": 1}, True),
        ({"micro": 4, "accumulate": 2, "devices": 1}, True),
        ({"micro": 1, "accumulate": 1, "devices": 4, "num_nodes": 2}, True),
        ({"micro": 2, "accumulate": 4, "devices": 2, "strategy": "tensor_parallel"}, True),
        ({"micro": 2, "accumulate": 2, "devices": 1}, False),  # half of the batch
        ({"micro": 2, "accumulate": 4, "devices": 2}, False),  # twice of it
        ({"micro": 2, "accumulate": 4, "devices": "auto"}, False),  # who knows
    ],
)
def test_the_same_batch_in_other_portions_is_the_same_run(tmp_path, changes, same):
    def settings(micro, accumulate, devices, **trainer):
        trainer |= {"accumulate_grad_batches": accumulate, "devices": devices}
        return {"data": {"micro_batch_size": micro}, "trainer": trainer}

    before = settings(2, 2, 2, strategy="ddp")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(before))
    if same:
        check_settings(tmp_path / "config.yaml", settings(**changes))
        return
    with pytest.raises(UserError, match="other settings"):
        check_settings(tmp_path / "config.yaml", settings(**changes))
