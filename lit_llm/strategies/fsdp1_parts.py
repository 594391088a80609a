"""What FSDP1 shards together, and the precision it computes in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.plugins.precision import FSDPPrecision
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

from lit_llm.errors import UserError
from lit_llm.strategies.blocks import blocks_of, outermost_models
from lit_llm.strategies.launch import check_half_gather
from lit_llm.strategies.names import plain_name


class FSDP1Precision(FSDPPrecision):
    """Mixed precision as under DDP: float32 weights and reductions, autocast, inputs as they are.

    Args:
        precision: As in ``Trainer(precision=...)``.
        half_gather: Under mixed precision gather weights in its half precision.
        device_type: What autocast is for.

    Raises:
        UserError: There is no such precision to gather weights in.
    """

    def __init__(self, precision: Any, half_gather: bool, device_type: str) -> None:
        # float16 is a half precision, too.
        check_half_gather(half_gather and precision != "16-mixed", precision)
        super().__init__(precision)
        self.half_gather = half_gather
        self.device_type = device_type

    @property
    def mixed_precision_config(self) -> MixedPrecision | None:  # type: ignore[override]
        """What FSDP1 casts: no inputs, no buffers, and weights only if they are to be halved."""
        if self.precision == "32-true":
            return None
        halved = torch.float16 if self.precision == "16-mixed" else torch.bfloat16
        return MixedPrecision(
            param_dtype=halved if self.half_gather and "mixed" in self.precision else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
            cast_root_forward_inputs=False,
        )

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast the module, unless it is sharded already; Lightning's would widen to float32 too."""
        if self.precision == "32-true" or any(
            isinstance(child, FullyShardedDataParallel) for child in module.modules()
        ):
            return module
        return super().convert_module(module)

    def forward_context(self) -> AbstractContextManager[Any]:
        """Lightning's is for CUDA alone."""
        if "mixed" not in self.precision:
            return super().forward_context()
        half = torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16
        return torch.autocast(self.device_type, dtype=half)

    def convert_input(self, data: Any) -> Any:
        """Leave margins and weights of samples in their precision."""
        return data


@dataclass
class Units:
    """What FSDP1 shards together, and what it lets alone."""

    modules: set[int] = field(default_factory=set)
    replicated: list[nn.Parameter] = field(default_factory=list)


def choose_units(root: nn.Module) -> Units:
    """Choose what is sharded as one: blocks, each of one data type, as FSDP1 flattens only one.

    Frozen weights of another type than their unit's stay whole on every rank, as they are few: of
    a reward model in bfloat16 beside a float32 policy, what is outside its blocks. Adapters of
    another type than the block they are in become units of their own.

    Raises:
        UserError: Weights are trained whose type is neither that of their unit nor can differ.
    """
    blocks = {id(block) for model in outermost_models(root) for block in _blocks(model)}
    units = Units(modules=set(blocks))
    for unit in root.modules():
        if unit is not root and id(unit) not in blocks:
            continue
        sizes: Counter[torch.dtype] = Counter()
        owned = list(_owned(unit, blocks))
        for _, _, parameter in owned:
            sizes[parameter.dtype] += parameter.numel()
        if len(sizes) < 2:
            continue
        usual = sizes.most_common(1)[0][0]
        for name, owner, parameter in owned:
            if parameter.dtype == usual:
                continue
            if not parameter.requires_grad:
                units.replicated.append(parameter)
            elif unit is not root and isinstance(owner, nn.Linear):
                units.modules.add(id(owner))
            else:
                raise UserError(
                    f"FSDP1 shards weights of one data type together, but {name} is "
                    f"{parameter.dtype} and trained beside {usual}; give all models one dtype, "
                    "or use --trainer.strategy fsdp2"
                )
    return units


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise UserError(
                f"FSDP1 does not shard quantised weights ({name}); "
                "use --trainer.strategy ddp, or no quantization"
            )
    return blocks_of(model)


def _owned(
    unit: nn.Module, others: set[int], prefix: str = ""
) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Parameters of a unit that are in no unit within it."""
    for name, parameter in unit.named_parameters(recurse=False):
        yield plain_name(f"{prefix}{name}"), unit, parameter
    for name, child in unit.named_children():
        if id(child) not in others:
            yield from _owned(child, others, f"{prefix}{name}.")
