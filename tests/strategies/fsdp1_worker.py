"""A toy stage that uses its models as the real ones do, and what is done with it on two ranks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_llm.errors import UserError
from lit_llm.modules.base import BaseModule
from lit_llm.modules.schedules import Schedule
from lit_llm.strategies.checkpoint_io import AtomicCheckpointIO

BATCHES, WINDOW, EPOCHS = 5, 2, 2
STEPS = EPOCHS * -(-BATCHES // WINDOW)


def llama(seed: int, dtype: torch.dtype = torch.float32, checkpointing: bool = False) -> Any:
    """Two blocks, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lit_llm.models.buffers import keep_buffer_dtypes

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=37,
                hidden_size=16,
                intermediate_size=20,
                num_hidden_layers=2,
                num_attention_heads=2,
                tie_word_embeddings=True,
                use_cache=False,
            )
        )
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    keep_buffer_dtypes(model)
    return model.to(dtype)


class Toy(BaseModule):
    """Trains a policy and a head of one number; a frozen reference takes part in the loss.

    Args:
        fused: Use torch's fused AdamW.
        checkpointing: Recompute activations.
        reference_dtype: Data type of the frozen model's weights.
        base_dtype: Data type of the trained model's weights.
        adapter: Train LoRA adapters, in float32, in place of the weights.
        skips: Leave out this optimizer step.
    """

    def __init__(
        self,
        fused: bool = False,
        checkpointing: bool = False,
        reference_dtype: torch.dtype = torch.float32,
        base_dtype: torch.dtype = torch.float32,
        adapter: bool = False,
        skips: int | None = None,
    ) -> None:
        super().__init__(
            lambda groups: torch.optim.AdamW(
                groups, lr=3e-3, eps=1e-5, weight_decay=0.1, fused=fused
            ),
            Schedule("linear", warmup_steps=3),
        )
        self.strict_loading = False
        self.model: Any = None
        self.reference: Any = None
        self.settings = (checkpointing, reference_dtype, base_dtype, adapter)
        self.skips = skips
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.tested: list[float] = []

    def configure_model(self) -> None:
        if self.model is not None:
            return
        checkpointing, reference_dtype, base_dtype, adapter = self.settings
        self.model = llama(1, base_dtype, checkpointing)
        if adapter:
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(5)
            config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
            self.model = get_peft_model(self.model, config)
        self.reference = llama(2, reference_dtype).requires_grad_(False).eval()
        self.head = nn.Linear(16, 1).to(base_dtype if adapter else torch.float32)
        torch.manual_seed(3)
        nn.init.normal_(self.head.weight, std=0.1)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("scale", torch.tensor([1.0, 2.0]))
        self.remember_shapes()

    def left_out(self) -> set[str]:
        return {name for name in self.whole_shapes if name.startswith("reference.")}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k not in self.left_out()}

    def total_steps(self) -> int:
        return STEPS

    @property
    def skips_step(self) -> bool:
        return self.skips == self.trainer.global_step

    def loss_sum(self, batch: dict[str, Tensor]) -> Tensor:
        if isinstance(self.trainer.strategy, FSDPStrategy):
            assert batch["weight"].dtype == torch.float32, "inputs are never cast"
        policy = self.model.base_model.model if self.settings[3] else self.model
        ids, mask = batch["ids"], batch["mask"]
        hidden = policy.model(input_ids=ids).last_hidden_state
        logits = F.linear(hidden, policy.lm_head.weight)[:, :-1].float()
        with torch.no_grad():
            other = self.reference.model(input_ids=ids).last_hidden_state
            weight = self.reference.lm_head.weight
            reference = F.linear(other.to(weight.dtype), weight)[:, :-1].float()
        own = logits.log_softmax(-1)
        picked = own.gather(2, ids[:, 1:, None])[..., 0]
        kl = (own.exp() * (own - reference.log_softmax(-1))).sum(-1)
        value = self.head(hidden.to(self.head.weight.dtype))[:, :-1, 0].float()
        each = -picked + 0.1 * kl + 0.5 * (value - self.scale[0]) ** 2
        return (each * mask[:, 1:] * batch["weight"][:, None]).sum()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.skips_step:
            return torch.zeros((), requires_grad=True)
        loss = self.global_mean(self.loss_sum(batch), batch["targets"], batch_idx)
        self.losses.append(float(loss.detach()))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.skips_step:
            optimizer.zero_grad()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.tested.append(float(self.loss_sum(batch)))

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if name == "train/grad_norm":
            self.norms.append(float(value))


