"""An evaluation that is killed goes on where it was, to the same numbers and answers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def command(model: Path, texts: list[Path], asked: Path, output: Path) -> list[str]:
    """Several texts, one after the other, and questions."""
    named = [f"part{number}={path}" for number, path in enumerate(texts)]
    given = ["--suite=none", "--texts", *named, "--batch_tokens=128", f"--prompts={asked}"]
    given += ["--max_new_tokens=8", f"--output_dir={output}", "--logging.wandb=off"]
    return [sys.executable, str(ROOT / "recipes" / "evaluate.py"), str(model), *given]


def without_times(value: Any) -> Any:
    """The numbers of a report but for how long they took, and the command."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in ("seconds", "command")}
        return {name: without_times(own) for name, own in kept.items()}
    return [without_times(own) for own in value] if isinstance(value, list) else value


@pytest.mark.thorough
def test_a_killed_evaluation_goes_on(tiny: Path, tiny_chat: Path, tmp_path: Path) -> None:
    lines = (tiny / "first.jsonl").read_text().splitlines(keepends=True)
    texts = [tmp_path / f"{number}.jsonl" for number in range(8)]
    for number, path in enumerate(texts):
        path.write_text("".join(lines[number * 50 : number * 50 + 50]))
    run = command(tiny_chat / "model", texts, tiny_chat / "first.jsonl", tmp_path / "whole")
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    run = command(tiny_chat / "model", texts, tiny_chat / "first.jsonl", tmp_path / "killed")
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL)
    done = tmp_path / "killed" / "tiny_chat0" / "results"
    while not (done / "part1.json").exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (done / "part7.json").exists()
    told = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert 2 <= told.count("(as before)") < 9
    reports = [
        json.loads((tmp_path / name / "evaluation.json").read_text())
        for name in ("whole", "killed")
    ]
    assert without_times(reports[0]) == without_times(reports[1])
    (answers,) = (tmp_path / "whole").rglob("answers/*.jsonl")
    same = tmp_path / "killed" / answers.relative_to(tmp_path / "whole")
    assert answers.read_text() == same.read_text()
