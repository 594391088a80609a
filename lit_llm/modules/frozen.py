"""Weights that are not trained: which they are, and whether they still are the same."""

import hashlib

import torch
from torch import Tensor, nn

from lit_llm.models.adapters import unwrap

_LOOKED_AT = 4096


def kept_elsewhere(model: nn.Module) -> set[str]:
    """Names in ``model.state_dict()`` of frozen parameters that are as they were loaded.

    An embedding that has grown is not: its new rows are in no other file.

    Args:
        model: A transformers model with adapters.
    """
    ends: set[int] = set()
    if getattr(unwrap(model), "grown_embedding", False):
        layers = (unwrap(model).get_input_embeddings(), unwrap(model).get_output_embeddings())
        ends = {id(parameter) for layer in layers if layer for parameter in layer.parameters()}
    return {
        name
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, nn.Parameter) and not value.requires_grad and id(value) not in ends
    }


def frozen_fingerprint(model: nn.Module) -> str:
    """A hash of the frozen weights that a checkpoint leaves out.

    Without the layers as they were before adapters trained them whole: what is trained is in the
    checkpoint, and the new head of a reward model begins with random numbers.
    """
    state = model.state_dict()
    names = (name for name in kept_elsewhere(model) if "original_module" not in name.split("."))
    return tensors_fingerprint({name: state[name] for name in names})


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
