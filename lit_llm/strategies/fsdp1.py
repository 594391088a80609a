"""FSDP1: weights, gradients and optimizer state in flat slices, on CUDA and on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.fabric.strategies.fsdp import _move_torchmetrics_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import FSDPPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import CustomPolicy

from lit_llm.errors import UserError
from lit_llm.strategies.checkpoint_io import AtomicCheckpointIO
from lit_llm.strategies.flat_slice import FlatSlice
from lit_llm.strategies.fsdp1_parts import FSDP1Precision, choose_units
from lit_llm.strategies.sharded_checkpoint import (
    is_sharded,
    load_metadata,
    load_optimizer,
    load_weights,
    module_entries,
    optimizer_names,
    save_sharded,
)

_SHARDED = "_fsdp1"


@dataclass
class _Sharded:
    """What a module is once it is sharded: how it is reached, and which rank holds what."""

    root: FullyShardedDataParallel
    shapes: dict[str, torch.Size]
    counts: list[dict[str, int]]  # elements of each parameter, rank by rank

    def is_whole(self, name: str) -> bool:
        size = self.shapes[name].numel()
        return all(counts[name] == size for counts in self.counts)

    def start(self, name: str, rank: int) -> int:
        return sum(counts[name] for counts in self.counts[:rank])


class FSDP1Strategy(FSDPStrategy):
    """Shard weights, gradients and optimizer state with FSDP1, on CUDA or the CPU.

    Every decoder block is gathered when it runs; what is outside blocks belongs to the
    LightningModule and is whole within its steps. Gradients are reduced after every micro-batch:
    to keep them whole for the last one would take the memory that sharding saves.

    The paper: https://arxiv.org/abs/2304.11277

    Args:
        sharded_checkpoints: Every rank writes its part of a folder. By default rank 0 writes one
            file, as a single process would.
        half_gather: Under mixed precision gather weights in half precision: half the traffic, and
            other roundings than one process makes.
        timeout_minutes: How long a rank waits for the others.
    """

    def __init__(
        self,
        sharded_checkpoints: bool = False,
        half_gather: bool = False,
        timeout_minutes: float = 30.0,
    ) -> None:
        super().__init__(
            checkpoint_io=AtomicCheckpointIO(mapped=True),
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.sharded_checkpoints = sharded_checkpoints
        self.half_gather = half_gather
        self._folder_to_load: Path | None = None

    # ----- precision ----------------------------------------------------------------------------

    @property
    def precision_plugin(self) -> FSDPPrecision:
        """What precision steps compute in."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if isinstance(plugin, FSDPPrecision):
            device = self.parallel_devices[0].type if self.parallel_devices else "cpu"
            plugin = FSDP1Precision(plugin.precision, self.half_gather, device)
        cast(Any, FSDPStrategy.precision_plugin).fset(self, plugin)

    # ----- sharding -----------------------------------------------------------------------------

    @property
    def _sharded(self) -> _Sharded | None:
        return getattr(self.lightning_module, _SHARDED, None)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Wrap the module, or take the wrapper that an earlier run has left."""
        if self._sharded is not None:
            return self._sharded.root
        units = choose_units(model)
        shapes = {name: tensor.shape for name, tensor in module_entries(model)}
        on_cpu = self.root_device.type == "cpu"
        for tensor in [*model.parameters(), *model.buffers()] if on_cpu else []:
            dist.broadcast(tensor.detach(), 0)  # FSDP's own wants a GPU
        for parameter in units.replicated:
            parameter.data = parameter.data.to(self.root_device)
        root = FullyShardedDataParallel(
            model,
            auto_wrap_policy=CustomPolicy(lambda module: id(module) in units.modules),
            sharding_strategy=self.sharding_strategy,
            mixed_precision=self.mixed_precision_config,
            device_id=self.root_device,
            sync_module_states=not on_cpu,
            ignored_states=units.replicated,
            use_orig_params=True,
        )
        for unit in FullyShardedDataParallel.fsdp_modules(root):
            unit.training = unit.module.training  # a wrapper of a frozen model evaluates, too
        _move_torchmetrics_to_device(model, self.root_device)  # FSDP moves parameters' owners
        own = {name: tensor.numel() for name, tensor in module_entries(model)}
        counts: list[Any] = [None] * self.world_size
        dist.all_gather_object(counts, own)
        # Not as a child: the module is part of the wrapper, not the other way round.
        object.__setattr__(model, _SHARDED, _Sharded(root, shapes, counts))
        return root

    def setup(self, trainer: Trainer) -> None:
        """Shard the module, build the optimizer, and load a sharded checkpoint's weights."""
        super().setup(trainer)
        if self._folder_to_load is not None:
            folder, self._folder_to_load = self._folder_to_load, None
            module = self.lightning_module
            assert module is not None
            load_weights(folder, module, left_out=self._left_out(), whole=self._whole)
            self._forget_gathered()

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        """What this rank holds of a parameter (or of what is shaped alike), with its place."""
        sharded = self._sharded
        assert sharded is not None
        if sharded.is_whole(name):
            return tensor
        return FlatSlice(tensor, sharded.start(name, self.global_rank), sharded.shapes[name])

    def _forget_gathered(self) -> None:
        """Free weights that an evaluation left gathered in the root: they were replaced."""
        assert self._sharded is not None
        for unit in FullyShardedDataParallel.fsdp_modules(self._sharded.root):
            handle = unit._handle
            if handle is not None and hasattr(handle.flat_param, "_full_param_padded"):
                handle.reshard(free_unsharded_flat_param=handle.uses_sharded_strategy)

    def _left_out(self) -> set[str]:
        return cast(Any, getattr(self.lightning_module, "left_out", set))()

    # ----- gathering ----------------------------------------------------------------------------

    def _gather(self, name: str, local: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The whole of what ranks hold parts of, on rank 0's CPU.

        Args:
            name: The parameter.
            local: This rank's part of it, or of what is shaped alike; None for zeros.
            dtype: The data type, the same on all ranks.
        """
        sharded, rank = self._sharded, self.global_rank
        assert sharded is not None
        counts = [counts[name] for counts in sharded.counts]
        shape = sharded.shapes[name]
        if local is None:
            local = torch.zeros(counts[rank], dtype=dtype, device=self.root_device)
        local = local.detach().flatten()
        if sharded.is_whole(name):
            return local.view(shape).cpu() if rank == 0 else None
        if rank != 0:
            if counts[rank]:
                dist.send(local.contiguous(), 0)
            return None
        flat = torch.empty(shape.numel(), dtype=dtype, device=self.root_device)
        for source, part in enumerate(flat.split(counts)):
            if source == 0:
                part.copy_(local)
            elif len(part):
                dist.recv(part, source)
        return flat.view(shape).cpu()

    def _part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, in the form that the rank's parameter has."""
        sharded, rank = self._sharded, self.global_rank
        assert sharded is not None
        if sharded.is_whole(name):
            return whole
        start = sharded.start(name, rank)
        return whole.flatten()[start : start + sharded.counts[rank][name]]

    # ----- saving -------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights on the CPU of rank 0, as a single process has them; nothing elsewhere."""
        if self.sharded_checkpoints:
            return {}  # they go from the ranks to the disk
        assert self.lightning_module is not None
        if self._sharded is None:
            return dict(self.lightning_module.state_dict())
        gathered: dict[int, Tensor | None] = {}
        state: dict[str, Any] = {}
        left_out = self._left_out()
        for name, tensor in module_entries(self.lightning_module):
            if name in left_out:
                continue
            if not isinstance(tensor, nn.Parameter):
                state[name] = tensor.detach().cpu()
                continue
            if id(tensor) not in gathered:  # tied weights share their memory in the file too
                gathered[id(tensor)] = self._gather(name, tensor, tensor.dtype)
            state[name] = gathered[id(tensor)]
        return state if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The state that an optimizer of a single process would have; nothing elsewhere."""
        if self.sharded_checkpoints:
            return {}
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        module = self.lightning_module
        assert module is not None
        named = _named_states(module, optimizer)
        known: dict[str, dict[str, Any]] = {}
        for name, state, parameter in named:
            known[name] = {
                key: value.dtype if _is_moment(key, value, parameter) else value
                for key, value in state.items()
            }
        # A rank that holds nothing of a parameter has no state of it either.
        everywhere: list[Any] = [None] * self.world_size
        dist.all_gather_object(everywhere, known)
        result: dict[int, dict[str, Any]] = {}
        for number, (name, state, _) in enumerate(named):
            kept: dict[str, Any] = next((known[name] for known in everywhere if known[name]), {})
            for key, value in kept.items():
                if isinstance(value, torch.dtype):
                    value = self._gather(name, state.get(key), value)
                result.setdefault(number, {})[key] = value
        if not self.is_global_zero:
            return {}
        return {"state": result, "param_groups": optimizer.state_dict()["param_groups"]}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write one file from rank 0, or a folder from all."""
        path = Path(self.broadcast(filepath))
        if not self.sharded_checkpoints:
            Strategy.save_checkpoint(self, checkpoint, path, storage_options)
            return
        module = self.lightning_module
        assert module is not None
        save_sharded(
            path,
            checkpoint,
            module,
            self.optimizers if "optimizer_states" in checkpoint else (),
            left_out=self._left_out(),
            whole=self._whole,
        )

    # ----- loading ------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """A file's weights go into the whole module; a folder's are kept for ``setup``."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning calls :meth:`load_optimizer_state_dict`."""
        return True

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Open a file, or a folder without its tensors."""
        path = Path(self.broadcast(checkpoint_path))
        if not is_sharded(path):
            return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        checkpoint = load_metadata(path)
        self._folder_to_load = path
        checkpoint["sharded_checkpoint"] = str(path)
        return checkpoint

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load a file's weights: into the whole module, or its parts if it is sharded already."""
        module = self.lightning_module
        assert module is not None
        if "sharded_checkpoint" in checkpoint:
            return
        if self._sharded is None:
            module.load_state_dict(checkpoint["state_dict"], strict=strict)
            return
        left_out = self._left_out()
        entries = {n: t for n, t in module_entries(module) if n not in left_out}
        state = {n: t for n, t in checkpoint["state_dict"].items() if n not in left_out}
        for name in sorted(entries.keys() ^ state.keys() if strict else ()):
            where = "there" if name in state else "here"
            raise UserError(f"the checkpoint is of another model: {name} exists only {where}")
        for name in entries.keys() & state.keys():
            own = entries[name]
            value = self._part(name, state[name]) if isinstance(own, nn.Parameter) else state[name]
            own.detach().copy_(value)
        self._forget_gathered()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give every rank its part of the moments."""
        module = self.lightning_module
        assert module is not None
        for number, optimizer in enumerate(self.optimizers):
            if "sharded_checkpoint" in checkpoint:
                folder = checkpoint["sharded_checkpoint"]
                load_optimizer(folder, module, optimizer, number=number, whole=self._whole)
                continue
            saved = checkpoint["optimizer_states"][number]
            state: dict[int, dict[str, Any]] = {}
            for index, (name, _, parameter) in enumerate(_named_states(module, optimizer)):
                if not parameter.numel():  # no step is made of it, so none would be counted
                    continue
                for key, value in saved["state"].get(index, {}).items():
                    if key != "step" and isinstance(value, Tensor) and value.ndim:
                        value = self._part(name, value).clone()
                    state.setdefault(index, {})[key] = value
            optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def _named_states(
    module: nn.Module, optimizer: torch.optim.Optimizer
) -> list[tuple[str, dict[str, Any], nn.Parameter]]:
    """Name, state and parameter in the optimizer's order, which numbers them in a file."""
    names = [name for group in optimizer_names(module, optimizer) for name in group]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [(n, optimizer.state.get(p, {}), p) for n, p in zip(names, parameters, strict=True)]


def _is_moment(key: str, value: Any, parameter: nn.Parameter) -> bool:
    return key != "step" and isinstance(value, Tensor) and value.shape == parameter.shape
