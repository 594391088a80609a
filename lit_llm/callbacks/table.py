"""A table that grows while a model trains: one file, one W&B table, whole after a resume."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger

from lit_llm.strategies.checkpoint_io import write_text


class GrowingTable:
    """Rows by optimizer step, in ``<name>.jsonl`` of the run's folder and in W&B.

    Args:
        name: Name of the file and of the W&B table.
        columns: Names of the columns after the first, which is ``step``.
    """

    def __init__(self, name: str, columns: list[str]) -> None:
        self.name = name
        self.columns = ["step", *columns]
        self.rows: list[list[Any]] = []

    def take_over(self, trainer: Trainer) -> None:
        """Add the rows that the file has up to now and the checkpoint has not.

        A checkpoint is written before the validation of its step, which a resumed run does not
        repeat.

        Args:
            trainer: Knows step and folder.
        """
        path = self._path(trainer)
        if not path.exists():
            return
        known = {row[0] for row in self.rows}
        # Not splitlines: an answer may hold other line separators than the line feed.
        for line in filter(None, path.read_text(encoding="utf-8").split("\n")):
            row = [json.loads(line).get(column) for column in self.columns]
            if row[0] not in known and row[0] <= trainer.global_step:
                self.rows.append(row)
        self.rows.sort(key=lambda row: row[0])

    def put(self, trainer: Trainer, rows: list[list[Any]]) -> None:
        """Add the rows of this step in place of those it may have, and write the whole table.

        Args:
            trainer: Knows step, folder and loggers.
            rows: One list a row, without the step.
        """
        step = trainer.global_step
        self.rows = [row for row in self.rows if row[0] != step] + [[step, *row] for row in rows]
        lines = (
            json.dumps(dict(zip(self.columns, row, strict=True)), ensure_ascii=False) + "\n"
            for row in self.rows
        )
        write_text(self._path(trainer), "".join(lines))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table(self.name, columns=self.columns, data=self.rows)

    def _path(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / f"{self.name}.jsonl"
