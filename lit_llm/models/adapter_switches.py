"""Which adapters of a peft model are at work: the policy's, the critic's, or none.

Not by peft's own switches: those also freeze the adapters that they switch off, in the midst of a
step that trains several, and leave frozen what was trained beside the first ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from torch import nn


def add_second_adapter(model: nn.Module, name: str) -> None:
    """Puts more adapters like those that are there beside them, trained but not active.

    Layers that the first adapters train whole are not doubled.

    Args:
        model: A peft model.
        name: What :func:`active_adapter` calls them.
    """
    peft_model: Any = model
    config = copy.deepcopy(peft_model.peft_config[peft_model.active_adapter])
    config.modules_to_save = None
    peft_model.add_adapter(name, config)
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(True)


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The weights of one adapter of a peft model; none of a model without.

    Args:
        model: Any model.
        name: The adapter's.
    """
    found = []
    for path, parameter in model.named_parameters():
        parts = path.split(".")
        owners = pairwise(parts)  # a layer may have the adapter's name
        if any(part.startswith("lora_") and owner == name for part, owner in owners):
            found.append(parameter)
    return found


@contextmanager
def active_adapter(model: nn.Module, name: str) -> Iterator[None]:
    """Runs a peft model with other adapters than its first ones, within the context.

    Args:
        model: A peft model.
        name: Its adapters.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [name]
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer._active_adapter = own


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Runs a peft model as it was before it had adapters, within the context.

    Args:
        model: A peft model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, kinds)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer._disable_adapters = own
