"""Checkpoint folders as DeepSpeed writes them, whole or absent.

``checkpoint`` holds what DeepSpeed has written, a part for each rank, and ``meta.pt`` everything
else of Lightning's checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lit_llm.errors import UserError

METADATA = "meta.pt"
_TAG = "checkpoint"


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
        torch.save(rest, partial / METADATA)
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
    dist.barrier()


def read_folder(path: Path) -> dict[str, Any]:
    """What a folder holds beside tensors.

    Raises:
        UserError: It is not whole, or of another strategy.
    """
    if not (path / METADATA).exists() or not (path / _TAG).is_dir():
        raise UserError(
            f"{path} is no checkpoint of a deepspeed strategy; resume with the strategy that wrote "
            "it, or from a checkpoint that is one file"
        )
    meta: dict[str, Any] = torch.load(path / METADATA, map_location="cpu", weights_only=True)
    return {**meta, "state_dict": {}}


def load_folder(path: Path, engine: Any, world_size: int) -> None:
    """Fill an engine from a folder; all ranks have to call it.

    Raises:
        UserError: Another number of ranks has written it.
    """
    written = len(list((path / _TAG).glob("*_optim_states.pt")))
    if written != world_size:
        raise UserError(
            f"{path} was written by {written} ranks and there are {world_size} now; run as many, "
            "or resume from a checkpoint that is one file (sharded_checkpoints: false)"
        )
    engine.load_checkpoint(
        str(path), tag=_TAG, load_lr_scheduler_states=False, load_module_strict=False
    )


def load_folder_weights(path: Path, module: nn.Module) -> None:
    """Fill a whole module from a folder, written by any number of ranks."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    told = io.StringIO()  # it reports every step, with progress bars
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        state = get_fp32_state_dict_from_zero_checkpoint(str(path), tag=_TAG)
    module.load_state_dict(state, strict=False)
