"""Weights that are not trained: which they are, and whether they still are the same."""

import hashlib

import torch
from torch import Tensor, nn

_LOOKED_AT = 4096


def frozen_names(module: nn.Module) -> set[str]:
    """Names in ``module.state_dict()`` of the parameters that are not trained."""
    state = module.state_dict(keep_vars=True)
    return {
        name
        for name, value in state.items()
        if isinstance(value, nn.Parameter) and not value.requires_grad
    }


def tensors_fingerprint(tensors: dict[str, Tensor]) -> str:
    """A hash of names, shapes and evenly spaced values: other weights give another one.

    Some thousand values of each tensor tell two models apart, and take no time for large ones.

    Args:
        tensors: Tensors by name.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        flat = tensor.reshape(-1)
        looked_at = flat[:: max(1, flat.numel() // _LOOKED_AT)].cpu()
        if not looked_at.is_floating_point():  # quantised weights
            looked_at = looked_at.to(torch.int64)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(looked_at.to(torch.float64).numpy().tobytes())
    return digest.hexdigest()
