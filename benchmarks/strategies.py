"""Seconds a step and bytes sent for every strategy on two processes, beside DDP.

    python benchmarks/strategies.py
    python benchmarks/strategies.py --only ddp,fsdp2 --rounds 5 --steps 10

Two processes of one thread each train the same small Llama on the same tokens over gloo. They stay
for the whole run, and each round takes the strategies one after the other, so that a machine that
slows down slows down for all. Bytes are those that went over the loopback device while the steps
ran, both directions of both processes: run nothing else that talks over it. Prints medians over the
rounds, and times as ratios to DDP.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # of a script only the own folder is there

RANKS = 2
SEQ_LEN, ROWS, VOCABULARY = 128, 4, 4096
CONFIG = {
    "model_type": "llama",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": SEQ_LEN,
    "tie_word_embeddings": True,
}
NAMES = (
    "ddp",
    "fsdp",
    "fsdp2",
    "tensor_parallel",
    "deepspeed_zero1",
    "deepspeed_zero2",
    "deepspeed_zero3",
)


def loopback_bytes() -> int:
    """Bytes received over the loopback device since the machine started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[0])
    raise SystemExit("this machine has no loopback device to count bytes on")


def measure(name: str, steps: int, warmup: int) -> dict[str, float]:
    """Train under a strategy, in one of the ranks; seconds and bytes a step."""
    import torch
    import torch.distributed as dist
    from lightning.pytorch import Callback, Trainer, seed_everything

    from lit_llm.models import BaseModelConfig
    from lit_llm.modules.causal_lm import CausalLMModule
    from lit_llm.strategies.registry import build_strategy

    seed_everything(0, verbose=False)
    # Tensor parallel ranks read the same rows: both of them those of two ranks.
    rows = ROWS * (RANKS if name == "tensor_parallel" else 1)
    ids = torch.randint(VOCABULARY, (steps + warmup, rows, SEQ_LEN))
    targets = torch.tensor(rows * (SEQ_LEN - 1))
    batches = [{"input_ids": one, "labels": one, "num_targets": targets} for one in ids]
    seconds, sent = [], []

    class Clock(Callback):
        """Times whole steps, between two moments at which all ranks have come as far."""

        def on_train_batch_start(self, *_: Any) -> None:
            dist.barrier()
            self.start, self.sent = time.perf_counter(), loopback_bytes()

        def on_train_batch_end(self, *_: Any) -> None:
            dist.barrier()
            seconds.append(time.perf_counter() - self.start)
            sent.append(loopback_bytes() - self.sent)

    module = CausalLMModule(BaseModelConfig(config=CONFIG), seq_len=SEQ_LEN)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            default_root_dir=folder,
            strategy=build_strategy(name),
            accelerator="cpu",
            devices=RANKS,
            max_steps=steps + warmup,
            callbacks=[Clock()],
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return {
        "seconds": statistics.median(seconds[warmup:]),
        "megabytes": statistics.median(sent[warmup:]) / 1e6,
    }


def work(names: list[str], rounds: int, steps: int, warmup: int) -> None:
    """One of the ranks: all rounds, and the results of the first rank on its last line."""
    import logging
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            found[name].append(measure(name, steps, warmup))
    if os.environ["RANK"] == "0":
        print(json.dumps(found), flush=True)


def main() -> None:
    """Start the ranks and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(NAMES), help="names, by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="steps that count, a round")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := sorted(set(names) - set(NAMES)):
        raise SystemExit(f"there is no {unknown[0]!r}; take some of {', '.join(NAMES)}")
    if options.rank:
        work(names, options.rounds, options.steps, options.warmup)
        return
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*launcher, f"--nproc-per-node={RANKS}", __file__, *sys.argv[1:], "--rank"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise SystemExit(f"the ranks have failed:\n{result.stderr[-4000:]}")
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    found = json.loads(lines[-1])
    from benchmarks.pretrain import machine

    print(f"{machine()}; {RANKS} processes of one thread, {options.rounds} rounds")
    print("| strategy | time of a step, DDP = 1 | MB a step |\n|---|---|---|")
    medians = {
        name: {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        for name, rounds in found.items()
    }
    base = medians.get("ddp", next(iter(medians.values())))["seconds"]
    for name, values in medians.items():
        print(f"| {name} | {values['seconds'] / base:.2f} | {values['megabytes']:.1f} |")
    print(f"DDP takes {base:.3f} s a step." if "ddp" in medians else "")


if __name__ == "__main__":
    main()
