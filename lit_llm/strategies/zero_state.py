"""Weights and optimizer states that DeepSpeed has cut up: put together, and cut up again.

In a checkpoint they look as a single process would have written them, so that any strategy can go
on from it. All functions are collective: every rank has to call them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_llm.errors import UserError


@torch.no_grad()
def whole_parameter(parameter: nn.Parameter, *, trained: bool) -> Tensor:
    """The whole value of a parameter, in the precision that the optimizer keeps.

    Args:
        parameter: A parameter of a module that DeepSpeed holds.
        trained: Whether an optimizer has been set up for it.

    Returns:
        The value, on the parameter's device; it may be the parameter itself.
    """
    if trained and parameter.requires_grad and parameter.dtype != torch.float32:
        from deepspeed.utils import safe_get_full_fp32_param

        value: Tensor = safe_get_full_fp32_param(parameter)
        return value
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def gather_weights(
    module: nn.Module,
    left_out: set[str],
    exact: dict[int, Tensor | None],
    *,
    trained: bool,
    keep: bool,
) -> dict[str, Tensor]:
    """A module's state, whole, on the host.

    Args:
        module: The module that DeepSpeed holds.
        left_out: Names that are not asked for; they are not gathered.
        exact: What to take for a frozen parameter that was rounded, by the parameter's identity.
        trained: Whether an optimizer has been set up.
        keep: Whether this rank wants the result; the others get an empty one.
    """
    state: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # tied parameters are written once
    for name, value in module.state_dict(keep_vars=True).items():
        if name in left_out:
            continue
        if id(value) not in seen:
            whole = exact.get(id(value))
            if id(value) not in exact and isinstance(value, nn.Parameter):
                whole = whole_parameter(value, trained=trained)
            # Cloned, as a part of a flat buffer would be written with all of the buffer.
            kept = (value if whole is None else whole).detach().cpu().clone() if keep else value
            seen[id(value)] = kept
        state[name] = seen[id(value)]
    return state if keep else {}


def set_master(parameter: nn.Parameter, value: Tensor) -> None:
    """Set this rank's part of the float32 weights that the optimizer keeps.

    Args:
        parameter: A trained parameter.
        value: Its whole value.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(parameter, "ds_id"):
        safe_set_local_fp32_param(parameter, _own_part(parameter, value))
    else:
        safe_set_full_fp32_param(parameter, value)


def _own_part(parameter: Any, value: Tensor) -> Tensor:
    """This rank's part of a value, padded as stage 3 cuts it."""
    size = parameter.ds_tensor.numel()
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    own = value.reshape(-1)[rank * size : (rank + 1) * size]
    return nn.functional.pad(own.float(), (0, size - own.numel()))


class OptimizerLayout:
    """Which parameters and options an optimizer's groups had before DeepSpeed flattened them.

    Args:
        optimizer: The torch optimizer, not wrapped yet.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        self.options = [set(group) - {"params"} for group in optimizer.param_groups]

    def _numbered(self) -> list[list[tuple[int, nn.Parameter]]]:
        numbered, number = [], 0
        for group in self.groups:
            numbered.append(list(enumerate(group, start=number)))
            number += len(group)
        return numbered

    @torch.no_grad()
    def gather(self, wrapped: Any, *, keep: bool) -> dict[str, Any]:
        """What the ``state_dict()`` of one process's optimizer would be.

        Args:
            wrapped: DeepSpeed's optimizer.
            keep: Whether this rank wants the result; the others get an empty one.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        states: dict[int, dict[str, Any]] = {}
        groups = []
        base = wrapped.optimizer
        _link_states(wrapped)
        for numbered, names, now in zip(
            self._numbered(), self.options, base.param_groups, strict=True
        ):
            numbers = [number for number, _ in numbered]
            groups.append({**{k: v for k, v in now.items() if k in names}, "params": numbers})
            for number, parameter in numbered:
                if not parameter.requires_grad:
                    continue
                for key, value in base.state.get(flat_part(wrapped, parameter), {}).items():
                    whole = value
                    if isinstance(value, Tensor) and value.ndim > 0:
                        whole = safe_get_full_optimizer_state(parameter, key)
                    if keep:
                        copy = whole.detach().cpu().clone() if isinstance(whole, Tensor) else whole
                        states.setdefault(number, {})[key] = copy
        return {"state": states, "param_groups": groups} if keep else {}

    @torch.no_grad()
    def restore(self, wrapped: Any, saved: dict[str, Any]) -> None:
        """Give each rank its part of a state that ``gather``, or a single process, has made.

        Args:
            wrapped: DeepSpeed's optimizer, which has not stepped yet.
            saved: As ``torch.optim.Optimizer.state_dict()`` gives it.

        Raises:
            UserError: It is of an optimizer over other groups.
        """
        sizes = [len(group) for group in self.groups]
        if sizes != [len(group["params"]) for group in saved["param_groups"]]:
            raise UserError(
                "the checkpoint is of an optimizer over other parameters; resume with the settings "
                "it was trained with, or give another --output_dir"
            )
        base = wrapped.optimizer
        for now, then in zip(base.param_groups, saved["param_groups"], strict=True):
            now.update({key: value for key, value in then.items() if key != "params"})
        parts: list[tuple[nn.Parameter, str, Tensor]] = []
        for numbered, options in zip(self._numbered(), base.param_groups, strict=True):
            for number, parameter in numbered:
                if not parameter.requires_grad:
                    continue
                flat = flat_part(wrapped, parameter)
                for key, value in saved["state"].get(number, {}).items():
                    if isinstance(value, Tensor) and value.ndim > 0:
                        base.state[flat].setdefault(key, torch.zeros_like(flat))
                        parts.append((parameter, key, value))
                    else:
                        _keep_largest(base.state[flat], key, value, flat, options)
        _link_states(wrapped)
        for parameter, key, value in parts:
            _set_state(parameter, key, value)


