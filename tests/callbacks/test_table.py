"""A table that grows over a run, and over a resume."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lit_llm.callbacks.table import GrowingTable


def trainer(folder: Path, step: int) -> Any:
    return SimpleNamespace(default_root_dir=str(folder), global_step=step, loggers=[])


def rows(folder: Path) -> list[list[Any]]:
    lines = (folder / "t.jsonl").read_text().splitlines()
    return [[json.loads(line)["step"], json.loads(line)["text"]] for line in lines]


def test_rows_of_a_step_replace_those_it_had(tmp_path: Path) -> None:
    table = GrowingTable("t", ["text"])
    table.put(trainer(tmp_path, 2), [["a"], ["b"]])
    table.put(trainer(tmp_path, 4), [["c"]])
    table.put(trainer(tmp_path, 4), [["d"]])
    assert rows(tmp_path) == [[2, "a"], [2, "b"], [4, "d"]]


def test_a_resumed_run_keeps_what_was_written_after_its_checkpoint_and_nothing_later(
    tmp_path: Path,
) -> None:
    before = GrowingTable("t", ["text"])
    before.put(trainer(tmp_path, 2), [["a"]])
    saved = list(before.rows)  # the checkpoint of step 4 comes before its validation
    before.put(trainer(tmp_path, 4), [["b"]])
    before.put(trainer(tmp_path, 6), [["given up"]])
    after = GrowingTable("t", ["text"])
    after.rows = saved
    after.take_over(trainer(tmp_path, 4))
    after.put(trainer(tmp_path, 6), [["c"]])
    assert rows(tmp_path) == [[2, "a"], [4, "b"], [6, "c"]]


def test_a_run_without_a_file_has_nothing_to_take_over(tmp_path: Path) -> None:
    table = GrowingTable("t", ["text"])
    table.take_over(trainer(tmp_path, 4))
    assert table.rows == []


def test_answers_may_hold_any_line_separator(tmp_path: Path) -> None:
    """U+2028 and U+0085 end a line for str.splitlines, and not for JSON."""
    before = GrowingTable("answers", ["answer"])
    before.put(trainer(tmp_path, 2), [["one\u2028two\u0085three\nfour"]])
    after = GrowingTable("answers", ["answer"])
    after.take_over(trainer(tmp_path, 4))
    assert after.rows == before.rows
