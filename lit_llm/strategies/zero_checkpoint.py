"""Checkpoints under DeepSpeed: one file as of a single process, or a folder of its own.

In a folder, ``checkpoint`` holds what DeepSpeed has written, a part for each rank, and ``meta.pt``
everything else of Lightning's checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lit_llm.errors import UserError
from lit_llm.strategies.checkpoint_io import AtomicCheckpointIO
from lit_llm.strategies.zero_state import OptimizerLayout, gather_weights

METADATA = "meta.pt"
_TAG = "checkpoint"


class ZeROCheckpointing(DeepSpeedStrategy):
    """The part of ``ZeROStrategy`` that saves and loads.

    Args:
        sharded_checkpoints: Write folders into which every rank puts its part.
        settings: What Lightning's strategy takes.
    """

    def __init__(self, sharded_checkpoints: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self.sharded_checkpoints = sharded_checkpoints
        self.checkpoint_io = AtomicCheckpointIO(mapped=True)
        self._engine: Any = None
        self._layout: OptimizerLayout | None = None  # while there is an engine that trains
        # Frozen parameters before they were rounded, by identity: values on rank 0 only.
        self._exact: dict[int, Tensor | None] = {}
        self._unread: Path | None = None  # a sharded checkpoint, until there are parts to fill
        self._loaded: Mapping[str, Tensor] = {}  # weights of a checkpoint, until they are divided
        self._from_folder = False

    def make_whole(self) -> None:
        """Undo what was divided; all ranks have to call it."""
        raise NotImplementedError

    def _left_out(self) -> set[str]:
        module: Any = self.lightning_module
        return set(module.left_out()) if hasattr(module, "left_out") else set()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole module's state on rank 0, in the optimizer's precision; nothing elsewhere."""
        assert self.lightning_module is not None
        if self.sharded_checkpoints and self._engine is not None:
            return {}
        if self._engine is not None:
            self._engine.empty_partition_cache()  # what stage 3 has fetched ahead
        return gather_weights(
            self.lightning_module,
            self._left_out(),
            self._exact,
            trained=self._layout is not None,
            keep=self.is_global_zero,
        )

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The whole optimizer's state on rank 0, as of one process; nothing elsewhere."""
        if self._layout is None or self.sharded_checkpoints:
            return {}
        return self._layout.gather(self._engine.optimizer, keep=self.is_global_zero)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None
    ) -> None:
        """Write one file, or a folder with ``sharded_checkpoints``."""
        if not self.sharded_checkpoints or self._engine is None:
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)
            return
        save_folder(Path(self.broadcast(str(filepath))), checkpoint, self._engine, self._left_out())

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are loaded while the module is whole."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning hands us the optimizer's state; in a folder it is DeepSpeed's."""
        return not self._from_folder

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file, or what a folder holds beside tensors.

        Raises:
            UserError: It is damaged or no checkpoint of ours.
        """
        self.make_whole()
        path = Path(checkpoint_path)
        self._from_folder = path.is_dir()
        if self._from_folder:
            self._unread = path
            return read_folder(path)
        return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load weights into the whole module."""
        module = self.lightning_module
        assert module is not None
        if self._unread is not None:
            if module.trainer.state.fn != TrainerFn.FITTING:
                load_folder_weights(self._unread, module)
            return
        module.load_state_dict(checkpoint["state_dict"], strict=strict)
        self._loaded = checkpoint["state_dict"]

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each rank its part of the optimizer's state."""
        assert self._layout is not None
        self._layout.restore(self._engine.optimizer, checkpoint["optimizer_states"][0])


def save_folder(path: Path, checkpoint: dict[str, Any], engine: Any, left_out: set[str]) -> None:
    """Write a folder beside its final place, then rename it; all ranks have to call it.

    Args:
        path: Where it is to be.
        checkpoint: Lightning's; weights and optimizer states in it are passed over.
        engine: DeepSpeed's engine.
        left_out: Names of the module that belong into no checkpoint.
    """
    partial = path.with_name(path.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    frozen = {name for name, p in engine.module.named_parameters() if not p.requires_grad}
    engine.save_checkpoint(
        str(partial),
        tag=_TAG,
        client_state={},
        save_latest=False,
        exclude_frozen_parameters=bool(frozen) and frozen <= left_out,
    )
    dist.barrier()
    if dist.get_rank() == 0:
        rest = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
        parts = {file.name: file.stat().st_size for file in (partial / _TAG).glob("*.pt")}
        rest["zero"] = {"stage": engine.zero_optimization_stage(), "parts": parts}
        torch.save(rest, partial / METADATA)
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
    dist.barrier()


def is_of_deepspeed(path: Path) -> bool:
    """Whether a path is a folder that DeepSpeed has written."""
    return (path / _TAG).is_dir()


def read_folder(path: Path) -> dict[str, Any]:
    """What a folder holds beside tensors.

    Raises:
        UserError: It is not whole, or of another strategy.
    """
    if not (path / METADATA).exists() or not is_of_deepspeed(path):
        raise UserError(
            f"{path} is no checkpoint of a deepspeed strategy; resume with the strategy that wrote "
            "it, or from a checkpoint that is one file"
        )
    try:
        meta: dict[str, Any] = torch.load(path / METADATA, map_location="cpu", weights_only=True)
        sizes = {file.name: file.stat().st_size for file in (path / _TAG).iterdir()}
        missing = [name for name, size in meta["zero"]["parts"].items() if sizes.get(name) != size]
    except Exception as error:
        raise UserError(f"checkpoint {path} is damaged ({METADATA}); take another one") from error
    if missing:
        raise UserError(
            f"checkpoint {path} is incomplete ({missing[0]} is missing or cut off); take another "
            "one"
        )
    return {**meta, "state_dict": {}}


def check_folder(path: Path, stage: int, world_size: int) -> None:
    """Refuse a folder that these ranks could not train on from.

    Raises:
        UserError: It is damaged, or another stage or number of ranks has written it.
    """
    kept = read_folder(path)["zero"]
    if kept["stage"] != stage:
        raise UserError(
            f"{path} was written by ZeRO stage {kept['stage']}, this is stage {stage}; resume with "
            "the strategy that wrote it, or from a checkpoint that is one file "
            "(sharded_checkpoints: false)"
        )
    written = sum(part.endswith("_optim_states.pt") for part in kept["parts"])
    if written != world_size:
        raise UserError(
            f"{path} was written by {written} ranks and there are {world_size} now; run as many, "
            "or resume from a checkpoint that is one file (sharded_checkpoints: false)"
        )


def load_folder(path: Path, engine: Any, world_size: int) -> None:
    """Fill an engine from a folder; all ranks have to call it.

    Raises:
        UserError: It is not one that they can train on from.
    """
    check_folder(path, engine.zero_optimization_stage(), world_size)
    try:
        engine.load_checkpoint(
            str(path), tag=_TAG, load_lr_scheduler_states=False, load_module_strict=False
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"checkpoint {path} was not loaded ({reason}); take another one") from error


def load_folder_weights(path: Path, module: nn.Module) -> None:
    """Fill a whole module from a folder, written by any number of ranks."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    told = io.StringIO()  # it reports every step, with progress bars
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        state = get_fp32_state_dict_from_zero_checkpoint(str(path), tag=_TAG)
    module.load_state_dict(state, strict=False)
