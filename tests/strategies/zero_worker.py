"""Runs of a small model, by one process or, as a script, by each of two ranks under ZeRO.

The script runs every case of ``CASES`` and writes what came out of it to ``FOLDER/results.pt``.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

VOCAB, ROWS, LENGTH, MICRO_BATCHES, WINDOW = 37, 2, 7, 5, 2


def windows() -> list[list[int]]:
    """Micro-batches of an epoch by optimizer step; the last window is shorter."""
    return [[0, 1], [2, 3], [4]]


def rows(index: int) -> tuple[Tensor, Tensor]:
    """A global micro-batch: tokens and a mask with other counts in every row, (ROWS, LENGTH)."""
    generator = torch.Generator().manual_seed(index)
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
    lengths = torch.randint(2, LENGTH, (ROWS, 1), generator=generator)
    return tokens, torch.arange(LENGTH) < lengths


class Batches(torch.utils.data.Dataset[dict[str, Any]]):
    """This rank's part of every micro-batch."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return MICRO_BATCHES

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens, mask = rows(index)
        window = next(w for w in windows() if index in w)
        total = sum(int(rows(i)[1][:, 1:].sum()) for i in window)
        part = slice(self.rank, None, self.world)
        margin = torch.tensor(0.1)
        return {"ids": tokens[part], "mask": mask[part], "total": total, "margin": margin}


class Toy(LightningModule):
    """A Llama with what is hard to shard: frozen and seldom used parameters, a head used raw."""

    def __init__(self, seed: int = 0, seldom: bool = False, skip: int | None = None) -> None:
        super().__init__()
        self.seed, self.seldom, self.skip = seed, seldom, skip
        self.model: Any = None
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.tested: list[float] = []
        self.rates: list[float] = []
        self.margins: set[str] = set()
        self.loaders = 0
        self._last = -1
        self.strict_loading = False  # the reference is in no checkpoint

    def configure_model(self) -> None:
        if self.model is not None:
            return
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(self.seed)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB,
                hidden_size=12,
                intermediate_size=20,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=16,
            )
        )
        self.shift = nn.Parameter(torch.randn(12) / 10, requires_grad=False)  # saved
        self.reference = nn.Linear(12, 3)  # not saved
        self.reference.requires_grad_(False)
        self.rare = nn.Linear(12, 1)
        self.register_buffer("mean", torch.tensor([1 / 3]))

    def left_out(self) -> set[str]:
        return {"reference.weight", "reference.bias"}

    @property
    def skips_step(self) -> bool:
        # Known late: the first micro-batch of the window has made its gradients by then.
        late = any(self._last == window[-1] for window in windows())
        return self.skip is not None and self._window == self.skip and late

    @property
    def _window(self) -> int:
        inside = next(i for i, w in enumerate(windows()) if self._last in w)
        return self.current_epoch * len(windows()) + inside

    def loss_sum(self, batch: dict[str, Any]) -> Tensor:
        self.margins.add(str(batch["margin"].dtype))
        hidden = self.model.model(input_ids=batch["ids"]).last_hidden_state + self.shift
        logits = F.linear(hidden, self.model.lm_head.weight)[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), batch["ids"][:, 1:], reduction="none")
        self.hidden = hidden
        return (losses * batch["mask"][:, 1:]).sum()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self._last = batch_idx
        loss = self.loss_sum(batch)
        self.losses.append(self._sum(loss / batch["total"]))
        used = not self.seldom or (batch_idx == 0 and self.current_epoch == 0) or batch_idx == 4
        if used:
            loss = loss + self.rare(self.hidden).pow(2).sum()
        elif self.trainer.world_size == 1:
            loss = loss + 0 * sum(p.sum() for p in self.rare.parameters())
        return loss * (WINDOW * self.trainer.world_size / batch["total"])

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        loss = self.loss_sum(batch) + self.reference(self.hidden).float().sum()
        self.tested.append(self._sum(loss))

    def _sum(self, value: Tensor) -> float:
        value = value.detach().clone().float()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(value)
        return float(value)

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, eps=1e-5)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    def optimizer_step(self, epoch: int, index: int, optimizer: Any, closure: Any = None) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
        if self.trainer.world_size > 1:
            super().optimizer_step(epoch, index, optimizer, closure)
            self.norms.append(float(self.trainer.model.get_global_grad_norm() or 0.0))
            return
        if self.skip is None:
            super().optimizer_step(epoch, index, optimizer, closure)
            return
        closure()
        if not self.skips_step:
            self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.optimizer.step()
        optimizer.zero_grad()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        if self.trainer.world_size > 1:
            return
        trained = [p for p in self.parameters() if p.requires_grad]
        norm = nn.utils.clip_grad_norm_(trained, gradient_clip_val or float("inf"))
        self.norms.append(float(norm))

    def _loader(self) -> DataLoader[dict[str, Any]]:
        self.loaders += 1
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return DataLoader(Batches(rank, world), batch_size=None, shuffle=False)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader()

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader()


