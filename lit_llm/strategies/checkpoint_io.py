"""Checkpoint files that are whole or absent, and a clear word about those that are neither."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.utilities import rank_zero_info

from lit_llm.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its final place, flush it to disk, then rename it.

    Lightning's writer builds the whole file in memory and moves it from the system's temporary
    folder, which is a copy, and so can be cut off, where that is another file system. The first one
    of a run tells how large they are.

    Args:
        mapped: Read tensors from the file when they are used, for ranks that take parts of them.
    """

    def __init__(self, mapped: bool = False) -> None:
        super().__init__()
        self.mapped = mapped
        self._told = False

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        """Save ``checkpoint`` at ``path``; a reader sees the old file or the new, never a part."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        for left_by_a_killed_save in target.parent.glob("*.ckpt.partial"):
            if left_by_a_killed_save.is_dir():  # of ranks that wrote their parts
                shutil.rmtree(left_by_a_killed_save, ignore_errors=True)
            else:
                left_by_a_killed_save.unlink(missing_ok=True)
        partial = target.with_name(target.name + ".partial")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        if not self._told:
            self._told = True
            tensors = checkpoint.get("state_dict", {}).values()
            weights = sum(value.numel() * value.element_size() for value in tensors)
            size = target.stat().st_size
            rank_zero_info(
                f"Checkpoints take {size / 1e6:.1f} MB, {weights / 1e6:.1f} MB of it weights"
            )

    def load_checkpoint(self, path: _PATH, *options: Any, **more: Any) -> dict[str, Any]:
        """Read what ``save_checkpoint`` wrote; see :func:`read_checkpoint` where it is mapped."""
        if self.mapped:
            return read_checkpoint(Path(path))
        return super().load_checkpoint(path, *options, **more)


def check_writable(folder: Path) -> None:
    """Make the folder of a run, or say why it cannot be made.

    Args:
        folder: The folder.

    Raises:
        UserError: It cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the output folder {folder} cannot be made ({error.strerror}); give another "
            "--output_dir"
        ) from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"the output folder {folder} is not writable; give another --output_dir")


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Open a single-file checkpoint without reading its tensors into memory.

    Args:
        path: The ``.ckpt`` file.

    Returns:
        The checkpoint, its tensors mapped from the file.

    Raises:
        UserError: The file is missing, cut off, damaged, or holds more than plain data.
    """
    if not path.exists():
        raise UserError(f"there is no checkpoint at {path}; look into its folder for others")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:160] or type(error).__name__
        raise UserError(
            f"checkpoint {path} is cut off or damaged and was not loaded ({reason})"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path} is no Lightning checkpoint: it has no 'state_dict'")
    return checkpoint
