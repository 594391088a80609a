"""Progress: a rich bar on a terminal, one line an interval in a log file."""

import sys
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class Progress(RichProgressBar):
    """Lightning's rich bar with loss, tokens/s and time left; plain lines where there is no screen.

    A rich bar draws nothing useful into a pipe or a job's log file.
    """

    def __init__(self) -> None:
        super().__init__(leave=True)
        self._start: tuple[float, int] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose between bar and lines."""
        super().setup(trainer, pl_module, stage)
        if not sys.stdout.isatty():
            self.disable()

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Drop the logger's version number, which says nothing."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw the bar, or print a line at the trainer's logging interval."""
        if self.is_enabled:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            return
        step, every = trainer.global_step, getattr(trainer, "log_every_n_steps")  # noqa: B009 - set after __init__
        if self._start is None:
            self._start = (time.monotonic(), step)
        boundary = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not boundary or step % every or not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        line = f"step {step}"
        if trainer.max_steps > 0:
            line += f"/{trainer.max_steps}"
        if "train/loss" in metrics:
            line += f"  loss {float(metrics['train/loss']):.4f}"
        if "perf/tokens_per_s" in metrics:
            line += f"  {float(metrics['perf/tokens_per_s']):,.0f} tokens/s"
        began, first = self._start
        if trainer.max_steps > 0 and step > first:
            left = (time.monotonic() - began) / (step - first) * (trainer.max_steps - step)
            line += f"  {timedelta(seconds=round(left))} left"
        print(line, flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the validation bar, or print what it found."""
        super().on_validation_end(trainer, pl_module)
        if self.is_enabled or trainer.sanity_checking or not trainer.is_global_zero:
            return
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        text = "  ".join(f"{name} {value:.4f}" for name, value in sorted(found.items()))
        print(f"step {trainer.global_step}  {text}", flush=True)
