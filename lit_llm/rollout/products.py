"""Matrix products with a model's weights as they are at some moment, laid out for small batches.

Legend: N rows, D width of the input, E width of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Asked for by name, since a build of PyTorch without oneDNN has no such operator.
_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_BATCH_ROWS = 16  # for which oneDNN chooses its layout; it fits larger and smaller batches


class Weights(NamedTuple):
    """What a linear layer multiplies with.

    Attributes:
        weight: (E, D).
        bias: (E,), if any.
        adapters: Pairs (r, D) and (E, r) whose products are added to the weight.
    """

    weight: Tensor
    bias: Tensor | None
    adapters: list[tuple[Tensor, Tensor]]


def weights_of(module: nn.Module) -> Weights | None:
    """The weights of a linear layer; ``None`` where it is more than a product (or quantized).

    Args:
        module: A linear layer, with or without LoRA adapters of peft. Adapters that are switched
            off are left out.
    """
    if type(module).forward is nn.Linear.forward:
        linear: Any = module
        return Weights(linear.weight, linear.bias, []) if _is_plain(linear.weight) else None
    if not type(module).__module__.startswith("peft."):
        return None
    from peft.tuners.lora.layer import Linear as LoraLinear

    if type(module) is not LoraLinear:
        return None
    base = weights_of(module.get_base_layer())
    if base is None or module.fan_in_fan_out:
        return None
    if module.disable_adapters or module.merged:
        return base if not (module.disable_adapters and module.merged) else None
    adapters = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        down, up = weights_of(module.lora_A[name]), weights_of(module.lora_B[name])
        # DoRA and its like change more than the weight.
        plain = down and up and down.bias is None and up.bias is None
        if not plain or name in module.lora_variant:
            return None
        assert down is not None and up is not None
        adapters.append((down.weight, up.weight * module.scaling[name]))
    return Weights(base.weight, base.bias, adapters)


def _is_plain(weight: Tensor) -> bool:
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype in kinds


class Product:
    """Several linear layers of one input, as one product.

    On a CPU the weights are copied into the layout in which oneDNN multiplies small batches with
    them, which takes half the time of PyTorch's own layout, and less in bfloat16.

    Args:
        parts: Weights of each layer; their outputs stand side by side.
        dtype: Of the products.
        in_place: Keep the weights that have this dtype where they are.
    """

    def __init__(
        self, parts: Sequence[Weights], dtype: torch.dtype, *, in_place: bool = False
    ) -> None:
        in_place = in_place and all(part.weight.dtype == dtype for part in parts)
        adapters = [part.adapters for part in parts]
        self._adapter: tuple[Tensor, Tensor] | None = None
        # Half precision would swallow small changes of the weights: there adapters stay apart.
        merge = dtype == torch.float32 and not in_place
        if any(adapters) and not merge:
            self._adapter = _side_by_side(parts, dtype)
        weights = [
            part.weight.detach() if in_place else _copy(part, dtype, merge) for part in parts
        ]
        self._weights = weights if in_place else [torch.cat(weights) if weights[1:] else weights[0]]
        self._bias = None
        if any(part.bias is not None for part in parts):
            self._bias = torch.cat([_bias(part) for part in parts]).to(dtype)
        self._packed: Tensor | None = None
        if not in_place and can_pack(self._weights[0]):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weights[0], _BATCH_ROWS)
            self._weights = []

    def __call__(self, rows: Tensor) -> Tensor:
        """(N, D) -> (N, E)."""
        if self._packed is not None:
            out = _linear(rows, self._packed, self._bias, "none", [], "")
        elif len(self._weights) == 1:
            out = F.linear(rows, self._weights[0], self._bias)
        else:
            out = torch.cat([F.linear(rows, weight) for weight in self._weights], dim=1)
            out = out if self._bias is None else out.add_(self._bias)
        return out if self._adapter is None else self._adapted(rows, out)

    def silu(self, rows: Tensor) -> Tensor:
        """SiLU of the product."""
        if self._packed is None or self._adapter is not None:
            return F.silu(self(rows), inplace=True)
        out: Tensor = _linear(rows, self._packed, self._bias, "swish", [], "")
        return out

    def times(self, rows: Tensor, other: Tensor) -> Tensor:
        """The product times ``other`` (N, E), element by element."""
        if self._packed is None or self._adapter is not None:
            return self(rows).mul_(other)
        out: Tensor = _linear.binary(rows, other, self._packed, self._bias, "mul")
        return out

    def plus(self, rows: Tensor, other: Tensor) -> Tensor:
        """The product plus ``other`` (N, E), in the dtype of ``other``."""
        if self._packed is None or self._adapter is not None or other.dtype != rows.dtype:
            return other + self(rows)
        out: Tensor = _linear.binary(rows, other, self._packed, self._bias, "add")
        return out

    def _adapted(self, rows: Tensor, out: Tensor) -> Tensor:
        assert self._adapter is not None
        down, up = self._adapter
        return out.addmm_(rows @ down, up)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN multiplies with weights of this kind in a layout of its own."""
    if weight.device.type != "cpu" or _linear is None or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def _copy(part: Weights, dtype: torch.dtype, merge: bool) -> Tensor:
    weight = part.weight.detach()
    if merge:
        for down, up in part.adapters:
            weight = torch.addmm(weight.float(), up.float(), down.float())
    return weight.to(dtype)


def _bias(part: Weights) -> Tensor:
    if part.bias is None:
        return part.weight.new_zeros(len(part.weight))
    return part.bias.detach()


def _side_by_side(parts: Sequence[Weights], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All adapters as one pair (D, R) and (R, E); each reaches its own layer's output only."""
    downs, ups = [], []
    for part in parts:
        pairs = part.adapters or [(part.weight[:0], part.weight[:, :0])]
        downs += [down.t() for down, _ in pairs]
        ups.append(torch.cat([up.t() for _, up in pairs]))
    return torch.cat(downs, dim=1).to(dtype).contiguous(), torch.block_diag(*ups).to(dtype)
