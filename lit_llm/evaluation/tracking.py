"""The numbers and answers of an evaluation for Weights & Biases and the other loggers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llm.callbacks.loggers import LoggingConfig, build_loggers, finish_loggers
from lit_llm.evaluation.results import Answer, ModelResults, TaskResult

if TYPE_CHECKING:
    from lit_llm.evaluation.win_rate import WinRate

COLUMNS = ["task", "item", "prompt", "answer", "reference", "generated", "stopped", "scores"]
"""Columns of a table of answers."""


def flat_metrics(tasks: Iterable[TaskResult], prefix: str = "eval") -> dict[str, float]:
    """``PREFIX/TASK/METRIC`` of everything that was measured.

    Args:
        tasks: Results of a model.
        prefix: What the names begin with.
    """
    return {
        f"{prefix}/{own.task}/{own.metric}": own.value
        for task in tasks
        for own in task.measurements
        if not math.isnan(own.value)
    }


def answer_row(answer: Answer) -> list[Any]:
    """An answer as a row of a table with these ``COLUMNS``."""
    row = [getattr(answer, name) for name in COLUMNS[:-1]]
    return [*row, json.dumps(answer.scores)]


def track(
    config: LoggingConfig,
    output_dir: str,
    results: Sequence[ModelResults],
    win_rates: Sequence[WinRate] = (),
) -> None:
    """Hand numbers and written answers of all models to the loggers, as one run.

    Args:
        config: Which loggers.
        output_dir: Folder of the evaluation.
        results: What each model gave.
        win_rates: What a judge said.

    Raises:
        UserError: A logger is not installed.
    """
    from lightning.pytorch.loggers import WandbLogger

    metrics: dict[str, float] = {}
    for model in results:
        metrics |= flat_metrics(model.tasks, f"eval/{model.name}")
    for rate in win_rates:
        metrics[f"eval/{rate.second}/win_rate_against/{rate.first}"] = rate.measurement.value
    rows = [
        [model.name, *answer_row(answer)]
        for model in results
        for task in model.tasks
        for answer in task.answers
        if answer.generated
    ]
    loggers = build_loggers(config, Path(output_dir))
    for logger in loggers:
        logger.log_metrics(metrics, step=0)
        if isinstance(logger, WandbLogger) and rows:
            logger.log_table("answers", columns=["model", *COLUMNS], data=rows)
        logger.save()
    finish_loggers(loggers)
