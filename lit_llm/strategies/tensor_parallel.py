"""Tensor parallelism by the plans that transformers keeps for its architectures.

The products inside the decoder blocks are divided among the ranks of a group; embeddings, norms and
output heads are whole on each of them, so that tied weights stay tied and a loss may take the
head's weight as it is (Megatron-LM, https://arxiv.org/abs/1909.08053, section 3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from lit_llm.errors import UserError
from lit_llm.models.compile import decoder_blocks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Rows of a divided weight make divided outputs, columns take divided inputs.
_COLWISE = ("colwise", "colwise_gather_output")
_ROWWISE = ("rowwise", "rowwise_split_input")
# A norm over the width of a head: whole weights, each rank's own heads, gradients added up.
_HEAD_NORM = "replicated_with_grad_allreduce"


def block_plan(model: Any) -> dict[str, str]:
    """How transformers divides the layers of a model's decoder blocks.

    Args:
        model: A transformers model.

    Returns:
        Styles as transformers calls them, by the layer's name within a block.

    Raises:
        UserError: transformers has no plan for this architecture.
    """
    blocks = decoder_blocks(model)
    list_name = next(name for name, module in model.named_modules() if module is blocks)
    prefix = f"{list_name.rpartition('.')[2]}.*."
    whole = getattr(model.config.get_text_config(), "base_model_tp_plan", None) or {}
    plan = {
        name.removeprefix(prefix): style for name, style in whole.items() if name.startswith(prefix)
    }
    if not plan:
        raise UserError(
            f"transformers has no tensor parallel plan for {type(model).__name__}; "
            "set tensor_parallel_size to 1 (--trainer.strategy fsdp2), or take another architecture"
        )
    return plan


def check_divisible(model: Any, plan: dict[str, str], size: int) -> None:
    """Refuse a model that cannot be divided among so many ranks.

    Args:
        model: A transformers model.
        plan: From ``block_plan``.
        size: Ranks of a tensor parallel group.

    Raises:
        UserError: Heads or layers do not divide, or something in the blocks cannot be divided.
    """
    kind, config = type(model).__name__, model.config.get_text_config()
    if any(style == "colwise" and "attn" in name for name, style in plan.items()):
        for field in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(config, field, None)
            if heads is not None and heads % size:
                raise UserError(
                    f"{kind} has {heads} {field.removeprefix('num_').replace('_', ' ')}, which "
                    f"tensor_parallel_size {size} does not divide; give a divisor of {heads}"
                )
    for block in decoder_blocks(model):
        if getattr(block, "_compiled_call_impl", None) is not None:
            raise UserError(
                "compiled blocks train wrongly under tensor parallelism; set compile to false "
                "(model.base.compile), or tensor_parallel_size to 1"
            )
        for name, style in plan.items():
            layer = _submodule(block, name)
            if layer is not None:
                _check_layer(layer, name, style, kind, size)


def _check_layer(layer: Any, name: str, style: str, kind: str, size: int) -> None:
    """Refuse what no style here can divide."""
    linear = getattr(layer, "base_layer", layer)
    supported = (*_COLWISE, *_ROWWISE, _HEAD_NORM)
    is_divided = style in supported and (style == _HEAD_NORM or type(linear) is nn.Linear)
    if not is_divided:
        raise UserError(
            f"tensor parallelism of {kind} is not supported: its plan divides {name} "
            f"({type(linear).__name__}) as {style!r}; set tensor_parallel_size to 1"
        )
    if linear is not layer and getattr(layer, "lora_magnitude_vector", None):
        raise UserError(
            "tensor parallelism cannot divide DoRA's norms of whole weights; use adapter method "
            "lora, or set tensor_parallel_size to 1"
        )
    if style == _HEAD_NORM:
        return
    width = linear.out_features if style in _COLWISE else linear.in_features
    if width % size:
        raise UserError(
            f"tensor_parallel_size {size} does not divide the width {width} of {name} in {kind}; "
            "give another size"
        )


def parallelize_block(block: nn.Module, plan: dict[str, str], mesh: DeviceMesh) -> None:
    """Divide the layers of a block in place; each rank keeps its part.

    LoRA follows the layer it is put on: where outputs are divided, so are those of its second
    matrix, where inputs are, so are those of its first.

    Args:
        block: A decoder block whose weights are equal on all ranks, on their device.
        plan: From ``block_plan``.
        mesh: The tensor parallel group, one dimension.
    """
    for name, style in plan.items():
        layer: Any = _submodule(block, name)
        if layer is None:
            continue
        if not hasattr(layer, "base_layer"):
            _parallelize(layer, style, mesh)
            continue
        _parallelize(layer.base_layer, style, mesh)
        for adapter in (layer.lora_B if style in _COLWISE else layer.lora_A).values():
            _parallelize(adapter, style, mesh)


def _parallelize(layer: nn.Module, style: str, mesh: DeviceMesh) -> None:
    trained = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
    # Every rank has the whole weights and takes its part of them, without a word to the others.
    parallelize_module(layer, mesh, _torch_style(style), src_data_rank=None)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(trained[name])


def _torch_style(style: str) -> ParallelStyle:
    if style in _COLWISE:
        return ColwiseParallel(output_layouts=Replicate() if style != "colwise" else None)
    if style in _ROWWISE:
        return RowwiseParallel(input_layouts=Replicate() if style != "rowwise" else None)
    # Heads, dimension 2 of (batch, time, heads, width), are divided as a sequence would be.
    return SequenceParallel(sequence_dim=2, use_local_output=True)


def _submodule(block: nn.Module, name: str) -> Any:
    """What the block has under a dotted name: a module, a parameter, or ``None``."""
    found: Any = block
    for part in name.split("."):
        found = getattr(found, part, None)
    return found
