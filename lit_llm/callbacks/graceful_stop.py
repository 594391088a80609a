"""A polite end: SIGTERM saves a checkpoint at the next optimizer step and stops the run."""

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_llm.callbacks.checkpoint import checkpoint_path


class RunStopped(Exception):
    """The run was asked to stop and has saved itself; ``args[0]`` says where."""

    code = 0
    """The exit code of the process."""


class GracefulStop(Callback):
    """Save and stop at the end of the current optimizer step when SIGTERM arrives.

    Cluster schedulers send SIGTERM some seconds before they kill. All ranks decide together, as
    the signal may reach one of them only. The end is an exception, not ``trainer.should_stop``,
    which would run a whole validation first.
    """

    def __init__(self) -> None:
        self._received = False
        self._previous: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen; Lightning's own handler, which ends a run without saving it, is put aside."""
        self._previous = signal.signal(signal.SIGTERM, self._receive)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signal back."""
        self._restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the signal back."""
        self._restore()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop if a rank was told to, once its accumulation window is complete.

        Raises:
            RunStopped: After the checkpoint is on disk.
        """
        if (batch_idx + 1) % trainer.accumulate_grad_batches != 0:
            return
        if not self._any_rank(self._received, trainer, pl_module):
            return
        path = checkpoint_path(trainer)
        trainer.save_checkpoint(path, weights_only=False)
        raise RunStopped(f"SIGTERM: saved {path} and stopped; the same command resumes from there")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    @staticmethod
    def _any_rank(flag: bool, trainer: Trainer, pl_module: LightningModule) -> bool:
        if trainer.world_size == 1:
            return flag
        value = torch.tensor(int(flag), device=pl_module.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)
