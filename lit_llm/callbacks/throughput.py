"""How fast a run is: tokens a second, model FLOPs utilisation, peak memory."""

import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_llm.planning.flops import peak_flops


class Throughput(Callback):
    """Log perf/tokens_per_s, perf/mfu, perf/peak_memory and the tokens seen of each source.

    Lightning's own ThroughputMonitor knows no CPU peak and counts samples from the batch size; the
    time it measures also contains validation.

    Args:
        peak_flops: FLOPs a second of one device that MFU is measured against; by default the
            vendor's number, and on a CPU a short matrix product in the run's precision.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        self.peak = peak_flops
        self._flops_per_token: float | None = None
        self._tokens = 0
        self._since: float | None = None
        self._validation_start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the peak and the cost of a token."""
        precision = str(trainer.precision)
        dtype = torch.bfloat16 if "bf16" in precision else torch.float32
        if "16" in precision and "bf16" not in precision:
            dtype = torch.float16
        if self.peak is None:
            self.peak = peak_flops(pl_module.device, dtype)
        self._flops_per_token = getattr(pl_module, "flops_per_token", None)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock with the first batch: what comes before it happens once a run."""
        if self._since is None:
            self._since = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let it run on."""
        self.leave_out(time.perf_counter() - self._validation_start)

    def leave_out(self, seconds: float) -> None:
        """Do not count the time of something that was no training.

        Args:
            seconds: How long it took.
        """
        if self._since is not None:
            self._since += seconds

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and log at the trainer's logging interval."""
        mask = batch.get("attention_mask")
        self._tokens += int(mask.sum()) if mask is not None else batch["input_ids"].numel()
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        every = getattr(trainer, "log_every_n_steps")  # noqa: B009 - set after __init__
        if trainer.global_step % every or self._since is None:
            return
        ranks = getattr(pl_module, "data_parallel_size", trainer.world_size)
        now = time.perf_counter()
        rate = self._tokens * ranks / max(now - self._since, 1e-9)
        pl_module.log("perf/tokens_per_s", rate, prog_bar=True)
        if self.peak and self._flops_per_token:
            mfu = rate * self._flops_per_token / (self.peak * trainer.world_size)
            pl_module.log("perf/mfu", mfu)
        pl_module.log("perf/peak_memory", float(peak_memory(pl_module.device)))
        tokens_seen = getattr(getattr(trainer, "datamodule", None), "tokens_seen", None)
        if tokens_seen is not None:
            for name, count in tokens_seen().items():
                pl_module.log(f"data/tokens/{name}", float(count))
        self._tokens, self._since = 0, now


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak so far: allocated on CUDA, resident (the whole process) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
