"""The contestants of the pre-training benchmark: each trains one model in this process.

A contestant takes a :class:`Work` and a ``clock`` to call after every optimizer step. All get the
same architecture, the same fixed random tokens, AdamW with the same settings, a constant learning
rate, clipping at norm 1 and bfloat16 autocast over float32 weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0

SHAPES: dict[str, dict[str, Any]] = {
    # SmolLM2-135M: what the numbers of docs/performance.md are about.
    "135m": {"preset": "llama-135m", "seq_len": 512, "micro_batch": 4},
    "15m": {"preset": "llama-15m", "vocab_size": 8192, "seq_len": 256, "micro_batch": 8},
    # As many parameter tensors as 135m and next to no arithmetic: what a step costs in Python.
    "narrow": {
        "preset": "llama-135m",
        "hidden_size": 36,
        "intermediate_size": 64,
        "vocab_size": 256,
        "seq_len": 16,
        "micro_batch": 1,
    },
    "tiny": {"preset": "llama-1m", "vocab_size": 512, "seq_len": 32, "micro_batch": 2},
}

Clock = Callable[[], None]


@dataclass
class Work:
    """One size of the benchmark."""

    size: str
    steps: int

    def __post_init__(self) -> None:
        shape = dict(SHAPES[self.size])
        self.seq_len = shape.pop("seq_len")
        self.micro_batch = shape.pop("micro_batch")
        self.preset = shape.pop("preset")
        self.changes = shape

    def model_config(self) -> Any:
        from transformers import AutoConfig

        from lit_llm.models.presets import preset_config

        config = preset_config(self.preset) | {"use_cache": False} | self.changes
        return AutoConfig.for_model(config.pop("model_type"), **config)

    def batches(self) -> Tensor:
        """(steps, B, T) random tokens, the same for every contestant."""
        vocabulary = self.model_config().vocab_size
        shape = (self.steps, self.micro_batch, self.seq_len)
        return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))


def ours(work: Work, clock: Clock, *, compile: bool = True) -> None:
    """The project's module under Lightning's Trainer, with the callbacks of the recipes."""
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.loggers import CSVLogger

    from lit_llm.callbacks.exact_resume import ExactResume
    from lit_llm.callbacks.graceful_stop import GracefulStop
    from lit_llm.callbacks.progress import Progress
    from lit_llm.callbacks.throughput import Throughput

    class Tick(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            clock()

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=work.steps,
            accelerator="cpu",
            precision="bf16-mixed",
            gradient_clip_val=CLIP,
            log_every_n_steps=10,
            callbacks=[Progress(), ExactResume(), GracefulStop(), Throughput(), Tick()],
            logger=CSVLogger(folder),
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(_module(work, compile), _loader(work))


def ours_eager(work: Work, clock: Clock) -> None:
    """The same, nothing compiled."""
    ours(work, clock, compile=False)


def ours_bare(work: Work, clock: Clock, *, compile: bool = True) -> None:
    """The project's step in a bare loop: what the Trainer's own work is measured against."""
    from lit_llm.models.forward import causal_lm_loss
    from lit_llm.modules.base import decay_groups
    from lit_llm.strategies.clipping import clip_grad_norm_

    module = _module(work, compile)
    module.configure_model()
    optimizer = module.optimizer_factory(decay_groups(module))
    for batch in _loader(work):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sums = causal_lm_loss(module.model, batch["input_ids"], batch["labels"])
            loss = sums.loss / batch["num_targets"]
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        loss.item()
        clock()


def ours_bare_eager(work: Work, clock: Clock) -> None:
    """The same, nothing compiled."""
    ours_bare(work, clock, compile=False)


def hf_trainer(work: Work, clock: Clock) -> None:
    """Hugging Face's Trainer with its own defaults otherwise."""
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Tick(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock()

    rows = [{"input_ids": row, "labels": row} for row in work.batches().flatten(0, 1)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=work.steps,
            per_device_train_batch_size=work.micro_batch,
            bf16=True,
            use_cpu=True,
            learning_rate=LEARNING_RATE,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=CLIP,
            lr_scheduler_type="constant",
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        model = AutoModelForCausalLM.from_config(work.model_config())
        Trainer(model, arguments, train_dataset=rows, callbacks=[Tick()]).train()


def plain(work: Work, clock: Clock, *, compile: bool = False) -> None:
    """A plain PyTorch loop around a transformers model and its own loss."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(work.model_config())
    if compile:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    for tokens in work.batches():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        loss.item()
        clock()


def plain_compiled(work: Work, clock: Clock) -> None:
    """The plain loop with the whole model compiled."""
    plain(work, clock, compile=True)


CONTESTANTS: dict[str, Callable[[Work, Clock], None]] = {
    function.__name__: function
    for function in (
        ours,
        hf_trainer,
        plain,
        plain_compiled,
        ours_eager,
        ours_bare,
        ours_bare_eager,
    )
}


def _module(work: Work, compile: bool) -> Any:
    from lit_llm.models.config import BaseModelConfig
    from lit_llm.modules.causal_lm import CausalLMModule
    from lit_llm.modules.schedules import Schedule

    return CausalLMModule(
        BaseModelConfig(
            preset=work.preset,
            config=work.changes or None,
            attn_implementation="blocked",
            compile=compile,
        ),
        seq_len=work.seq_len,
        optimizer=lambda parameters: torch.optim.AdamW(
            parameters, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        ),
        schedule=Schedule("constant", warmup_steps=0),
    )


def _loader(work: Work) -> Any:
    targets = torch.tensor(work.micro_batch * (work.seq_len - 1))
    batches = [
        {"input_ids": tokens, "labels": tokens, "num_targets": targets} for tokens in work.batches()
    ]
    return torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def peak_memory() -> int:
    """Bytes resident at this process's peak."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss of a new process starts with its parent's
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Run one contestant and print its measures as one line of JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("--size", choices=SHAPES, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    work = Work(args.size, args.steps + args.warmup)
    ticks: list[float] = []
    CONTESTANTS[args.contestant](work, lambda: ticks.append(time.perf_counter()))
    seconds = [after - before for before, after in pairwise(ticks)]
    seconds = seconds[args.warmup - 1 :]
    result = {
        "step_seconds": statistics.median(seconds),
        "tokens_per_s": work.micro_batch * work.seq_len / statistics.median(seconds),
        "peak_bytes": peak_memory(),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
