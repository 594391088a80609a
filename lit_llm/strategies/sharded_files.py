"""Reading a folder of ``torch.distributed.checkpoint``, and a clear word when it is broken."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_llm.errors import UserError
from lit_llm.strategies.zero_checkpoint import is_of_deepspeed

METADATA = "meta.pt"


def read_tensors(path: Path, state: dict[str, Tensor], alone: bool = False) -> None:
    """Fill tensors in place, each rank its own, or in one process that is ``alone``."""
    from torch.distributed import checkpoint as dcp

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is meant
            dcp.load(dict(state), checkpoint_id=path, no_dist=alone)
    except dcp.api.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:160]
        raise UserError(
            f"checkpoint {path} is damaged and was not loaded ({reason}); take another one"
        ) from error


def read_index(path: Path) -> Any:
    """Names, shapes and places of all tensors."""
    from torch.distributed.checkpoint import FileSystemReader

    try:
        return FileSystemReader(path).read_metadata()
    except Exception as error:
        raise _incomplete(path) from error


def read_meta(path: Path) -> Any:
    """What is there beside the tensors."""
    if not path.is_dir():
        raise UserError(f"there is no checkpoint at {path}; look into its folder for others")
    if is_of_deepspeed(path):
        raise UserError(
            f"{path} was written by DeepSpeed; resume with the strategy that wrote it, or from a "
            "checkpoint that is one file (sharded_checkpoints: false)"
        )
    try:
        return torch.load(path / METADATA, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _incomplete(path) from error


def _incomplete(path: Path) -> UserError:
    return UserError(
        f"checkpoint {path} is incomplete or damaged and was not loaded; take another one"
    )


def saved_shapes(path: Path, prefix: str) -> dict[str, torch.Size]:
    """Shapes of the tensors whose names begin so, by the rest of their names."""
    entries = read_index(path).state_dict_metadata.items()
    return {name.removeprefix(prefix): e.size for name, e in entries if name.startswith(prefix)}


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
