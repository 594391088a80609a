"""Benchmark tasks, perplexity and answers while a model is trained."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lit_llm.callbacks.table import GrowingTable
from lit_llm.callbacks.throughput import Throughput
from lit_llm.errors import UserError
from lit_llm.evaluation.perplexity import window_and_stride
from lit_llm.evaluation.runner import Job, evaluate_model, plan
from lit_llm.evaluation.settings import EvaluationSettings
from lit_llm.evaluation.tracking import COLUMNS, answer_row, flat_metrics
from lit_llm.strategies.gathering import whole_model

_DEFAULT = EvaluationSettings(limit=32, max_texts=32, num_prompts=8)


class EvaluationCallback(Callback):
    """Evaluate a model every so many steps of any stage, over all ranks.

    ``eval/TASK/METRIC`` are logged like other metrics, and every written answer goes to
    ``evaluation_answers.jsonl`` and a W&B table that grows over the run. On the command line:

        --trainer.callbacks+=lit_llm.callbacks.evaluation.EvaluationCallback
        --trainer.callbacks.every_n_steps=500

    The ranks share the items; where a strategy shards the weights, each gathers them once.
    Training goes on as it would have without: no random number is used up.

    Args:
        every_n_steps: Optimizer steps from one evaluation to the next.
        settings: What the model is evaluated on; by default the suite quick with 32 items of each
            task, 32 documents and 8 questions.
    """

    def __init__(self, every_n_steps: int, settings: EvaluationSettings = _DEFAULT) -> None:
        if every_n_steps < 1:
            raise UserError(f"evaluation: every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.settings = settings
        self._jobs: list[Job] = []
        self._done = 0  # the step of the last one: a step of accumulated batches ends once
        self._skipped: set[str] = set()  # tasks whose reason has been told
        self._table = GrowingTable("evaluation_answers", COLUMNS)

    def state_dict(self) -> dict[str, Any]:
        """Keep the rows, so that a resumed run's table has no hole."""
        return {"rows": self._table.rows, "done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the rows up again."""
        self._table.rows, self._done = state_dict["rows"], state_dict["done"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find mistakes in the settings before the first step."""
        if getattr(pl_module, "scores_texts", False):
            raise UserError(
                "evaluation: a reward model scores texts, and can say nothing to evaluate; leave "
                "EvaluationCallback out"
            )
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is None:
            raise UserError(
                "evaluation: EvaluationCallback needs a data module with a tokenizer; leave it out"
            )
        if self.settings.texts:
            window_and_stride(pl_module.model, self.settings.window, self.settings.stride)
        self._jobs = plan(self.settings, strict=False)  # no reason to end a run
        self._done = max(self._done, trainer.global_step)

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over what the run wrote after its checkpoint."""
        if trainer.global_step:
            self._table.take_over(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate where a step is due."""
        step = trainer.global_step
        if step == self._done or step % self.every_n_steps:
            return
        self._done = step
        started = time.perf_counter()
        from lit_llm.evaluation.harness_model import HarnessModel

        datamodule: Any = getattr(trainer, "datamodule", None)
        ranks = dist.group.WORLD if trainer.world_size > 1 else None
        half = "bf16" in str(trainer.precision)
        with whole_model(pl_module) as model:
            lm = HarnessModel(
                model,
                datamodule.tokenizer,
                batch_tokens=self.settings.batch_tokens,
                dtype=torch.bfloat16 if half else None,
                ranks=ranks,
            )
            results = evaluate_model(lm, self._jobs, tell=lambda line: None)
        metrics = flat_metrics(results)  # the same on every rank, which has all results
        for name, value in metrics.items():
            pl_module.log(name, value, logger=False)  # for callbacks that watch a metric
        # Once and now: what a module logs is repeated until it logs again.
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step - 1)  # the index of the step, as of train/loss
        if trainer.is_global_zero:
            written = [answer for task in results for answer in task.answers if answer.generated]
            if written:
                self._table.put(trainer, [answer_row(answer) for answer in written])
        for skipped in (task for task in results if task.skipped is not None):
            if skipped.task not in self._skipped:
                rank_zero_warn(f"evaluation: {skipped.task} is skipped: {skipped.skipped}")
                self._skipped.add(skipped.task)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput):
                callback.leave_out(time.perf_counter() - started)
