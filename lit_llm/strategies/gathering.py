"""A model with all its weights on every rank, for what is done outside of steps.

Sampling needs every weight for every token, and ranks stop at different times. So the weights are
gathered once, into a copy that no strategy has wrapped; what is done with it needs no other rank.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from lit_llm.strategies.names import plain_name
from lit_llm.strategies.shards import reshard, whole
from lit_llm.strategies.zero_state import whole_parameter


def needs_gathering(strategy: Strategy | str) -> bool:
    """Whether a strategy takes weights, or their full precision, away from the ranks."""
    return isinstance(strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy))


def whole_model(module: Any) -> AbstractContextManager[Any]:
    """A module's model with all its weights on every rank; ranks have to enter together.

    Args:
        module: A LightningModule with a ``model``; one that is no ``ModelModule`` shards nothing.
    """
    return module.whole() if hasattr(module, "whole") else nullcontext(module.model)


class Replica:
    """The structure of a model, and for a while its weights.

    Args:
        model: The model before a strategy shards it. Its parameters are not copied.
        owner: The module that holds it, which hooks of the model may know.
    """

    def __init__(self, model: nn.Module, owner: nn.Module) -> None:
        memo: dict[int, Any] = {id(owner): owner}
        for parameter in model.parameters():
            empty = torch.empty_like(parameter, device="meta")
            memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
        # In a list, so that assigning it to a module's attribute registers nothing.
        self._structure = [copy.deepcopy(model, memo).eval()]
        self.bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        """What the weights take."""
        self.seconds = 0.0
        """What the last gathering took."""

    @contextmanager
    def filled(self, model: nn.Module, root: nn.Module, *, exact: bool) -> Iterator[nn.Module]:
        """The copy with the weights of a model of the same structure, on its device.

        Args:
            model: As the strategy has it.
            root: What the strategy wraps around everything, ``strategy.model``.
            exact: Take the weights that the optimizer keeps, where they are more exact.
        """
        if not _is_sharded(model, root) and not (exact and _has_masters(root)):
            yield model
            return
        started = time.perf_counter()
        copied = self._structure[0]
        places = dict(copied.named_modules())
        device = next(iter(root.parameters())).device
        owned: dict[int, nn.Parameter] = {}
        for name, value in whole_weights(model, root, exact=exact):
            path, _, last = name.rpartition(".")
            old = getattr(places[path], last)
            owned[id(old)] = nn.Parameter(value.to(device), requires_grad=False)
        _put(copied, owned)
        copied.to(device)  # buffers
        self.seconds = time.perf_counter() - started
        try:
            yield copied
        finally:
            _put(
                copied,
                {
                    id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
                    for p in copied.parameters()
                },
            )


def _put(module: nn.Module, parameters: dict[int, nn.Parameter]) -> None:
    """Replace parameters, by the identity of the old ones, so that tied ones stay tied."""
    for child in module.modules():
        for name, old in list(child._parameters.items()):
            if old is not None and id(old) in parameters:
                child._parameters[name] = parameters[id(old)]


def _is_sharded(model: nn.Module, root: nn.Module) -> bool:
    return (
        isinstance(root, FullyShardedDataParallel)
        or any(isinstance(p, DTensor) for p in root.parameters())
        or any(hasattr(p, "ds_id") for p in model.parameters())
    )


def _has_masters(root: Any) -> bool:
    """Whether DeepSpeed keeps weights of a higher precision than it computes with."""
    return hasattr(root, "zero_optimization") and any(
        p.requires_grad and p.dtype != torch.float32 for p in root.parameters()
    )


@torch.no_grad()
def whole_weights(
    model: nn.Module, root: nn.Module, *, exact: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Names and whole values of a model's parameters, a few at a time; all ranks have to iterate.

    Args:
        model: A part of ``root``.
        root: What the strategy wraps around everything.
        exact: Take the weights that the optimizer keeps, where they are more exact.
    """
    if isinstance(root, FullyShardedDataParallel):
        yield from _of_fsdp1(model, root)
        return
    if isinstance(root, FSDPModule):
        reshard(root)  # an evaluation may have left parts of it gathered, and rounded
    if hasattr(root, "empty_partition_cache"):
        # Stage 3 fetches ahead what it has seen follow, and a forward may have ended before.
        root.empty_partition_cache()  # type: ignore[operator]
    masters = exact and _has_masters(root)
    for name, parameter in model.named_parameters():
        yield plain_name(name), whole(whole_parameter(parameter, trained=masters)).clone()


def _of_fsdp1(model: nn.Module, root: FullyShardedDataParallel) -> Iterator[tuple[str, Tensor]]:
    """Unit by unit, so that one of them at a time is whole. The root has to be the first."""
    wanted = {id(module) for module in model.modules()}
    prefix = next(plain_name(name) for name, module in root.named_modules() if module is model)
    seen: set[int] = set()
    for name, unit in list(root.named_modules()):
        if not isinstance(unit, FullyShardedDataParallel):
            continue
        if unit is not root and id(unit) not in wanted:
            continue
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
            for path, module in _own_modules(unit, name):
                if id(module) not in wanted:
                    continue
                for last, parameter in module.named_parameters(recurse=False):
                    if id(parameter) in seen:
                        continue
                    seen.add(id(parameter))
                    own = plain_name(f"{path}.{last}").removeprefix(f"{prefix}.")
                    yield own, parameter.detach().clone()


def _own_modules(unit: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """A unit's modules but for those in units of their own, with their names."""
    for child_name, child in unit.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if isinstance(child, FullyShardedDataParallel):
            continue
        yield path, child
        yield from _own_modules(child, path)
