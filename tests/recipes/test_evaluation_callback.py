"""An evaluation during training: what it logs and writes, and that training does not notice it."""

import csv
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import sft
import torch
from safetensors.torch import load_file

from lit_llm.callbacks.evaluation import EvaluationCallback
from lit_llm.errors import UserError
from lit_llm.evaluation.settings import EvaluationSettings
from lit_llm.modules.reward import RewardModule
from tests.evaluation.tiny_models import model
from tests.recipes.sft_runs import arguments

CALLBACK = "--trainer.callbacks+=lit_llm.callbacks.evaluation.EvaluationCallback"


def settings(tiny_chat: Path, tiny: Path, every: int = 4) -> list[str]:
    """Texts, questions and an embedded task, few of each."""
    given = {
        "suite": "[]",
        "tasks": "[piqa,commonsense_qa_cloze]",
        "data_dir": str(tiny_chat / "eval"),
        "limit": "5",
        "texts": f"[birds={tiny / 'first.jsonl'}]",
        "max_texts": "21",
        "prompts": f"[{tiny_chat / 'first.jsonl'}]",
        "num_prompts": "3",
        "max_new_tokens": "4",
    }
    own = [f"--trainer.callbacks.settings.{name}={value}" for name, value in given.items()]
    return [CALLBACK, f"--trainer.callbacks.every_n_steps={every}", *own]


@pytest.fixture(scope="module")
def task_file(tiny_chat: Path) -> None:
    """Six questions in the layout of the tasks' folder."""
    (tiny_chat / "eval").mkdir(exist_ok=True)
    rows = [{"goal": f"box {n}", "sol1": "red", "sol2": "a tree", "label": 0} for n in range(6)]
    path = tiny_chat / "eval" / "piqa_valid.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    choices = [{"label": label, "text": "a tree " * 300} for label in "ABCDE"]  # fits no model here
    row = {"question": {"stem": "What?", "choices": choices}, "answerKey": "A"}
    (tiny_chat / "eval" / "commonsense_qa_dev.jsonl").write_text(json.dumps(row) + "\n")


TOLD: list[str] = []
"""What the runs warned of."""


@pytest.fixture(scope="module")
def runs(task_file, tiny_chat: Path, tiny: Path, tmp_path_factory) -> tuple[Path, Path]:
    """A run with the callback, and the same without."""
    plain, watched = (tmp_path_factory.mktemp(name) for name in ("plain", "watched"))
    for folder, more in ((plain, []), (watched, settings(tiny_chat, tiny))):
        export = f"--export_dir={folder / 'model'}"
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            sft.main(arguments(tiny_chat, folder, export, *more))
        TOLD.extend(str(one.message) for one in told)
    return plain, watched


def logged(folder: Path) -> dict[int, dict[str, float]]:
    """What the CSV has of each step."""
    found: dict[int, dict[str, float]] = {}
    with (folder / "metrics" / "version_0" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            values = {name: float(value) for name, value in row.items() if value}
            found.setdefault(int(values["step"]), {}).update(values)
    return found


def test_training_does_not_notice(runs: tuple[Path, Path]) -> None:
    """Dropout is on: one random number more would give other weights."""
    plain, watched = (load_file(folder / "model" / "model.safetensors") for folder in runs)
    assert plain.keys() == watched.keys()
    for name, weights in plain.items():
        assert torch.equal(weights, watched[name]), name


def test_it_is_logged_like_other_metrics(runs: tuple[Path, Path]) -> None:
    steps = logged(runs[1])
    due = [step for step, values in steps.items() if "eval/birds/perplexity" in values]
    assert len(due) == 3  # after 4, 8 and 12 steps
    for step in due:
        names = {name for name in steps[step] if name.startswith("eval/")}
        assert {"eval/piqa/acc", "eval/birds/bits_per_byte", "eval/first-questions/words"} <= names
    assert not any(name.startswith("eval/") for step in logged(runs[0]).values() for name in step)


def test_the_last_number_is_that_of_the_exported_model(runs, tiny_chat, tiny, tmp_path) -> None:
    import evaluate

    args = [str(runs[1] / "model"), "--suite=none", "--prompts=none", "--logging.wandb=off"]
    args += [f"--texts=birds={tiny / 'first.jsonl'}", "--max_texts=21"]
    evaluate.main([*args, f"--output_dir={tmp_path}"])
    kept = json.loads((tmp_path / "watched0" / "results" / "birds.json").read_text())
    values = {own["metric"]: own["value"] for own in kept["measurements"]}
    last = [step for step in logged(runs[1]).values() if "eval/birds/perplexity" in step][-1]
    assert last["eval/birds/perplexity"] == pytest.approx(values["perplexity"], rel=1e-5)


def test_answers_are_kept_by_step(runs: tuple[Path, Path]) -> None:
    lines = (runs[1] / "evaluation_answers.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [4] * 3 + [8] * 3 + [12] * 3
    assert {row["task"] for row in rows} == {"first-questions"}
    assert len({row["item"] for row in rows}) == 3


def test_a_mistake_is_told_before_the_first_step(tiny_chat, tmp_path, capsys) -> None:
    more = [CALLBACK, "--trainer.callbacks.every_n_steps=4"]
    more += ["--trainer.callbacks.settings.suite=[qick]"]
    with pytest.raises(SystemExit):
        sft.main(arguments(tiny_chat, tmp_path, *more))
    assert "unknown suite 'qick'; the nearest are quick" in capsys.readouterr().err
    assert not list(tmp_path.glob("checkpoints/*.ckpt"))


def test_a_task_without_room_is_skipped_and_told_once(runs: tuple[Path, Path]) -> None:
    """It is named, but a run shall not end at its hundredth step for that."""
    told = [line for line in TOLD if "commonsense_qa_cloze" in line]
    assert len(told) == 1 and "the model reads at most" in told[0]


def test_what_cannot_be_evaluated_is_told_before_the_first_step() -> None:
    callback = EvaluationCallback(4)
    reward = RewardModule.__new__(RewardModule)
    with pytest.raises(UserError, match="a reward model scores texts"):
        callback.on_fit_start(SimpleNamespace(datamodule=None), reward)
    with pytest.raises(UserError, match="needs a data module with a tokenizer"):
        callback.on_fit_start(SimpleNamespace(), SimpleNamespace())
    trainer = SimpleNamespace(datamodule=SimpleNamespace(tokenizer=object()))
    wide = EvaluationCallback(4, EvaluationSettings(suite=[], window=128))
    with pytest.raises(UserError, match="window 128 exceeds the 64 positions of the model"):
        wide.on_fit_start(trainer, SimpleNamespace(model=model(positions=64)))