def trainer_of(folder: Path | None, strategy: Any, devices: int, **settings: Any) -> Trainer:
    callbacks = []
    if folder is not None:
        callbacks.append(
            ModelCheckpoint(
                folder, "{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True
            )
        )
    return Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        callbacks=callbacks,
        enable_checkpointing=folder is not None,
        **{
            "max_epochs": 2,
            "accumulate_grad_batches": WINDOW,
            "gradient_clip_val": 0.5,
            "use_distributed_sampler": False,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **settings,
        },
    )


def outcome(trainer: Trainer, toy: Toy) -> dict[str, Any]:
    trainer.strategy.sharded_checkpoints = False
    state = trainer.strategy.lightning_module_state_dict()
    return {
        "weights": {k: v.detach().clone() for k, v in state.items()},
        "losses": toy.losses,
        "norms": toy.norms,
        "rates": toy.rates,
        "tested": toy.tested,
        "margins": toy.margins,
        "loaders": toy.loaders,
    }


def run(
    folder: Path | None,
    strategy: Any = "auto",
    devices: int = 1,
    toy: Toy | None = None,
    steps: str = "fit",
    resume: Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Build a trainer, do what ``steps`` says with one module, and return what came out."""
    toy = toy or Toy()
    trainer = trainer_of(folder, strategy, devices, **settings)
    for step in steps.split():
        if step == "fit":
            trainer.fit(toy, ckpt_path=resume)
        elif step == "again":
            trainer.fit_loop.epoch_progress.reset()
            trainer.fit(toy)
        else:
            trainer.test(toy, ckpt_path=resume if "fit" not in steps else None, verbose=False)
    return outcome(trainer, toy)


def zero(stage: int, **settings: Any) -> Any:
    """The strategy, dividing every parameter however small."""
    from lit_llm.strategies.zero import ZeROStrategy

    strategy = ZeROStrategy(stage=stage, timeout_minutes=0.5, **settings)
    strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return strategy


def run_cases(folder: Path) -> dict[str, Any]:
    one = folder / "one" / "epoch=0.ckpt"
    results: dict[str, Any] = {}

    def case(name: str, strategy: Any, **settings: Any) -> None:
        wanted = os.environ.get("ZERO_CASES")
        if wanted and not any(name.startswith(w) for w in wanted.split(",")):
            return
        started = time.perf_counter()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                results[name] = run(strategy=strategy, devices=2, **settings)
            results[name]["warnings"] = [str(w.message) for w in caught]
            results[name]["seconds"] = time.perf_counter() - started
        except Exception:
            results[name] = {"error": traceback.format_exc()}
            print(name, results[name]["error"], file=sys.stderr, flush=True)
            torch.save(results, folder / "results.pt")
            os._exit(1)  # the other rank may wait for this one

    for stage in (1, 2, 3):
        case(f"fit{stage}", zero(stage), folder=folder / f"zero{stage}")
        case(f"unclipped{stage}", zero(stage), folder=None, max_epochs=1, gradient_clip_val=None)
        case(f"seldom{stage}", zero(stage), folder=None, toy=Toy(seldom=True))
        case(f"skip{stage}", zero(stage), folder=None, toy=Toy(skip=1))
        case(f"twice{stage}", zero(stage), folder=None, steps="test fit test")
        written = folder / f"zero{stage}" / "epoch=0.ckpt"
        case(f"resumed{stage}", zero(stage), folder=None, toy=Toy(9), resume=written)
        case(f"from_one{stage}", zero(stage), folder=None, toy=Toy(9), resume=one)
        case(f"tested{stage}", zero(stage), folder=None, toy=Toy(9), resume=one, steps="test")
    for stage in (2, 3):
        case(f"offload{stage}", zero(stage, offload_optimizer=True), folder=None)
        rare = Toy(seldom=True)
        case(f"offload_seldom{stage}", zero(stage, offload_optimizer=True), folder=None, toy=rare)
        strategy = zero(stage, sharded_checkpoints=True)
        case(f"sharded{stage}", strategy, folder=folder / f"sharded{stage}")
        written = folder / f"sharded{stage}" / "epoch=0.ckpt"
        case(f"from_sharded{stage}", zero(stage), folder=None, toy=Toy(9), resume=written)
        tests = {"toy": Toy(9), "resume": written, "steps": "test"}
        case(f"test_sharded{stage}", zero(stage), folder=None, **tests)
        case(f"mixed{stage}", zero(stage), folder=None, precision="bf16-mixed")
        for name, half, precision in (("gather", True, "bf16-mixed"), ("true", False, "bf16-true")):
            saved = folder / f"{name}{stage}"
            settings = {"precision": precision}
            strategy = zero(stage, half_gather=half)
            case(f"{name}{stage}", strategy, folder=saved, steps="test fit test", **settings)
            strategy = zero(stage, half_gather=half)
            resume = saved / "epoch=0.ckpt"
            case(f"re_{name}{stage}", strategy, folder=None, toy=Toy(9), resume=resume, **settings)
    return results


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    results = run_cases(folder)
    if int(os.environ["RANK"]) == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
