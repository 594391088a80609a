"""DeepSpeed's engines: their settings, and how a module gets into one and out again."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from torch import Tensor, nn

from lit_llm.errors import UserError
from lit_llm.strategies.blocks import blocks_of, outermost_models
from lit_llm.strategies.zero_state import whole_parameter


class ZeROPrecision(DeepSpeedPrecision):
    """Precision under DeepSpeed without its cast of inputs: pair weights and margins stay exact."""

    def convert_input(self, data: Any) -> Any:
        """Leave a batch as it is."""
        return data


class AutocastRedirection(_ForwardRedirection):
    """Calls steps through the root, with autocast inside of it: DeepSpeed ends what is outside.

    Args:
        autocast: Makes the context of a step.
    """

    def __init__(self, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.autocast = autocast

    def __call__(
        self, wrapper_module: Any, original_module: Any, method_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        """Call a method of a module as the forward of what wraps it."""
        forward = original_module.forward

        def redirected(*args: Any, **kwargs: Any) -> Any:
            original_module.forward = forward
            with self.autocast():
                return getattr(original_module, method_name)(*args, **kwargs)

        original_module.forward = redirected
        try:
            return wrapper_module(*args, **kwargs)
        finally:
            original_module.forward = forward


def engine_config(stage: int, offload_optimizer: bool) -> dict[str, Any]:
    """DeepSpeed's settings.

    Args:
        stage: Of ZeRO.
        offload_optimizer: Keep the optimizer's state in host memory.
    """
    on_cuda = torch.cuda.is_available()
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": on_cuda,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
        "sub_group_size": 10**12,  # one flat part for each group of the optimizer
    }
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_cuda}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's own optimizers step on the host too, and need no C++ compiler.
        "zero_force_ds_cpu_optimizer": False,
        # Lightning tells when to step: a window may be shorter than accumulate_grad_batches.
        "managed_gradient_accumulation": False,
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 1,
        "communication_data_type": "fp32",
    }


def build_engine(
    module: nn.Module,
    config: dict[str, Any],
    optimizer: torch.optim.Optimizer | None,
    device: torch.device,
    local_rank: int,
) -> Any:
    """Divide a whole module among the ranks; all of them have to call it.

    Args:
        module: The root, with trained weights of one data type.
        config: DeepSpeed's settings.
        optimizer: Over parameters of the module; ``None`` is for evaluation only, in stage 3.
        device: Of this rank.
        local_rank: Number of this rank on its machine.

    Returns:
        DeepSpeed's engine.

    Raises:
        UserError: DeepSpeed cannot hold this module, or is too old.
    """
    import deepspeed

    stage = config["zero_optimization"]["stage"]
    parameters = list(module.parameters())
    half = all(parameter.dtype == torch.bfloat16 for parameter in parameters)
    config = {**config, "bf16": {"enabled": half}}
    # What is frozen may be in half precision beside float32 weights, as reward models are.
    mixed = len({parameter.dtype for parameter in parameters if parameter.requires_grad}) > 1
    if mixed or not all(parameter.is_floating_point() for parameter in parameters):
        raise UserError(
            "DeepSpeed wants all trained weights in one data type, and none quantised; train "
            "this under another strategy (--trainer.strategy ddp)"
        )
    if stage == 3:
        # One by one, as all of them might not fit on the device.
        deepspeed.zero.Init(module=module, config_dict_or_path=config)
    module.to(device)
    engine, *_ = deepspeed.initialize(
        args=argparse.Namespace(device_rank=local_rank),
        config=config,
        model=module,
        optimizer=optimizer,
        model_parameters=[p for p in module.parameters() if p.requires_grad and optimizer],
        dist_init_required=False,
    )
    if not hasattr(engine, "managed_gradient_accumulation"):
        raise UserError("this deepspeed is too old; update it: pip install -U deepspeed")
    if stage == 3:
        for parameter in _outside_blocks(module):
            # The output head's weight is used without its module being called.
            deepspeed.zero.register_external_parameter(module, parameter)
    return engine


@torch.no_grad()
def undo_engine(
    engine: Any,
    module: nn.Module,
    exact: dict[int, Tensor | None],
    *,
    trained: bool,
    share: Callable[[Any], Any],
) -> None:
    """Make a module whole again, on every rank's host, with new parameters.

    Args:
        engine: DeepSpeed's engine, which ends here.
        module: Its module.
        exact: What to take for a frozen parameter that was rounded; values on rank 0 only.
        trained: Whether the engine has an optimizer.
        share: Gives all ranks what rank 0 has.
    """
    whole: dict[int, nn.Parameter] = {}
    for parameter in module.parameters():
        value = whole_parameter(parameter, trained=trained)
        if id(parameter) in exact:
            value = share(exact[id(parameter)])
        value = value.detach().cpu().clone()
        whole[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    engine.destroy()
    for child in module.modules():
        own = {name: p if p is None else whole[id(p)] for name, p in child._parameters.items()}
        child._parameters = own  # stage 3 has put a dictionary that gathers there
        child.__dict__.pop("_external_params", None)


def _outside_blocks(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that belong to the root: those of no block of a transformers model."""
    blocks = (block for model in outermost_models(module) for block in blocks_of(model))
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    return [parameter for parameter in module.parameters() if id(parameter) not in inside]
