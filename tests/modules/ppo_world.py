"""A world of numbers for PPO: a tiny random model, prompts of a few tokens, rules as rewards."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from lit_llm.data.prompts import Prompt
from lit_llm.models.config import BaseModelConfig
from lit_llm.modules.ppo import PPOModule
from lit_llm.modules.ppo_config import PPOConfig
from lit_llm.modules.schedules import Schedule
from lit_llm.rollout.generation import GenerationConfig
from lit_llm.rollout.rewards import RewardSample

PAD, STOP = 0, 2
WANTED = 7
RATE = 0.125  # of plain gradient descent


# ----- rewards, by the path "tests.modules.ppo_world:NAME" ----------------------------------------


def share_of_wanted(samples: Sequence[RewardSample]) -> list[float]:
    """How much of a response is the one token that is wanted."""
    return [one.response_ids.count(WANTED) / len(one.response_ids) for one in samples]


def shuffled_share(samples: Sequence[RewardSample]) -> list[float]:
    """The same numbers, each given to another response: nothing can be learned from them."""
    scores = share_of_wanted(samples)
    random.Random(len(samples)).shuffle(scores)
    return scores


def spread(samples: Sequence[RewardSample]) -> list[float]:
    """Scores that differ from each other, of both signs, and depend on prompt and response."""
    return [
        (sum(k * token for k, token in enumerate(one.response_ids, 1)) % 23) / 4
        - 2
        + len(one.prompt_ids) / 10
        for one in samples
    ]


# ----- data ---------------------------------------------------------------------------------------


class Numbers:
    """A tokenizer that writes ids as numbers."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


class PromptData(pl.LightningDataModule):
    """Random prompts without end, in place of ``PromptDataModule``."""

    tokenizer = Numbers()
    pad_token_id = PAD
    stop_token_ids = (STOP,)
    val_batch_size = 8

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.random = random.Random(3)
        self.taken: list[Prompt] = []
        self.ptx_sources: list[str] = ["texts"]
        self.experience_loader: Callable[[], Any] | None = None

    def take_prompts(self, count: int) -> list[Prompt]:
        self.taken = []
        for _ in range(count):
            length = self.random.randint(1, 5)
            ids = [self.random.randrange(3, self.vocabulary) for _ in range(length)]
            self.taken.append(Prompt(ids, " ".join(map(str, ids)), None, None, None, 0))
        return self.taken

    def ptx_batch(self, position: int, rows: int) -> dict[str, torch.Tensor]:
        """Row ``position`` of the texts counts up from its own number."""
        first = torch.arange(position, position + rows)[:, None]
        ids = (first + torch.arange(6)) % self.vocabulary
        return {"input_ids": ids, "labels": ids.clone()}

    def train_dataloader(self) -> Any:
        assert self.experience_loader is not None
        return self.experience_loader()


# ----- module and run -----------------------------------------------------------------------------


def module(
    ppo: dict[str, Any],
    *,
    reward: str = "spread",
    vocabulary: int = 16,
    layers: int = 1,
    max_new_tokens: int = 6,
    temperature: float = 1.0,
    optimizer: Any = None,
    **settings: Any,
) -> PPOModule:
    """A policy with random weights of its own."""
    base = BaseModelConfig(
        preset=None,
        config={
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": STOP,
        },
    )
    torch.manual_seed(0)
    return PPOModule(
        base,
        prompt_len=5,
        rewards=[f"tests.modules.ppo_world:{reward}"],
        ppo=PPOConfig(**ppo),
        generation=GenerationConfig(max_new_tokens=max_new_tokens, temperature=temperature),
        optimizer=optimizer or (lambda groups: torch.optim.SGD(groups, lr=RATE)),
        schedule=Schedule(name="constant", warmup_steps=0),
        **settings,
    )


class Kept(pl.Callback):
    """Moves the policy away from its reference, and keeps what an iteration knew.

    Args:
        moved: Deviation of the noise on whatever is trained.
    """

    def __init__(self, moved: float = 0.0) -> None:
        self.moved = moved
        self.metrics: list[dict[str, float]] = []
        self.experiences: list[dict[str, torch.Tensor]] = []
        self.start: dict[str, torch.Tensor] = {}
        self.prompts: list[list[Prompt]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        torch.manual_seed(11)
        with torch.no_grad():
            for parameter in pl_module.parameters():
                if parameter.requires_grad and self.moved:
                    parameter.add_(self.moved * torch.randn_like(parameter))
        self.start = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.metrics.append(pl_module.iteration_metrics)
        self.experiences.append(pl_module.buffer.kept())
        self.prompts.append(trainer.datamodule.taken)


def fit(made: PPOModule, iterations: int, *, moved: float = 0.0) -> Kept:
    """Train, and give back what the iterations knew."""
    kept = Kept(moved)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=iterations,
        limit_val_batches=0,
        logger=False,
        callbacks=[kept],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    vocabulary = made.base.config["vocab_size"]  # type: ignore[index]
    trainer.fit(made, datamodule=PromptData(vocabulary))
    return kept
