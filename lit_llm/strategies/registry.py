"""Strategies by name: the one argument that changes when the hardware does."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from lit_llm.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


def _fsdp() -> Strategy:
    from lit_llm.strategies.fsdp1 import FSDP1Strategy

    return FSDP1Strategy()


def _fsdp2() -> Strategy:
    from lit_llm.strategies.fsdp2 import FSDP2Strategy

    return FSDP2Strategy()


def _tensor_parallel() -> Strategy:
    from lit_llm.strategies.fsdp2 import FSDP2Strategy

    return FSDP2Strategy(tensor_parallel_size=2)


def _zero(stage: Literal[1, 2, 3], offload: bool = False) -> Callable[[], Strategy]:
    def build() -> Strategy:
        check_deepspeed()
        from lit_llm.strategies.zero import ZeROStrategy

        return ZeROStrategy(stage=stage, offload_optimizer=offload)

    return build


STRATEGIES: dict[str, Callable[[], Any]] = {
    "auto": lambda: "auto",
    "ddp": lambda: "ddp",
    "fsdp": _fsdp,
    "fsdp2": _fsdp2,
    "tensor_parallel": _tensor_parallel,
    "deepspeed_zero1": _zero(1),
    "deepspeed_zero2": _zero(2),
    "deepspeed_zero3": _zero(3),
    "deepspeed_zero3_offload": _zero(3, offload=True),
}
"""What builds each strategy that ``--trainer.strategy`` names; Lightning knows the first two."""


_FREE = 0.7  # of a device's memory for weights and optimizer; the rest is for activations
_TRAINED = 16  # bytes of a parameter that is trained: itself, its gradient, AdamW's two moments


def simplest_strategy(devices: int, parameters: int, memory: int) -> str:
    """What ``auto`` stands for: the simplest strategy that suits the devices found.

    Args:
        devices: How many take part, over all nodes.
        parameters: Of the model that is trained, all of them.
        memory: Bytes of one device.

    Returns:
        A strategy's name: ``auto``, where Lightning needs none, ``ddp`` or ``fsdp2``.
    """
    if devices < 2:
        return "auto"
    return "ddp" if _TRAINED * parameters <= _FREE * memory else "fsdp2"


def found_devices(accelerator: str, devices: Any, num_nodes: int) -> tuple[int, int | None]:
    """How many devices a trainer will find, and the memory of one.

    Args:
        accelerator: As ``trainer.accelerator``.
        devices: As ``trainer.devices``.
        num_nodes: As ``trainer.num_nodes``.

    Returns:
        Their number over all nodes; bytes, or ``None`` on a CPU.
    """
    import torch

    cuda = torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")
    count = torch.cuda.device_count() if cuda else 1
    if isinstance(devices, list):
        count = len(devices)
    elif str(devices) not in ("auto", "-1"):
        count = int(devices) if str(devices).isdigit() else len(str(devices).split(","))
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else None
    return count * num_nodes, memory


def build_strategy(name: str) -> Strategy | str:
    """The strategy of a name.

    Args:
        name: One of ``STRATEGIES``, or of Lightning's own that no rank shares weights under.

    Returns:
        What ``Trainer(strategy=...)`` takes.

    Raises:
        UserError: Nobody registered it; it names the nearest. Or deepspeed is not installed.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]()
    from lightning.pytorch.strategies import StrategyRegistry

    others = [n for n in StrategyRegistry.available_strategies() if not n.startswith(_REPLACED)]
    if name in others:
        return name
    near = get_close_matches(name, [*STRATEGIES, *others], n=3, cutoff=0.4)
    raise UserError(
        f"there is no strategy named '{name}' (--trainer.strategy); "
        f"did you mean {' or '.join(near or ['auto', 'ddp', 'fsdp2'])}?"
    )


# Lightning's own of these names train on CUDA only, or make the mistakes that ours correct.
_REPLACED = ("fsdp", "deepspeed")


def check_deepspeed() -> None:
    """Refuse a deepspeed strategy where deepspeed is not installed.

    Raises:
        UserError: It is not.
    """
    if find_spec("deepspeed") is None:
        raise UserError(
            "this strategy needs deepspeed, which is not installed; "
            "install it: pip install 'deepspeed>=0.19.8'"
        )
