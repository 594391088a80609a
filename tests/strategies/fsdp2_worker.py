"""Tiny training runs for the tests of FSDP2 and tensor parallelism, in one process or on ranks.

The loss is made as the stages make theirs: the decoder and the weight of the output head are used
directly, a frozen second model takes part, and micro-batches have unequal numbers of targets.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from lit_llm.callbacks.exact_resume import ExactResume
from lit_llm.errors import UserError
from lit_llm.models.adapters import AdapterConfig, add_adapter, unwrap
from lit_llm.models.buffers import keep_buffer_dtypes
from lit_llm.models.compile import compile_blocks
from lit_llm.modules.base import BaseModule
from lit_llm.modules.schedules import Schedule

MICRO_BATCHES = 10  # of all ranks in an epoch; windows of 4, the last one of 2
WINDOW = 4
STEPS = 6  # in two epochs
VOCABULARY = 64


class Toy(BaseModule):
    """A language model that is kept near a frozen one."""

    def __init__(self, case: dict[str, Any]) -> None:
        settings: dict[str, Any] = {"lr": 3e-3, "eps": 1e-5, "weight_decay": 0.1}
        settings["fused"] = case.get("fused", False)
        super().__init__(lambda groups: torch.optim.AdamW(groups, **settings), Schedule())
        self.case = case
        self.strict_loading = False  # the frozen model is in no checkpoint
        self.model: Any = None
        self.reference: Any = None
        self.losses: list[float] = []
        self.norms: list[float] = []

    def total_steps(self) -> int:
        return STEPS

    def configure_model(self) -> None:
        if self.model is not None:
            return
        torch.manual_seed(self.case.get("seed", 0))
        self.model = build(self.case)
        if self.case.get("lora"):
            config = AdapterConfig(method=self.case["lora"], r=4, alpha=8)
            self.model = add_adapter(self.model, config)
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:  # zeros would hide what is done with the other matrix
                    torch.nn.init.normal_(parameter, std=0.02)
        if self.case.get("compile"):
            compile_blocks(self.model)
        if not self.case.get("lora"):
            self.reference = build(self.case).requires_grad_(False).eval()
        self.remember_shapes()

    def left_out(self) -> set[str]:
        return {name for name in self.whole_shapes if name.startswith("reference.")}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in self.left_out():
            checkpoint["state_dict"].pop(name, None)

    def backbone(self, ids: Tensor) -> Tensor:
        model = unwrap(self.model)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        if self.reference is not None:
            with torch.no_grad():
                other = self.reference.base_model(input_ids=ids, use_cache=False).last_hidden_state
            self.distance = (hidden - other).float().square().mean(-1)
        return hidden

    def summed_loss(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.backbone(batch["ids"])
        logits = torch.nn.functional.linear(hidden, unwrap(self.model).lm_head.weight).float()
        labels = batch["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
        ).view_as(labels)
        if self.reference is not None:
            loss = loss + 0.1 * self.distance[:, 1:] * (labels != -100)
        return loss.sum()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.summed_loss(batch)
        if self.trainer.precision != "bf16-true":  # which casts the batch of one process too
            assert batch["weights"].dtype == torch.float32
        whole = self.data_parallel_sum(loss.detach())
        mean = self.global_mean(loss, batch["num_targets"], batch_idx)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.losses.append(0.0)
        self.losses[-1] += float(whole / self._window_targets)
        return mean

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.tested += float(self.data_parallel_sum(self.summed_loss(batch)))

    def on_test_epoch_start(self) -> None:
        self.tested = 0.0

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.norms.append(float(self.trainer.callback_metrics["train/grad_norm"]))


def build(case: dict[str, Any]) -> Any:
    """A tiny model of the case's architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
    } | case.get("config", {})
    kind = shape.pop("model_type")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    with torch.no_grad():  # biases and norms that are 0 and 1 hide mistakes
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    keep_buffer_dtypes(model)
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def micro_batches() -> list[dict[str, Tensor]]:
    """The epoch, in the order in which one process sees it."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for number in range(MICRO_BATCHES):
        ids = torch.randint(VOCABULARY, (2, 12), generator=generator)
        labels = ids.clone()
        labels[:, : 1 + number % 9] = -100
        batches.append({"ids": ids, "labels": labels, "weights": torch.ones(2)})
    return batches


class Epoch(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The micro-batches of one data parallel rank, with the targets of its windows."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.batches = micro_batches()[rank::ranks]
        window = WINDOW // ranks
        for start in range(0, len(self.batches), window):
            part = self.batches[start : start + window]
            targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in part)
            for batch in part:
                batch["num_targets"] = torch.tensor(targets)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.batches[index]


def refused(case: dict[str, Any]) -> str:
    """What the user is told of a case that cannot work."""
    try:
        run(case)
    except UserError as error:
        return str(error)
    return "nothing"


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Train as the case says.

    Args:
        case: ``strategy`` (arguments of FSDP2Strategy; None is one process), ``precision``,
            ``config``, ``fused``, ``epochs``, ``resume``, ``save``, ``phases``, and more.

    Returns:
        Losses and norms of all optimizer steps, whole weights on rank 0, and what else is asked.
    """
    from lit_llm.strategies.fsdp2 import FSDP2Strategy

    module = Toy(case)
    if case.get("seed_by_rank"):
        case["seed"] = int(os.environ.get("RANK", 0))
    arguments = case["strategy"]
    trainer = trainer_of(case, "auto" if arguments is None else FSDP2Strategy(**arguments))
    results: dict[str, Any] = {}
    for phase in case.get("phases", ["fit"]):
        loader = Data()
        if phase == "fit":
            trainer.fit(module, loader, ckpt_path=case.get("resume"))
        else:
            trainer.test(module, loader, verbose=False)
            results.setdefault("tested", []).append(module.tested)
    if case.get("save"):
        trainer.save_checkpoint(case["save"])
    trainer.strategy._save_distributed_checkpoint = False
    state = trainer.strategy.lightning_module_state_dict()
    results |= {
        "losses": module.losses,
        "norms": module.norms,
        "weights": {name: value.float().numpy().copy() for name, value in state.items()},
        "class": type(module).__name__,
        "random": float(torch.rand(())),
    }
    return results


def trainer_of(case: dict[str, Any], strategy: Any) -> Trainer:
    """A quiet trainer."""
    arguments = case["strategy"]
    ranks = int(os.environ.get("WORLD_SIZE", 1)) if arguments is not None else 1
    data_ranks = max(1, ranks // (arguments or {}).get("tensor_parallel_size", 1))
    return Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        max_epochs=case.get("epochs", 2),
        accumulate_grad_batches=WINDOW // data_ranks,
        gradient_clip_val=case.get("clip", 0.5),
        precision=case.get("precision", "32-true"),
        callbacks=[ExactResume()] if case.get("exact_resume") else [],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class Data(LightningDataModule):
    """The same epoch for training and test; its rank is known once the strategy is set up."""

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        kwargs = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        epoch = Epoch(kwargs["rank"], kwargs["num_replicas"])
        return torch.utils.data.DataLoader(epoch, batch_size=None)

    def test_dataloader(self) -> Any:
        return self.train_dataloader()
