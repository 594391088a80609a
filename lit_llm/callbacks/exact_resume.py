"""The state Lightning leaves out of checkpoints: random numbers, and the logger's run id."""

import random
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger


def rng_state() -> dict[str, Any]:
    """Take the state of every random generator of this process, as weights-only-loadable data."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = cast("tuple[Any, ...]", np.random.get_state())
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        # int64: torch pickles no uint32 between ranks
        "numpy": [str(name), torch.from_numpy(keys.astype("int64")), position, has_gauss, cached],
        "python": [version, list(words), gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the generators back to what ``rng_state`` took."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


class ExactResume(Callback):
    """Make a resumed run continue as if it had never stopped.

    Saves the random state of every rank, puts it back before the first batch, and keeps validation
    (its sampling, its loaders) from moving the training's random numbers: a resumed run may skip a
    validation that the straight run made. The data cursor is the data module's, optimizer and
    schedule are Lightning's.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] | None = None
        self._before_validation: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Gather the states of all ranks into the checkpoint."""
        states: list[Any] = [rng_state()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            dist.all_gather_object(states, rng_state())
        checkpoint["rng"] = states
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and logger.version:
                checkpoint["wandb_id"] = logger.version

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the states until training starts: what runs before may draw numbers."""
        self._restored = checkpoint.get("rng")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let ranks that read different data drop out different units, in a run that starts anew.

        Until here all drew the same numbers, as they must for equal weights.
        """
        kwargs = trainer.distributed_sampler_kwargs
        if self._restored is None and kwargs is not None:
            torch.manual_seed(torch.initial_seed() + int(kwargs["rank"]))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put this rank's state back just before the first resumed batch."""
        if self._restored is None:
            return
        if trainer.global_rank < len(self._restored):
            set_rng_state(self._restored[trainer.global_rank])
        self._restored = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the training's random state."""
        self._before_validation = rng_state()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put it back."""
        if self._before_validation is not None:
            set_rng_state(self._before_validation)
            self._before_validation = None
