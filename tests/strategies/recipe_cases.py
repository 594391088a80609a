"""Every recipe as a run of seconds, so that one process and many can be compared.

The one process sees the micro-batches of all ranks one after the other and steps after as many
texts: its accumulation window holds those of W ranks. So each micro-batch is the same tensor in
both worlds, and what differs is only the order in which fp32 numbers are added. Every window holds
unequal numbers of targets, and the last one of an epoch is shorter.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_llm.rollout.generation import GenerationConfig, Response
from tests.recipes.conftest import PPO_REWARDS, write_chats, write_corpus, write_preferences

RECIPES = ("pretrain", "sft", "reward", "dpo", "ppo")
STRATEGIES = (
    "ddp",
    "fsdp",
    "fsdp2",
    "tensor_parallel",
    "deepspeed_zero1",
    "deepspeed_zero2",
    "deepspeed_zero3",
)
RANKS = 2
STEPS = 12
ACCUMULATE = 2  # micro-batches of a rank in an optimizer step
EPOCH = 11  # micro-batches of a rank; 2 x 5 + 1, so the last window of an epoch is a short one
CLIP = 0.25  # below nearly all norms

ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# A large eps: where a gradient is all but 0, AdamW divides rounding by rounding, and two correct
# runs part. With it a difference d of gradients moves a weight by at most lr d / eps.
OPTIMIZER: dict[str, Any] = {
    "class_path": "torch.optim.AdamW",
    "init_args": {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-3, "weight_decay": 0.1},
}
TRAINER: dict[str, Any] = {
    "max_epochs": 2,
    "max_steps": -1,
    "limit_train_batches": EPOCH,
    "val_check_interval": 1.0,
    "check_val_every_n_epoch": 1,
    "precision": "32-true",
    "accelerator": "cpu",
    "gradient_clip_val": CLIP,
    "accumulate_grad_batches": ACCUMULATE,
    "log_every_n_steps": 1,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}

LORA = ("--model.adapter.method=lora", "--model.adapter.r=4")
CHECKPOINTING = ("--model.base.gradient_checkpointing=true",)
BF16 = ("--trainer.precision=bf16-mixed",)


@dataclass(frozen=True)
class World:
    """How a run is spread over processes.

    Args:
        strategy: Name of the strategy, or None for one process.
    """

    strategy: str | None = None

    @property
    def readers(self) -> int:
        """Processes that read different data; tensor parallel ranks read the same."""
        return RANKS if self.strategy not in (None, "tensor_parallel") else 1

    def arguments(self, recipe: str) -> list[str]:
        """What makes the run the same one in this world."""
        given = []
        if self.strategy is not None:
            given += [f"--trainer.devices={RANKS}", f"--trainer.strategy={self.strategy}"]
        if recipe != "ppo":  # whose accumulation follows from its minibatches
            share = RANKS // self.readers
            given += [
                f"--trainer.accumulate_grad_batches={ACCUMULATE * share}",
                f"--trainer.limit_train_batches={EPOCH * share}",
            ]
        return given


def arguments(
    folder: Path, recipe: str, output: Path, strategy: str | None, *extra: str
) -> list[str]:
    """Command line of a tiny run.

    Args:
        folder: With the recipes' settings, see ``write_settings``.
        recipe: Name of the recipe.
        output: Folder of the run.
        strategy: Name of the strategy on two ranks, or None for one process.
        extra: More settings.
    """
    own = World(strategy).arguments(recipe)
    return [f"--config={folder / recipe}.yaml", f"--output_dir={output}", *own, *extra]


def run(recipe: str, args: list[str]) -> None:
    """Run a recipe but for its report, whose curves take longer than everything else here."""
    import pytest

    from lit_llm.cli import RecipeCLI

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecipeCLI, "report", lambda self, *_: None)
        importlib.import_module(recipe).main(args)


class DictatedEngine:
    """Answers that follow from the seeds alone, in place of sampling.

    In half precision a weight's last bit may decide which token is sampled, and all that comes
    after it. With given tokens the updates can be compared.
    """

    def __init__(self, *, stop_token_ids: Sequence[int], **_: Any) -> None:
        self._stop = stop_token_ids[0]

    def load(self, model: Any) -> None:
        """Do without it."""

    def generate(
        self, prompts: Sequence[Sequence[int]], config: GenerationConfig, *, seeds: Sequence[int]
    ) -> list[Response]:
        """Answer with 1 to ``max_new_tokens`` random ids, the shorter ones with an end."""
        responses = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed % 2**31)
            length = int(torch.randint(1, config.max_new_tokens + 1, (1,), generator=generator))
            ids = torch.randint(20, 300, (length,), generator=generator).tolist()
            stopped = length < config.max_new_tokens
            responses.append(Response([*ids[:-1], self._stop] if stopped else ids, stopped))
        return responses

    def release(self) -> None:
        """Nothing was taken."""


DICTATED = ("--model.rollout_engine=tests.strategies.recipe_cases:DictatedEngine",)


def write_settings(folder: Path) -> Path:
    """Write data, a tokenizer, a model to fine-tune and ``RECIPE.yaml`` for every recipe."""
    from lit_llm.data.tokenizer import load_tokenizer, train_tokenizer
    from lit_llm.models import BaseModelConfig, build_model, export_model, vocabulary_of

    write_corpus(folder / "texts.jsonl", 150, seed=1)
    write_chats(folder / "chats.jsonl", 200, seed=1)
    write_preferences(folder / "pairs.jsonl", 150, seed=1)
    (folder / "rewards.py").write_text(PPO_REWARDS)
    texts = (folder / "texts.jsonl").read_text().splitlines()
    train_tokenizer(texts, vocab_size=320).save_pretrained(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    tied = BaseModelConfig(config={**ARCHITECTURE, "tie_word_embeddings": True})
    model = build_model(tied, seq_len=96, **vocabulary_of(tokenizer))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # wider than a new model's: gradients of some size
        if parameter.ndim > 1:
            parameter.data.normal_(0.0, 0.08, generator=generator)
    export_model(model, tokenizer, folder / "model")
    for recipe in RECIPES:
        settings = settings_of(recipe, folder)
        (folder / f"{recipe}.yaml").write_text(yaml.safe_dump(settings))
    return folder


def settings_of(recipe: str, folder: Path) -> dict[str, Any]:
    """The settings of a recipe."""
    cache = str(folder / "cache")
    sources = {"pretrain": "texts", "sft": "chats", "reward": "pairs", "dpo": "pairs"}
    data: dict[str, Any] = {
        "sources": [{"path": str(folder / f"{sources.get(recipe, 'chats')}.jsonl")}],
        "micro_batch_size": 2,
        "val_micro_batch_size": 3,
        "val_fraction": 0.1,
        "test_fraction": 0.1,
        "seq_len": 96,
        "cache_dir": cache,
    }
    model: dict[str, Any] = {
        "base": {"pretrained": str(folder / "model"), "dropout": 0.0},
        "optimizer": OPTIMIZER,
        "schedule": {"name": "cosine", "warmup_steps": 2},
    }
    settings: dict[str, Any] = {
        "data": data,
        "model": model,
        "trainer": dict(TRAINER),
        "checkpoint": {"every_n_steps": 100},
        "samples": {"count": 2, "test_count": 2, "max_new_tokens": 4},
        "throughput": {"peak_flops": 1e11},  # measuring it takes longer than the steps
        "logging": {"wandb": "off"},
    }
    if recipe == "pretrain":
        data |= {"tokenizer": str(folder / "tokenizer"), "seq_len": 32, "isolate_documents": True}
        untied = {**ARCHITECTURE, "tie_word_embeddings": False, "initializer_range": 0.08}
        model["base"] = {"preset": None, "config": untied, "dropout": 0.0}
        settings["samples"] = {"max_new_tokens": 4}
    elif recipe == "reward":
        # Its loss is soon so steep that rounding grows from step to step.
        model["optimizer"] = {**OPTIMIZER, "init_args": {**OPTIMIZER["init_args"], "lr": 1e-3}}
        settings["samples"] = {}
    elif recipe == "dpo":
        model |= {"kl_prompts": 2, "kl_max_new_tokens": 4}
    elif recipe == "ppo":
        for name in ("micro_batch_size", "val_micro_batch_size", "seq_len"):
            del data[name]
        data |= {"prompt_len": 64, "val_prompts": 2, "test_prompts": 4, "val_batch_size": 2}
        model |= {
            "rewards": [{"function": f"{folder / 'rewards.py'}:spread"}],
            "generation": {"max_new_tokens": 8},
            "ppo": {
                "rollout_batch_size": 16,
                "minibatch_size": 8,
                "micro_batch_size": 2,
                "num_ppo_epochs": 2,
                "missing_eos_penalty": 0.1,
                "kl_target": 0.01,
                "kl_horizon": 32,
            },
        }
        trainer = settings["trainer"]
        for name in ("limit_train_batches", "accumulate_grad_batches"):
            del trainer[name]
        trainer |= {"max_epochs": STEPS // 4, "check_val_every_n_epoch": 3}
        settings["checkpoint"] = {"every_n_steps": 4, "keep": -1}
        settings["samples"] = {"count": 2}
    return settings
