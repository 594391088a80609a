"""When checkpoints are written and how many stay."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_llm.errors import UserError

FILE_NAME = "step={step:08d}"


class StepCheckpoint(ModelCheckpoint):
    """Save every so many optimizer steps and at the last one; keep the newest few.

    Two are kept by default: should the newest be damaged, the one before it is there.

    Args:
        dirpath: Folder of the checkpoints; by default ``checkpoints`` in the output folder.
        every_n_steps: Optimizer steps between two checkpoints.
        keep: How many of the newest to keep; -1 keeps all.
    """

    def __init__(self, dirpath: str | None = None, every_n_steps: int = 500, keep: int = 2) -> None:
        if every_n_steps < 1 or keep == 0 or keep < -1:
            raise UserError(
                f"checkpoint: every_n_steps must be at least 1 and keep at least 1 or -1 (all), "
                f"got {every_n_steps} and {keep}"
            )
        super().__init__(
            dirpath=dirpath,
            filename=FILE_NAME,
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not save the step that is resumed from a second time.

        ``ModelCheckpoint`` forgets it, and would save it again in the midst of the next
        accumulation window.
        """
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at the interval, and whenever the run's last step is done."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        path = checkpoint_path(trainer)
        epochs = trainer.max_epochs or -1
        last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        last = trainer.global_step == trainer.max_steps or (
            last_batch and trainer.current_epoch + 1 == epochs
        )
        boundary = last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if last and boundary and str(path) != self.best_model_path:
            trainer.save_checkpoint(path, weights_only=False)


def checkpoint_path(trainer: Trainer) -> Path:
    """Where a checkpoint of the current step belongs."""
    folder = Path(trainer.default_root_dir) / "checkpoints"
    callback = trainer.checkpoint_callback
    if isinstance(callback, ModelCheckpoint) and callback.dirpath:
        folder = Path(callback.dirpath)
    return folder / (FILE_NAME.format(step=trainer.global_step) + ".ckpt")