def loader(rank: int, world: int) -> DataLoader[Any]:
    """Micro-batches of four rows with 1 to 9 target tokens, of which a rank has its share."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(BATCHES):
        lengths = torch.randint(2, 11, (4,), generator=generator)
        mask = (torch.arange(10) < lengths[:, None]).float()
        ids = torch.randint(0, 37, (4, 10), generator=generator)
        weight = torch.randint(4, 13, (4,), generator=generator) / 8
        rows = slice(rank, None, world)
        batches.append({"ids": ids[rows], "mask": mask[rows], "weight": weight[rows]})
    for number, batch in enumerate(batches):
        window = batches[number // WINDOW * WINDOW :][:WINDOW]
        batch["targets"] = sum(one["mask"][:, 1:].sum() for one in window)
    return DataLoader(batches, batch_size=None, shuffle=False)  # type: ignore[arg-type]


def run(
    folder: Path,
    strategy: Any = "auto",
    module: Toy | None = None,
    *,
    devices: int = 1,
    precision: Any = "32-true",
    resume: Path | None = None,
    epochs: int = EPOCHS,
    test: bool = False,
) -> tuple[Toy, Trainer]:
    """Train the toy, with a checkpoint after every epoch."""
    module = module or Toy()
    save = ModelCheckpoint(
        folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True, every_n_epochs=1
    )
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=devices,
        precision=precision,
        max_epochs=epochs,
        accumulate_grad_batches=WINDOW,
        gradient_clip_val=0.5,
        use_distributed_sampler=False,
        logger=False,
        callbacks=[save],
        plugins=[AtomicCheckpointIO()] if strategy == "auto" else None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rank = trainer.global_rank
    if test:
        trainer.test(module, loader(rank, devices), verbose=False)
    trainer.fit(module, loader(rank, devices), ckpt_path=resume, weights_only=True)
    if test:
        trainer.test(module, loader(rank, devices), verbose=False)
    return module, trainer


def outcome(module: Toy, trainer: Trainer) -> dict[str, Any]:
    """What a run came to, losses over all ranks."""
    losses, tested = torch.tensor(module.losses), torch.tensor(module.tested)
    if trainer.world_size > 1:
        dist.all_reduce(losses)
        dist.all_reduce(tested)
    return {
        "losses": losses / trainer.world_size,
        "norms": torch.tensor(module.norms),
        "tested": tested,
        "weights": {
            n: v.clone()
            for n, v in trainer.strategy.lightning_module_state_dict().items()
            if not n.startswith("reference.")
        },
        "optimizer": trainer.strategy.optimizer_state(trainer.optimizers[0]),
    }


# ----- what two processes do --------------------------------------------------------------------

HALF = torch.bfloat16
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"test": True}),
    "fused": ({"fused": True}, {}),
    "checkpointing": ({"checkpointing": True}, {}),
    "bf16-mixed": ({}, {"precision": "bf16-mixed"}),
    "bf16-true": ({}, {"precision": "bf16-true"}),
    "half_reference": ({"reference_dtype": HALF}, {}),
    "adapter": ({"adapter": True}, {}),
    "half_base": ({"adapter": True, "base_dtype": HALF}, {}),
    "skipping": ({"skips": 1}, {}),
}
"""Settings of the toy and of its run, the same in one process and in two."""


def one_process(out: Path) -> dict[str, Any]:
    """Every variant without a strategy."""
    return {
        name: outcome(*run(out / f"one-{name}", module=Toy(**toy), **kwargs))
        for name, (toy, kwargs) in VARIANTS.items()
    }


def cases(folder: str) -> None:
    """Everything on two ranks; the outcomes, which rank 0 alone has whole, go to ``two.pt``."""
    warnings.filterwarnings("ignore")
    from lit_llm.strategies.fsdp1 import FSDP1Strategy
    from lit_llm.strategies.fsdp2 import FSDP2Strategy

    out = Path(folder)

    def two(name: str, strategy: Any = None, module: Toy | None = None, **kwargs: Any) -> Any:
        strategy = strategy or FSDP1Strategy()
        found = run(out / name, strategy, module, devices=2, **kwargs)
        strategy.sharded_checkpoints = False  # the outcome is wanted whole
        return outcome(*found)

    def folders() -> Any:
        return FSDP1Strategy(sharded_checkpoints=True)

    first = "epoch=0.ckpt"
    results = {
        name: two(name, module=Toy(**toy), **kwargs) for name, (toy, kwargs) in VARIANTS.items()
    }
    half = FSDP1Strategy(half_gather=True)
    results["half_gather"] = two("half_gather", half, precision="bf16-mixed")
    results["again"] = two("again", resume=out / "plain" / first)
    results["again_fused"] = two(
        "again_fused", module=Toy(fused=True), resume=out / "fused" / first
    )
    results["from_one"] = two("from_one", resume=out / "one-plain" / first)
    results["after_test"] = two("after_test", resume=out / "plain" / first, test=True)
    results["folder"] = two("folder", folders())
    results["folder_again"] = two("folder_again", folders(), resume=out / "folder" / first)
    results["folder_after_test"] = two(
        "folder_after_test", folders(), resume=out / "folder" / first, test=True
    )
    run(out / "fsdp2", FSDP2Strategy(sharded_checkpoints=True), devices=2, epochs=1)
    results["from_fsdp2"] = two("from_fsdp2", resume=out / "fsdp2" / first)
    module, trainer = run(
        out / "to_fsdp2", FSDP2Strategy(), devices=2, resume=out / "folder" / first
    )
    results["to_fsdp2"] = outcome(module, trainer)
    try:
        results["refused"] = two("refused", module=Toy(base_dtype=HALF))
    except UserError as error:
        results["refused"] = str(error)
    if dist.get_rank() == 0:
        torch.save(results, out / "two.pt")
