"""Keeps rotary frequencies exact when a model is cast to half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class _KeepBufferDtype:
    """Mixin of an ``nn.Module``: casts leave its non-persistent buffers in their data type."""

    _buffers: dict[str, Any]
    _non_persistent_buffers_set: set[str]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        before = {name: self._buffers[name] for name in _float_buffers(self)}
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, old in before.items():
            new = self._buffers[name]
            if new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


def keep_buffer_dtypes(model: nn.Module) -> None:
    """Makes the computed float buffers of ``model`` immune to ``model.to(torch.bfloat16)``.

    transformers computes rotary frequencies in float32 and saves none of them. Rounded to bfloat16
    (by ``bf16-true`` or DeepSpeed, which cast the whole module) they turn position 2,048 by up to
    0.9 radians; the model learns to live with that, and the exported folder, whose frequencies are
    exact again, is another model.

    Args:
        model: A model of transformers; the classes of the modules concerned become subclasses
            of the same name.
    """
    for module in model.modules():
        cls = type(module)
        if _float_buffers(module) and not isinstance(module, _KeepBufferDtype):
            module.__class__ = type(
                cls.__name__, (_KeepBufferDtype, cls), {"__module__": cls.__module__}
            )


def _float_buffers(module: Any) -> list[str]:
    return [
        name
        for name in module._non_persistent_buffers_set
        if module._buffers.get(name) is not None and module._buffers[name].is_floating_point()
    ]
