"""FSDP2, alone or over tensor parallel groups, on CPUs and GPUs.

Weights are divided among the data parallel ranks, block by block, and gathered for the moment they
are needed (https://pytorch.org/docs/stable/distributed.fsdp.fully_shard.html).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from lit_llm.errors import UserError
from lit_llm.strategies.blocks import blocks_of, outermost_models
from lit_llm.strategies.checkpoint_io import AtomicCheckpointIO
from lit_llm.strategies.launch import check_half_gather
from lit_llm.strategies.names import plain_name
from lit_llm.strategies.sharded_checkpoint import (
    METADATA,
    load_metadata,
    load_optimizer,
    load_weights,
    save_sharded,
)
from lit_llm.strategies.shards import (
    divided_as,
    make_equal,
    reshard,
    shard,
    shard_of,
    whole,
)
from lit_llm.strategies.tensor_parallel import block_plan, check_divisible, parallelize_block


class FSDP2Strategy(ModelParallelStrategy):
    """Divide weights, gradients and optimizer state among the ranks (FSDP2), products too if asked.

    The module is built whole on every rank; this divides the blocks of every transformers model in
    it, and the rest as one.

    Args:
        data_parallel_size: Groups of ranks that read different data; ``auto`` is the number of
            ranks divided by ``tensor_parallel_size``.
        tensor_parallel_size: Ranks that share the products of each block and read the same data;
            ``auto`` is the number of devices of a node.
        sharded_checkpoints: Write checkpoints as folders into which every rank puts its part,
            instead of one file.
        half_gather: Under bf16-mixed, gather the weights in bfloat16: half the communication.
        timeout_minutes: How long a rank waits for the others before it gives up.

    Raises:
        UserError: For sizes that make no sense.
    """

    def __init__(
        self,
        data_parallel_size: int | Literal["auto"] = "auto",
        tensor_parallel_size: int | Literal["auto"] = 1,
        sharded_checkpoints: bool = False,
        half_gather: bool = False,
        timeout_minutes: float = 30,
    ) -> None:
        for size in (data_parallel_size, tensor_parallel_size):
            if size != "auto" and size < 1:
                raise UserError(f"parallel sizes must be at least 1 or 'auto', got {size}")
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=sharded_checkpoints,
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.half_gather = half_gather
        self.checkpoint_io = AtomicCheckpointIO()
        self._unread: Path | None = None  # a sharded checkpoint, until there are shards to fill

    # ----- the ranks ----------------------------------------------------------------------------

    def check(self, trainer: Trainer) -> None:
        """Refuse, before the ranks are started, what they could not do.

        Raises:
            UserError: The sizes do not make up the number of ranks, or ``half_gather`` does not go
                with the precision.
        """
        self._find_sizes()
        self._precision_policy()

    def setup_environment(self) -> None:
        """Find the sizes of the groups, and connect the ranks."""
        self._find_sizes()
        super().setup_environment()

    def _find_sizes(self) -> None:
        world = self.num_nodes * self.num_processes
        if self._tensor_parallel_size == "auto":
            self._tensor_parallel_size = self.num_processes
        if self._data_parallel_size == "auto":
            self._data_parallel_size = max(1, world // self._tensor_parallel_size)
        if self._data_parallel_size * self._tensor_parallel_size != world:
            raise UserError(
                f"{self._data_parallel_size} x {self._tensor_parallel_size} (data_parallel_size x "
                f"tensor_parallel_size) is not the number of devices of all nodes, {world}; change "
                "--trainer.devices, or the sizes (as in recipes/strategies/tensor_parallel.yaml)"
            )

    # ----- sharding -----------------------------------------------------------------------------

    def setup(self, trainer: Trainer) -> None:
        """Shard the module, the first time; build the optimizers over its shards.

        Raises:
            UserError: The model cannot be divided like this.
        """
        if not isinstance(self.model, FSDPModule):
            assert self.model is not None
            self.model = self.precision_plugin.convert_module(self.model)
            make_equal(self.model, self.root_device)
            self._shard(self.model)
        # What an evaluation left gathered is no parameter: an optimizer would train a copy of it.
        reshard(self.model)
        loops = (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop)
        for loop in (*loops, trainer.predict_loop):
            loop.inference_mode = False  # weights gathered in it could not be trained on later
        if self._unread is not None:
            load_weights(self._unread, self.model, left_out=self._left_out())
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            self._unread = None

    def _shard(self, root: nn.Module) -> None:
        assert isinstance(self._tensor_parallel_size, int)
        models = list(outermost_models(root))
        plans: list[dict[str, str]] = [{} for _ in models]
        if self._tensor_parallel_size > 1:
            if not models:
                raise UserError("there is no transformers model to divide by tensor parallelism")
            plans = [block_plan(model) for model in models]
            for model, plan in zip(models, plans, strict=True):
                check_divisible(model, plan, self._tensor_parallel_size)
            # It warns that weights divided twice are gathered twice, which is what is meant.
            logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        settings: dict[str, Any] = {
            "mesh": self.device_mesh["data_parallel"],
            "mp_policy": self._precision_policy(),
        }
        for model, plan in zip(models, plans, strict=True):
            for block in blocks_of(model):
                if isinstance(block, FSDPModule):
                    continue  # two models share it
                if plan:
                    block.to(self.root_device)
                    parallelize_block(block, plan, self.device_mesh["tensor_parallel"])
                shard(block, settings)
        shard(root, settings)

    def _precision_policy(self) -> MixedPrecisionPolicy:
        """Gradients are added up in float32 whatever the weights are; inputs stay as they are."""
        check_half_gather(self.half_gather, self.precision_plugin.precision)
        return MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if self.half_gather else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Step, and forget weights that a forward pass without a backward pass left gathered."""
        result = super().optimizer_step(*args, **kwargs)
        reshard(self.model)
        return result

    # ----- steps: all through the root, whose hooks gather the weights outside the blocks -------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step between the hooks of the root."""
        with self.precision_plugin.train_step_context():
            return self._by_root("training_step", *args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step between the hooks of the root."""
        with self.precision_plugin.val_step_context():
            return self._by_root("validation_step", *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step between the hooks of the root."""
        with self.precision_plugin.test_step_context():
            return self._by_root("test_step", *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step between the hooks of the root."""
        with self.precision_plugin.predict_step_context():
            return self._by_root("predict_step", *args, **kwargs)

    def _by_root(self, method: str, *args: Any, **kwargs: Any) -> Any:
        assert self.model is not None and self.lightning_module is not None
        return self._forward_redirection(self.model, self.lightning_module, method, *args, **kwargs)

    # ----- checkpoints --------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are read into the whole module, before it is divided."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning calls ``load_optimizer_state_dict`` once the optimizers are there."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights on rank 0 as one process has them; nothing if they are saved in parts."""
        module: Any = self.lightning_module
        reshard(module)
        if self._save_distributed_checkpoint:
            return {}
        left_out = self._left_out()
        state = {plain_name(name): value for name, value in module.state_dict().items()}
        state = {name: value for name, value in state.items() if name not in left_out}
        same = {
            plain_name(name): id(parameter)
            for name, parameter in module.named_parameters(remove_duplicate=False)
        }
        gathered: dict[int, Any] = {}  # tied weights are gathered, and written, once
        saved: dict[str, Any] = {}
        for name, value in state.items():
            key = same.get(name, id(value))
            if key not in gathered:
                gathered[key] = self._on_rank_zero(value)
            saved[name] = gathered[key]
        return saved if self.global_rank == 0 else {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The state on rank 0 as one process has it; nothing if it is saved in parts."""
        if self._save_distributed_checkpoint:
            return {}
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        state: dict[str, Any] = optimizer.state_dict()
        state["state"] = {
            index: {name: self._on_rank_zero(value) for name, value in values.items()}
            for index, values in state["state"].items()
        }
        return state if self.global_rank == 0 else {}

    def _on_rank_zero(self, value: Any) -> Any:
        """The whole tensor in rank 0's memory, nothing elsewhere; all ranks have to call it."""
        if not isinstance(value, Tensor):
            return value
        value = whole(value.detach())
        return value.cpu() if self.global_rank == 0 else None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write the checkpoint: rank 0 a file, or all ranks their parts of a folder."""
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            if self.is_global_zero and (path / METADATA).exists():
                shutil.rmtree(path)  # a file cannot take the place of a folder
            Strategy.save_checkpoint(self, checkpoint, path, storage_options)
            return
        assert self.lightning_module is not None
        optimizers = self.optimizers if "optimizer_states" in checkpoint else ()
        save_sharded(path, checkpoint, self.lightning_module, optimizers, left_out=self._left_out())

    def _left_out(self) -> set[str]:
        """Names of what the module has no need of in a checkpoint."""
        left_out: Callable[[], set[str]] = getattr(self.lightning_module, "left_out", set)
        return left_out()

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, of a folder all but weights and optimizer state."""
        path = Path(checkpoint_path)
        if not path.is_dir():
            return Strategy.load_checkpoint(self, path, weights_only)
        self._unread = path
        return load_metadata(path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put the weights of a file into the module, divided or not.

        Raises:
            UserError: A weight is missing or unknown.
        """
        module = self.lightning_module
        assert module is not None
        if self._unread is not None:
            return  # once there are shards
        if not isinstance(module, FSDPModule):
            super(ModelParallelStrategy, self).load_model_state_dict(checkpoint, strict)
            return
        reshard(module)
        own = {plain_name(name): value for name, value in module.state_dict().items()}
        differing = own.keys() ^ checkpoint["state_dict"].keys()
        if strict and differing:
            raise UserError(f"the checkpoint is of another model: {min(differing)} is not in both")
        with torch.no_grad():
            for name, value in checkpoint["state_dict"].items():
                if name in own and isinstance(own[name], DTensor):
                    own[name].to_local().copy_(shard_of(value, own[name]))
                elif name in own:
                    own[name].copy_(value)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Divide the optimizer state of a file as the parameters are."""
        assert self.lightning_module is not None
        if self._unread is not None:
            for number, optimizer in enumerate(self.optimizers):
                load_optimizer(self._unread, self.lightning_module, optimizer, number=number)
            self._unread = None
            return
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            divided = {
                index: {
                    name: divided_as(value, parameters[int(index)])
                    for name, value in values.items()
                }
                for index, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": divided})
