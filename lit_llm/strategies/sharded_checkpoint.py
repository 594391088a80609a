"""Checkpoint folders that every rank writes its part of, the same for FSDP1 and FSDP2.

``torch.distributed.checkpoint`` stores tensors as blocks with their places in the whole, so that a
folder is read by another strategy, by another number of ranks, or by one process:

- ``state_dict.NAME``: weights and saved buffers, by the names of a single process;
- ``optimizer.I.NAME.KEY``: what the I-th optimizer keeps of a parameter (``exp_avg``, ``step``);
- ``meta.pt``: everything else of Lightning's checkpoint, without tensors of the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lit_llm.errors import UserError
from lit_llm.strategies.names import plain_name
from lit_llm.strategies.sharded_files import (
    METADATA,
    read_index,
    read_meta,
    read_tensors,
    remove,
    saved_shapes,
)

Whole = Callable[[str, Tensor], Tensor]
"""Turns what a rank holds of a parameter, given its plain name, into a tensor that knows its place
in the whole: a DTensor as it is, a slice of FSDP1 as a ``FlatSlice``."""


def _as_it_is(_: str, tensor: Tensor) -> Tensor:
    return tensor


# ----- what is saved ----------------------------------------------------------------------------


def module_entries(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a module's state, as its own ``state_dict`` before it was wrapped.

    Unlike ``state_dict`` this moves nothing, and calls no hooks, which would gather.

    Args:
        module: The module, in parts wrapped by FSDP or compiled.

    Yields:
        Plain names, tied parameters under each of theirs, in the order of ``state_dict``; and the
        parameters and buffers as the strategy has them.
    """
    for path, child in module.named_modules(remove_duplicate=False):
        prefix = plain_name(path)
        prefix = f"{prefix}." if prefix else ""
        for name, parameter in child._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                yield prefix + name, buffer


