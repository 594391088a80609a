"""ZeRO through DeepSpeed, on CPUs and GPUs (https://arxiv.org/abs/1910.02054).

Stage 1 divides the optimizer's state among the ranks, stage 2 the gradients too, stage 3 the
weights too.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lit_llm.errors import UserError
from lit_llm.strategies.launch import check_half_gather
from lit_llm.strategies.registry import check_deepspeed
from lit_llm.strategies.zero_checkpoint import ZeROCheckpointing, check_folder, load_folder
from lit_llm.strategies.zero_engine import (
    AutocastRedirection,
    ZeROPrecision,
    build_engine,
    engine_config,
    undo_engine,
)
from lit_llm.strategies.zero_state import (
    OptimizerLayout,
    clear_gradients,
    forget_gradients,
    set_master,
)


class ZeROStrategy(ZeROCheckpointing):
    """Divide optimizer state, gradients and weights among the ranks, as far as the stage says.

    The module is built whole on every rank. bf16-mixed computes as under DDP: float32 weights,
    products in bfloat16. Under bf16-true DeepSpeed keeps float32 weights for the optimizer.
    A parameter without gradient is stepped as one whose gradient is 0, which decays it.

    Args:
        stage: 1 divides the optimizer's state, 2 gradients too, 3 weights too.
        offload_optimizer: Keep the optimizer's state in host memory and make its steps there.
        sharded_checkpoints: Write checkpoints as folders into which every rank puts its part,
            instead of one file. Only as many ranks as have written one can train on from it.
        half_gather: Under bf16-mixed, compute with bfloat16 weights beside float32 ones of the
            optimizer: half the memory and communication of the weights, other rounding.
        timeout_minutes: How long a rank waits for the others before it gives up.

    Raises:
        UserError: deepspeed is not installed, or there is no such stage.
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        offload_optimizer: bool = False,
        sharded_checkpoints: bool = False,
        half_gather: bool = False,
        timeout_minutes: float = 30,
    ) -> None:
        check_deepspeed()
        # Of torch, about names that deepspeed still calls its collectives by.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated")
        if stage not in (1, 2, 3):
            raise UserError(f"the stage of ZeRO is 1, 2 or 3, got {stage}")
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
        super().__init__(
            stage=stage,
            config=engine_config(stage, offload_optimizer),
            logging_level=logging.ERROR,
            timeout=timedelta(minutes=timeout_minutes),
            sharded_checkpoints=sharded_checkpoints,
        )
        self.stage = stage
        self.offload_optimizer = offload_optimizer
        self.half_gather = half_gather
        self._forward_redirection = AutocastRedirection(self.autocast)
        self._in_window = False

    # ----- the ranks ----------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Connect the ranks.

        Raises:
            UserError: deepspeed has settled for another kind of device.
        """
        from deepspeed.accelerator import get_accelerator

        chosen, wanted = get_accelerator().device_name(), self.root_device.type
        if chosen != wanted:
            raise UserError(
                f"deepspeed runs on {chosen}, the trainer on {wanted}; "
                f"set the environment variable DS_ACCELERATOR={wanted}"
            )
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """Start the process group, as it is on the CPU: its devices have no index."""
        if self.root_device.type != "cpu":
            super().setup_distributed()
            return
        backend: Any = import_module("deepspeed.comm.torch")  # the package hides it behind torch
        self.set_world_ranks()
        compiled = backend.build_shm_op
        # A C++ extension for inference, which would be compiled for 20 seconds and not be used.
        backend.build_shm_op = lambda: None
        try:
            self._init_deepspeed_distributed()
        finally:
            backend.build_shm_op = compiled

    # ----- precision ----------------------------------------------------------------------------

    @property
    def precision_plugin(self) -> Precision:
        """What is done about precision outside of DeepSpeed."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if isinstance(plugin, DeepSpeedPrecision):
            plugin = ZeROPrecision(plugin.precision)  # type: ignore[arg-type]
        self._precision_plugin = plugin

    @property
    def _is_half(self) -> bool:
        """Whether DeepSpeed computes with bfloat16 weights, beside the float32 ones."""
        precision = getattr(self.precision_plugin, "precision", "32-true")
        return precision == "bf16-true" or (precision == "bf16-mixed" and self.half_gather)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a step: mixed precision, where the weights are in float32."""
        precision = getattr(self.precision_plugin, "precision", "32-true")
        if precision == "bf16-mixed":
            return torch.autocast(self.root_device.type, torch.bfloat16)
        return nullcontext()

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Build modules whole: on their device, but for stage 3, which might not fit there."""
        device = torch.device("cpu") if self.stage == 3 else self.root_device
        with device, self.precision_plugin.tensor_init_context():
            yield

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Build modules as always: what DeepSpeed does there skips transformers' initialisation."""
        yield

    # ----- engines ------------------------------------------------------------------------------

    def setup(self, trainer: Trainer) -> None:
        """Divide the module, or take the engine of an earlier run on it.

        Raises:
            UserError: DeepSpeed cannot train this.
        """
        assert self.accelerator is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        self.check(trainer)
        loops = (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop)
        for loop in (*loops, trainer.predict_loop):
            loop.inference_mode = False  # weights gathered in it could not be trained on later
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self.make_whole()
            self._start_training(trainer)
        elif self._engine is None:
            self._start_evaluation()
        self.model = self._engine or self.lightning_module
        if fitting and self._unread is not None:
            load_folder(self._unread, self._engine, self.world_size)
        self._unread, self._loaded = None, {}
        self.barrier()

    def check(self, trainer: Trainer) -> None:
        """Refuse what DeepSpeed does not do, also before the ranks are started.

        Raises:
            UserError: For the first that is so.
        """
        precision = getattr(self.precision_plugin, "precision", "32-true")
        if precision not in ("32-true", "bf16-mixed", "bf16-true"):
            raise UserError(
                f"ZeRO is not made to run with --trainer.precision {precision}; "
                "use 32-true, bf16-mixed or bf16-true"
            )
        check_half_gather(self.half_gather, precision)
        if trainer.gradient_clip_algorithm == "value":
            raise UserError(
                "DeepSpeed clips gradients by their norm only; leave "
                "--trainer.gradient_clip_algorithm at norm"
            )

    def check_folder(self, path: Path) -> None:
        """Refuse a sharded checkpoint that this strategy cannot train on from.

        Raises:
            UserError: It is damaged, or another strategy or number of ranks has written it.
        """
        check_folder(path, self.stage, self.num_nodes * self.num_processes)

    def _start_training(self, trainer: Trainer) -> None:
        module = self.lightning_module
        assert module is not None and isinstance(self.config, dict)
        before = {name: (p, p.data) for name, p in module.named_parameters()}
        self._convert(module)
        optimizer, scheduler = self._init_optimizers()
        self.lr_scheduler_configs = [] if scheduler is None else [scheduler]
        self._layout = OptimizerLayout(optimizer)
        config = {**self.config, "gradient_clipping": float(trainer.gradient_clip_val or 0.0)}
        self._engine = build_engine(module, config, optimizer, self.root_device, self.local_rank)
        self.optimizers = [self._engine.optimizer]
        if self._is_half:
            self._keep_exact(before)
        self._in_window = False

    def _keep_exact(self, before: dict[str, tuple[nn.Parameter, Tensor]]) -> None:
        """Keep the weights as they were before they were rounded to bfloat16."""
        left_out = self._left_out()
        for name, (parameter, data) in before.items():
            exact = self._loaded.get(name, data)
            if exact.dtype == torch.bfloat16:
                continue
            if parameter.requires_grad:
                set_master(parameter, exact)
            elif name not in left_out:
                self._exact[id(parameter)] = exact if self.is_global_zero else None

    def _start_evaluation(self) -> None:
        """Divide the weights for an evaluation before any training, if they might not fit whole.

        They stay in float32 under mixed precision, as the training has to begin from them.
        """
        module = self.lightning_module
        assert module is not None
        self._layout, self.optimizers, self.lr_scheduler_configs = None, [], []
        self.precision_plugin.convert_module(module)
        if self.stage < 3:
            module.to(self.root_device)
            return
        self._engine = build_engine(
            module, dict(self.config or {}), None, self.root_device, self.local_rank
        )

    def _convert(self, module: nn.Module) -> None:
        self.precision_plugin.convert_module(module)
        if self._is_half:
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(torch.bfloat16)

    def make_whole(self) -> None:
        """Undo ``setup``: whole parameters on every rank's host, in the optimizer's precision.

        All ranks have to call it. It does nothing where no engine is.
        """
        module = self.lightning_module
        if self._engine is None or module is None:
            return
        trained = self._layout is not None
        self._engine.empty_partition_cache()  # what stage 3 has fetched ahead
        undo_engine(self._engine, module, self._exact, trained=trained, share=self.broadcast)
        self._engine, self._layout, self.optimizers = None, None, []
        self._exact = {}
        self.model = module

    def teardown(self) -> None:
        """Leave a divided module where it is: a test after the training goes on with it."""
        if self._engine is None:
            super().teardown()
            return
        assert self.accelerator is not None
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    # ----- steps --------------------------------------------------------------------------------

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Lightning does; it knows where an epoch ends."""
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Nothing to hold back: gradients wait for the step, or are divided as they come."""
        yield

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run it through the root."""
        return self._step("training_step", *args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run it through the root."""
        return self._step("validation_step", *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run it through the root."""
        return self._step("test_step", *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run it through the root."""
        return self._step("predict_step", *args, **kwargs)

    def _step(self, method: str, *args: Any, **kwargs: Any) -> Any:
        assert self.model is not None and self.lightning_module is not None
        return self._forward_redirection(self.model, self.lightning_module, method, *args, **kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Add a micro-batch's gradients to those of the window; Lightning has scaled the loss."""
        if getattr(self.lightning_module, "skips_step", False):
            return closure_loss
        if not self._in_window:
            clear_gradients(self._engine.optimizer)
            self._in_window = True
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        """Step, clipping as the trainer says, unless the module skips this step.

        Raises:
            UserError: ``training_step`` returned no loss.
        """
        module = self.lightning_module
        assert module is not None
        result = closure()
        self.precision_plugin._after_closure(module, optimizer)
        self._in_window = False
        if getattr(module, "skips_step", False):
            forget_gradients(self._engine)
            return result
        if result is None:
            raise UserError("under DeepSpeed, training_step has to return a loss on every rank")
        self._engine.step()
        return result
