"""What strategies divide layer by layer: the blocks of the transformers models in a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lit_llm.errors import UserError
from lit_llm.models.compile import decoder_blocks


def outermost_models(module: nn.Module) -> Iterator[Any]:
    """The transformers models in a module that are not part of another one."""
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from outermost_models(child)


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """A model's blocks that hold weights; none where it has no list of them.

    Such a model is divided with what is outside blocks.
    """
    try:
        blocks = decoder_blocks(model)
    except UserError:
        return
    yield from (block for block in blocks if any(True for _ in block.parameters()))