def optimizer_names(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The plain names of an optimizer's parameters, group by group."""
    names = {id(p): plain_name(n) for n, p in module.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


# ----- saving and loading -----------------------------------------------------------------------


def is_sharded(path: str | Path) -> bool:
    """Whether a path is such a checkpoint, complete or not, rather than a file."""
    return Path(path).is_dir()


def save_sharded(
    path: str | Path,
    checkpoint: Mapping[str, Any],
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    *,
    left_out: Collection[str] = (),
    whole: Whole = _as_it_is,
) -> None:
    """Save a module and its optimizers; to be called on all ranks.

    It is written as ``PATH.partial`` and renamed by rank 0 when everything is on disk, so that a
    killed save leaves nothing that looks whole.

    Args:
        path: The folder; what is there already is replaced.
        checkpoint: Lightning's checkpoint; ``state_dict`` and ``optimizer_states`` are ignored.
        module: The LightningModule, sharded.
        optimizers: Those whose state is saved.
        left_out: Plain names of what is not saved.
        whole: How a rank's part of a parameter is told its place.
    """
    from torch.distributed import checkpoint as dcp

    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    first = dist.get_rank() == 0
    if first:
        remove(partial)
        partial.mkdir(parents=True)
    dist.barrier()
    weights, aliases = _weights(module, left_out, whole)
    state = {f"state_dict.{name}": tensor for name, tensor in weights.items()}
    groups = []
    for number, optimizer in enumerate(optimizers):
        names = optimizer_names(module, optimizer)
        for name, key, value in _moments(optimizer, names, whole):
            state[f"optimizer.{number}.{name}.{key}"] = value
        groups.append(
            [
                {**{k: v for k, v in group.items() if k != "params"}, "params": own}
                for group, own in zip(optimizer.param_groups, names, strict=True)
            ]
        )
    dcp.save(state, checkpoint_id=partial)
    if first:
        rest = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
        with (partial / METADATA).open("wb") as file:
            torch.save({"checkpoint": rest, "param_groups": groups, "names": aliases}, file)
            file.flush()
            os.fsync(file.fileno())
        remove(target)
        partial.rename(target)
    dist.barrier()


def load_metadata(path: str | Path) -> dict[str, Any]:
    """Everything of a checkpoint but its tensors, as Lightning restores it.

    Args:
        path: The folder.

    Returns:
        The checkpoint without ``state_dict``; with an empty state for each optimizer that it has.

    Raises:
        UserError: It is missing, incomplete or damaged.
    """
    meta = read_meta(Path(path))
    checkpoint: dict[str, Any] = dict(meta["checkpoint"])
    if meta["param_groups"]:
        checkpoint["optimizer_states"] = [{} for _ in meta["param_groups"]]
    return checkpoint


@torch.no_grad()
def load_weights(
    path: str | Path,
    module: nn.Module,
    *,
    left_out: Collection[str] = (),
    whole: Whole = _as_it_is,
) -> None:
    """Load a module's weights in place; on all ranks, where it is sharded.

    Args:
        path: The folder.
        module: The LightningModule, sharded or not.
        left_out: Plain names of what is not asked for.
        whole: How a rank's part of a parameter is told its place.

    Raises:
        UserError: The checkpoint is of another model; it names the first tensor that differs.
    """
    weights, _ = _weights(module, left_out, whole)
    shapes = saved_shapes(Path(path), "state_dict.")
    for name in sorted(weights.keys() ^ shapes.keys()):
        where = "there" if name in shapes else "here"
        raise UserError(_other_model(path, f"{name} exists only {where}"))
    for name, tensor in weights.items():
        if tensor.shape != shapes[name]:
            there, here = tuple(shapes[name]), tuple(tensor.shape)
            raise UserError(_other_model(path, f"{name} has shape {there} there and {here} here"))
    read_tensors(Path(path), {f"state_dict.{name}": tensor for name, tensor in weights.items()})


@torch.no_grad()
def load_optimizer(
    path: str | Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    number: int = 0,
    whole: Whole = _as_it_is,
) -> None:
    """Load an optimizer's state and options; to be called on all ranks.

    Args:
        path: The folder.
        module: The LightningModule, sharded.
        optimizer: The optimizer, as it was just built.
        number: Which of the checkpoint's it is.
        whole: How a rank's part of a parameter is told its place.

    Raises:
        UserError: It does not train the same parameters in the same groups.
    """
    names = optimizer_names(module, optimizer)
    saved = read_meta(Path(path))["param_groups"]
    if number >= len(saved) or [sorted(group["params"]) for group in saved[number]] != [
        sorted(group) for group in names
    ]:
        raise UserError(_other_model(path, "its optimizer trains other parameters"))
    prefix = f"optimizer.{number}."
    kept: dict[str, dict[str, torch.Size]] = {}
    for name, shape in saved_shapes(Path(path), prefix).items():
        parameter_name, _, key = name.rpartition(".")
        kept.setdefault(parameter_name, {})[key] = shape
    state: dict[str, Tensor] = {}
    for group, options, own in zip(optimizer.param_groups, saved[number], names, strict=True):
        group.update({k: v for k, v in options.items() if k != "params"})
        for parameter, name in zip(group["params"], own, strict=True):
            optimizer.state.pop(parameter, None)
            if not parameter.numel():  # no step is made of it, so none would be counted
                continue
            shape = whole(name, parameter).shape
            for key, saved_shape in kept.get(name, {}).items():
                if saved_shape == shape and key != "step":
                    value = torch.zeros_like(parameter)
                    state[f"{prefix}{name}.{key}"] = whole(name, value)
                else:  # a count of steps, the same everywhere; a fused optimizer wants it near
                    near = group.get("fused") or group.get("capturable")
                    device = parameter.device if near else torch.device("cpu")
                    value = torch.zeros(saved_shape, device=device)
                    state[f"{prefix}{name}.{key}"] = value
                optimizer.state[parameter][key] = value
    read_tensors(Path(path), state)


def read_sharded(path: str | Path, *, with_optimizers: bool = True) -> dict[str, Any]:
    """Read a whole checkpoint in one process that needs no process group, as for an export.

    Args:
        path: The folder.
        with_optimizers: Read their states too, which take twice the memory of the weights.

    Returns:
        What a single process would have saved as one file: ``state_dict`` with whole tensors, tied
        ones once in memory, and ``optimizer_states`` that number the parameters.

    Raises:
        UserError: It is missing, incomplete or damaged.
    """
    folder = Path(path)
    meta = read_meta(folder)
    index = read_index(folder)
    whole = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
        and (with_optimizers or name.startswith("state_dict."))
    }
    read_tensors(folder, whole, alone=True)
    checkpoint: dict[str, Any] = dict(meta["checkpoint"])
    checkpoint["state_dict"] = {
        name: whole[f"state_dict.{saved_as}"] for name, saved_as in meta["names"].items()
    }
    if meta["param_groups"] and with_optimizers:
        checkpoint["optimizer_states"] = [
            _numbered(groups, f"optimizer.{number}.", whole)
            for number, groups in enumerate(meta["param_groups"])
        ]
    return checkpoint


def _numbered(
    groups: list[dict[str, Any]], prefix: str, whole: dict[str, Tensor]
) -> dict[str, Any]:
    """An optimizer's state as ``state_dict`` of torch's optimizers has it."""
    numbers = {name: i for i, name in enumerate(n for group in groups for n in group["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in whole.items():
        if full_name.startswith(prefix):
            name, _, key = full_name.removeprefix(prefix).rpartition(".")
            state.setdefault(numbers[name], {})[key] = tensor
    return {
        "state": dict(sorted(state.items())),
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in groups
        ],
    }


def _weights(
    module: nn.Module, left_out: Collection[str], whole: Whole
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by the first of their names, and under which of those each name is saved."""
    seen: dict[int, str] = {}
    weights: dict[str, Tensor] = {}
    saved_as: dict[str, str] = {}
    for name, tensor in module_entries(module):
        if name in left_out:
            continue
        saved_as[name] = seen.setdefault(id(tensor), name)
        if saved_as[name] == name:
            is_parameter = isinstance(tensor, nn.Parameter)
            weights[name] = whole(name, tensor.detach()) if is_parameter else tensor
    return weights, saved_as


def _moments(
    optimizer: torch.optim.Optimizer, names: list[list[str]], whole: Whole
) -> Iterator[tuple[str, str, Tensor]]:
    for group, own in zip(optimizer.param_groups, names, strict=True):
        for parameter, name in zip(group["params"], own, strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor):
                    value = torch.tensor(value)
                elif value.shape == parameter.shape and key != "step":
                    value = whole(name, value)
                yield name, key, value


def _other_model(path: str | Path, difference: str) -> str:
    return (
        f"the checkpoint {path} is of another model: {difference}; resume with the settings it was "
        "trained with, or give another --output_dir"
    )
