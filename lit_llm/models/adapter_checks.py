"""What is checked before adapters go onto a model."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lit_llm.errors import UserError
from lit_llm.models.pretrained import one_line
from lit_llm.models.score_head import HEAD, is_classifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_adapter_folder(folder: str | os.PathLike[str]) -> Path:
    """Says before any loading whether ``merge_adapter`` may find adapters in ``folder``.

    Returns:
        The folder.

    Raises:
        UserError: It is missing or holds no adapter.
    """
    path = Path(folder).expanduser()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (path / name).is_file():
            raise UserError(f"{str(folder)!r} is no adapter folder of peft: it has no {name}.")
    return path


def adapter_heads(folder: str | os.PathLike[str]) -> int | None:
    """How many scores the reward model of a peft folder gives; ``None`` for a language model's.

    Args:
        folder: What ``save_adapter`` or peft wrote.

    Raises:
        UserError: The folder holds no adapter, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    path = check_adapter_folder(folder)
    if read_json(path / "adapter_config.json").get("task_type") != "SEQ_CLS":
        return None
    try:
        with safe_open(path / "adapter_model.safetensors", framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dict
                if name.endswith(f".{HEAD}.weight"):
                    return int(tensors.get_slice(name).get_shape()[0])
    except (OSError, SafetensorError) as error:
        raise UserError(f"the adapter in {str(folder)!r} is damaged: {one_line(error)}") from error
    raise UserError(f"the adapter in {str(folder)!r} is a reward model's, but has no {HEAD!r}.")


def read_json(path: Path) -> dict[str, Any]:
    """A file of a peft folder that holds an object.

    Raises:
        UserError: It cannot be read, or holds something else.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return dict(found)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error


def check_task(model: PreTrainedModel, folder: Path) -> None:
    """Without the head they were trained with, adapters would be merged and mean nothing."""
    try:
        task = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["task_type"]
    except (ValueError, KeyError, TypeError):
        return  # peft says what is wrong with the file
    if (task == "SEQ_CLS") != is_classifier(model):
        kinds = ("a language model", "a reward model")
        raise UserError(
            f"the adapter in {str(folder)!r} is that of {kinds[task == 'SEQ_CLS']}, but "
            f"{type(model).__name__} is {kinds[is_classifier(model)]}."
        )


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head is the embedding."""
    inputs: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    return head is not None and head.weight is inputs.weight


def holds_matrix(module: nn.Module) -> bool:
    """Whether a layer has one weight matrix, as adapters need it."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 2


def check_names(known: Iterable[str], names: list[str], what: str) -> None:
    """Says which of ``names`` is the end of no name in ``known``."""
    ends = [f".{name}" for name in known]
    for name in names:
        if not any(end.endswith(f".{name}") for end in ends):
            lasts = {end.rpartition(".")[2] for end in ends}
            layers = sorted(last for last in lasts if last and not last.isdigit())
            near = difflib.get_close_matches(name, layers, n=3) or layers
            raise UserError(f"adapter {what} {name!r}; did you mean {', '.join(near)}?")


def check_tied(model: PreTrainedModel, targets: list[str]) -> None:
    """Merging into one end of a tied embedding would change the other."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, module in model.named_modules():
        for target in targets:
            if any(module is end for end in ends) and f".{name}".endswith(f".{target}"):
                raise UserError(
                    f"adapter target_modules: {target!r} shares its matrix with the other end of "
                    f"{type(model).__name__}; leave it out, or train it whole by modules_to_save."
                )
