"""What every stage shares: optimizer, schedule, clipping, and token-correct losses."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lit_llm.errors import UserError
from lit_llm.modules.schedules import Schedule
from lit_llm.strategies.clipping import clip_grad_norm_
from lit_llm.strategies.names import plain_name


class BaseModule(LightningModule):
    """The ground of the stages: one optimizer with decay groups, one schedule, one clipping rule.

    A subclass sets ``self.model`` in ``configure_model`` and returns from ``training_step`` what
    ``global_mean`` makes of a sum over tokens.

    Args:
        optimizer: Builds the optimizer from parameter groups.
        schedule: The learning rate over the run.
    """

    def __init__(self, optimizer: OptimizerCallable, schedule: Schedule) -> None:
        super().__init__()
        self.optimizer_factory = optimizer
        self.schedule = schedule
        self.stage = f"{type(self).__module__}:{type(self).__qualname__}"
        """Import path of the class; strategies may change what ``type(self)`` says."""
        self.whole_shapes: dict[str, tuple[int, ...]] = {}
        """Shapes of the module's state before a strategy took parts of it away, by name."""
        self.optimizer_names: list[str] = []
        """Names of the optimizer's parameters, in its order."""
        self._window_targets: Tensor | None = None

    # ----- what strategies change ---------------------------------------------------------------

    def remember_shapes(self) -> None:
        """Take down what the module looks like whole; call it at the end of ``configure_model``."""
        self.whole_shapes = {name: tuple(v.shape) for name, v in self.state_dict().items()}

    def left_out(self) -> set[str]:
        """Names of what is in the module's state but in no checkpoint."""
        return set()

    @property
    def skips_step(self) -> bool:
        """Whether the optimizer step under way leaves everything as it is."""
        return False

    def by_root(self, method: str, *args: Any) -> Any:
        """Call a method of this module through the strategy's wrapper, as steps are.

        Sharded weights are whole only inside the forward of the outermost module. All ranks have to
        make the same calls.

        Args:
            method: Name of the method.
            args: What it takes.
        """
        strategy = self.trainer.strategy
        if strategy.model is None:
            return getattr(self, method)(*args)
        return strategy._forward_redirection(strategy.model, self, method, *args)

    # ----- the token-correct loss ---------------------------------------------------------------

    def global_mean(self, loss_sum: Tensor, num_targets: Tensor, batch_idx: int) -> Tensor:
        """Turn a micro-batch's summed loss into its share of the global batch's token mean.

        Lightning divides what ``training_step`` returns by ``accumulate_grad_batches``, and data
        parallel strategies average gradients over ranks. Both are right only when all micro-batches
        have equally many target tokens. Multiplying by both and dividing by the target tokens of
        the whole global batch gives the gradient of the mean over all its tokens, whatever their
        distribution, in the last, shorter accumulation window too.

        Args:
            loss_sum: Sum of the loss over this micro-batch's target tokens, 0-dim.
            num_targets: Target tokens of this rank's whole accumulation window, 0-dim.
            batch_idx: Index of the micro-batch in the epoch.

        Returns:
            The loss to hand to Lightning, 0-dim.
        """
        window = self.trainer.accumulate_grad_batches
        if self._window_targets is None or batch_idx % window == 0:
            self._window_targets = self.data_parallel_sum(num_targets)
        scale = window * self.data_parallel_size / self._window_targets.clamp(min=1)
        return loss_sum * scale

    @property
    def data_parallel_size(self) -> int:
        """Number of ranks that read different data (tensor parallel ranks read the same)."""
        kwargs = self.trainer.distributed_sampler_kwargs
        return 1 if kwargs is None else int(kwargs["num_replicas"])

    @property
    def data_parallel_group(self) -> Any:
        """The ranks that metrics are put together over; ``None`` is all of them.

        The ranks of a tensor parallel group see the same samples, which would count as often.
        """
        strategy = self.trainer.strategy
        if not isinstance(strategy, ModelParallelStrategy):
            return None
        return strategy.device_mesh["data_parallel"].get_group()

    def data_parallel_sum(self, value: Tensor) -> Tensor:
        """Sum ``value`` over the data parallel ranks."""
        if self.trainer.world_size == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        # Ranks of one tensor parallel group hold the same value and were all counted.
        copies = self.trainer.world_size // self.data_parallel_size
        return total // copies if not total.is_floating_point() else total / copies

    # ----- optimizer, schedule, clipping --------------------------------------------------------

    def total_steps(self) -> int:
        """Optimizer steps of the whole run: the horizon of the schedule.

        Counted here, as reading ``trainer.estimated_stepping_batches`` builds the data loaders
        early, which loses the state of resumable ones.
        """
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        max_steps, epochs = self.trainer.max_steps, self.trainer.max_epochs or -1
        if epochs < 0 or datamodule is None:
            if max_steps > 0:
                return int(max_steps)
            raise UserError(
                "the run has no end, so the learning-rate schedule has no horizon; "
                "set --trainer.max_steps or --trainer.max_epochs"
            )
        steps = math.ceil(datamodule.batches_per_epoch / self.trainer.accumulate_grad_batches)
        return int(min(steps * epochs, max_steps if max_steps > 0 else steps * epochs))

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Build the optimizer over decay groups."""
        return self.optimizer_factory(decay_groups(self, self.whole_shapes))

    def configure_optimizers(self) -> Any:
        """Build the optimizer over decay groups and a schedule that steps with every update."""
        optimizer = self.build_optimizer()
        names = {id(parameter): plain_name(name) for name, parameter in self.named_parameters()}
        self.optimizer_names = [
            names[id(parameter)]
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        total = self.total_steps()
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.schedule.factor(step, total)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1},
        }

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Any = None,
    ) -> None:
        """Free the gradients right after the step.

        Lightning would do so only after the next forward pass, where memory is at its peak.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):  # clips, and frees, by itself
            engine: Any = self.trainer.strategy.model
            norm = 0.0 if self.skips_step else float(engine.get_global_grad_norm())
            self.log("train/grad_norm", norm)
            return
        optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the learning rate of this update; after it the schedule has moved on."""
        self.log("train/lr", float(optimizer.param_groups[0]["lr"]))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm over all parameters, the same way under every strategy, and log it."""
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            return
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise UserError(
                "16-mixed scales the gradients, and a fused optimizer takes them unscaled only "
                "after they would be clipped; set fused: false, or use bf16-mixed"
            )
        root = self.trainer.strategy.model
        if isinstance(root, FullyShardedDataParallel):  # knows which rank holds what
            norm = root.clip_grad_norm_(gradient_clip_val or math.inf)
        else:
            parameters = (p for group in optimizer.param_groups for p in group["params"])
            norm = clip_grad_norm_(parameters, gradient_clip_val)
        self.log("train/grad_norm", norm)

    # ----- checkpoints --------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Tell how many micro-batches make a step."""
        checkpoint["accumulate"] = self.trainer.accumulate_grad_batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose tensors do not fit this model, naming the first that differs.

        Raises:
            UserError: The checkpoint is of another model.
        """
        if self._trainer is not None and "accumulate" in checkpoint:
            _count_in(checkpoint, checkpoint["accumulate"], self.trainer.accumulate_grad_batches)
        saved = checkpoint.get("state_dict", {})
        if not saved:
            return  # sharded checkpoints are checked by their strategy
        own = self.whole_shapes or {k: tuple(v.shape) for k, v in self.state_dict().items()}
        for name, shape in own.items():
            if name in saved and tuple(saved[name].shape) != shape:
                raise UserError(
                    f"the checkpoint is of another model: {name} has shape "
                    f"{tuple(saved[name].shape)} there and {shape} here; "
                    "resume with the settings it was trained with, or give another --output_dir"
                )
        if self.strict_loading and own.keys() != saved.keys():
            name = sorted(own.keys() ^ saved.keys())[0]
            where = "there" if name in saved else "here"
            raise UserError(
                f"the checkpoint is of another model: {name} exists only {where}; "
                "resume with the settings it was trained with, or give another --output_dir"
            )


def _count_in(checkpoint: dict[str, Any], before: int, now: int) -> None:
    """Let Lightning count the epoch's micro-batches as they are now.

    With other devices, or another micro_batch_size, an optimizer step has another number of them.

    Args:
        checkpoint: Of a run that is resumed; changed in place.
        before: Micro-batches of a step there.
        now: Micro-batches of a step here.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop")
    if loops is None or before == now:
        return
    progress = loops["epoch_loop.batch_progress"]["current"]
    moved = progress["ready"] * now // before - progress["ready"]
    for name in progress:
        progress[name] += moved


def decay_groups(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> list[dict[str, Any]]:
    """Split trainable parameters into those with weight decay and those without.

    Norm gains, biases and embeddings are not decayed: shrinking them regularises nothing
    (a tied embedding is also the output head, and is counted once, with the embeddings).

    Args:
        module: The module whose trainable parameters are grouped.
        shapes: Shapes of its parameters by name, where a strategy shows flat parts of them.

    Returns:
        Two parameter groups; the first takes the optimizer's own ``weight_decay``, the second 0.
    """
    embeddings = {
        id(parameter)
        for child in module.modules()
        if isinstance(child, nn.Embedding)
        for parameter in child.parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    known = shapes or {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            shape = known.get(plain_name(name), parameter.shape)
            small = len(shape) < 2 or id(parameter) in embeddings
            (kept if small else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
