"""What Lightning lacks around a run: strategies for any hardware, checkpoints that fit them all."""

from typing import Any

_HOMES = {"FSDP1Strategy": "fsdp1", "FSDP2Strategy": "fsdp2", "ZeROStrategy": "zero"}

__all__ = ["FSDP1Strategy", "FSDP2Strategy", "ZeROStrategy"]


def __getattr__(name: str) -> Any:
    """Import a strategy when it is asked for: others do without its libraries."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
