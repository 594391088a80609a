"""The blocks of a decoder, and their compilation in place."""

from __future__ import annotations

from torch import nn

from lit_llm.errors import UserError


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of a model's transformer blocks.

    Found without knowing the architecture: the longest list of modules of one class that is not
    inside another list (as the experts of a mixture are).

    Raises:
        UserError: The model has no such list.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in lists)
        if nested or not isinstance(module, nn.ModuleList):
            continue
        if len({type(child) for child in module}) == 1:
            lists[name] = module
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of equal blocks to compile or shard.")
    return max(lists.values(), key=len)


def compile_blocks(model: nn.Module) -> None:
    """Compiles each decoder block in place with ``torch.compile``.

    Blocks share one compiled graph, so the compiler runs once, and ``module.compile()`` keeps the
    names of all parameters, which ``torch.compile(module)`` does not.

    Args:
        model: A transformers model, possibly wrapped.

    Raises:
        UserError: The model has no list of equal blocks.
    """
    import torch._functorch.config as functorch_config

    # Norms and activations are computed again in the backward pass rather than kept: a third
    # less memory of activations, no product repeated (docs/performance.md).
    functorch_config.activation_memory_budget = 0.9
    for block in decoder_blocks(model):
        block.compile()
