"""A stage's module from a checkpoint alone, whatever strategy wrote it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llm.errors import UserError
from lit_llm.strategies.checkpoint_io import read_checkpoint
from lit_llm.strategies.registry import check_deepspeed
from lit_llm.strategies.resume import find_checkpoint
from lit_llm.strategies.sharded_checkpoint import read_sharded
from lit_llm.strategies.zero_checkpoint import is_of_deepspeed, load_folder_weights, read_folder

if TYPE_CHECKING:
    from lit_llm.modules.model import ModelModule


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path names a checkpoint, or the folder of a run that has some.

    Args:
        path: A file, a folder, or a name on the Hub.
    """
    folder = Path(path).expanduser()
    return folder.suffix == ".ckpt" or (folder / "checkpoints").is_dir()


def load_stage(path: str | Path, tokenizer: str | None = None) -> tuple[ModelModule, Any]:
    """The module of a checkpoint with its weights, and the tokenizer it was trained with.

    Args:
        path: A checkpoint, a file or a sharded folder; or a run's folder, whose newest is taken.
        tokenizer: Folder, Hub name or .gguf file of the tokenizer; by default the checkpoint tells.

    Returns:
        Module and tokenizer. A PPO module holds the policy only.

    Raises:
        UserError: There is no checkpoint, it is damaged, or it is of no stage of this library.
    """
    chosen = find_checkpoint(Path(path).expanduser(), str(Path(path).expanduser()))
    assert chosen is not None
    checkpoint, fill = _opened(chosen)
    name, _, attribute = str(checkpoint.get("stage", "")).partition(":")
    if not name.startswith("lit_llm."):
        raise UserError(
            f"{chosen} does not tell which stage it is of: this library did not write it, or an "
            "older version of it did; train on for a step, which writes a new one"
        )
    module: Any = getattr(importlib.import_module(name), attribute)(
        **checkpoint["hyper_parameters"]
    )
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    fill(module)
    module.tokenizer_path = tokenizer or checkpoint.get("tokenizer")
    if module.tokenizer_path is None:
        return module, None
    try:
        return module.eval(), module.load_tokenizer()
    except UserError as error:
        if tokenizer is not None:
            raise
        raise UserError(
            f"{chosen} was trained with the tokenizer {module.tokenizer_path}, which cannot be "
            "loaded any more; say where it is now (--tokenizer)"
        ) from error


def _opened(path: Path) -> tuple[dict[str, Any], Callable[[ModelModule], Any]]:
    """A checkpoint, and what gives a module its weights."""
    if is_of_deepspeed(path):
        check_deepspeed()
        return read_folder(path), lambda module: load_folder_weights(path, module)
    checkpoint = (
        read_checkpoint(path) if path.is_file() else read_sharded(path, with_optimizers=False)
    )
    return checkpoint, lambda module: module.load_state_dict(
        checkpoint["state_dict"], strict=module.strict_loading
    )