def _link_states(wrapped: Any) -> None:
    """Tell the parameters of stages 1 and 2 where their parts of the state are.

    DeepSpeed does so once, after the step of the first group, when the others have no state yet.
    """
    if wrapped.optimizer.state and hasattr(wrapped, "_lazy_init_hp_params_optimizer_state"):
        wrapped._hp_optimizer_states_linked = False
        wrapped._lazy_init_hp_params_optimizer_state()


def _keep_largest(
    state: dict[str, Any], key: str, value: Any, flat: Tensor, options: dict[str, Any]
) -> None:
    """Count the steps of a flat part as those of the parameter in it that has made the most.

    A single process does not step a parameter that has no gradient; DeepSpeed does.
    """
    if not isinstance(value, Tensor):
        state[key] = value
        return
    on_device = options.get("fused") or options.get("capturable")
    value = value.detach().clone().to(flat.device if on_device else "cpu")
    state[key] = torch.maximum(state[key], value) if key in state else value


def _set_state(parameter: nn.Parameter, key: str, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if hasattr(parameter, "ds_id"):
        safe_set_local_optimizer_state(parameter, _own_part(parameter, value), key)
    else:
        safe_set_full_optimizer_state(parameter, value.float(), key)


def flat_part(wrapped: Any, parameter: nn.Parameter) -> Tensor:
    """The flat tensor that the optimizer steps and that this parameter has a part in.

    Args:
        wrapped: DeepSpeed's optimizer.
        parameter: A trained parameter.
    """
    if hasattr(parameter, "ds_id"):
        group = wrapped.grad_position[wrapped.get_param_id(parameter)][0]
        return wrapped.fp32_partitioned_groups_flat[group]
    for group, members in enumerate(wrapped.bit16_groups):
        if any(member is parameter for member in members):
            return wrapped.single_partition_of_fp32_groups[group]
    raise KeyError("the parameter is not one of the optimizer's")


def clear_gradients(wrapped: Any) -> None:
    """Zero the buffers that gradients of a new window are written to.

    DeepSpeed writes the parameters that the backward pass reaches, and would step the others by
    what they were given in an earlier window.

    Args:
        wrapped: DeepSpeed's optimizer.
    """
    if hasattr(wrapped, "grad_partitions_flat_buffer"):  # stage 3
        wrapped.grad_partitions_flat_buffer.zero_()
        flats = wrapped.fp32_partitioned_groups_flat
    else:
        for buffer in getattr(wrapped, "accumulated_grads_in_cpu", {}).values():
            buffer.zero_()
        flats = wrapped.single_partition_of_fp32_groups
    for flat in flats:
        if flat.grad is not None:  # offloaded
            flat.grad.zero_()


def forget_gradients(engine: Any) -> None:
    """Drop the gradients of an accumulation window, as if it had not begun.

    Args:
        engine: DeepSpeed's engine.
    """
    wrapped = engine.optimizer
    wrapped.zero_grad()
    wrapped.clear_backward_seen_flag()
    if hasattr(wrapped, "grad_partitions_flat_buffer"):
        wrapped.micro_step_id = 0
        wrapped._offload_boundary_param_ids = set()
    else:
        wrapped.micro_step_id = -1
        wrapped._offload_accumulated_param_ids = set()
        for group in range(len(wrapped.bit16_groups)):
            wrapped.all_grad_tensors[group] = None
            wrapped.averaged_gradients[group] = None
    wrapped.norm_for_param_grads = {}
    engine._unmanaged_backward_count = 0
