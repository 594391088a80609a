"""The accumulation law: batch 8 == 2 x 4 == 4 x 2, with unequal token counts, last window too."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from lit_llm.data.loader import Cursor, ResumableLoader
from lit_llm.models.config import BaseModelConfig
from lit_llm.modules.causal_lm import CausalLMModule
from lit_llm.modules.schedules import Schedule

CONFIG = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
}
SAMPLES, STEPS, LENGTH, RATE = 20, 3, 12, 0.5


def samples() -> list[dict[str, Tensor]]:
    """Sequences of which between one and all tokens have a label."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for number in range(SAMPLES):
        ids = torch.randint(0, 31, (LENGTH,), generator=generator)
        labels = ids.clone()
        labels[: LENGTH - 1 - (number * 5) % (LENGTH - 1)] = -100
        result.append({"input_ids": ids, "labels": labels})
    return result


class InOrder:
    """Samples 0, 1, 2, ...: a stream of one epoch."""

    def __len__(self) -> int:
        return SAMPLES

    def indices(self, start: int, stop: int) -> Any:
        return np.arange(start, stop) % SAMPLES


class Data(LightningDataModule):
    """Hands out the samples in order."""

    def __init__(self, micro_batch_size: int) -> None:
        super().__init__()
        self.micro_batch_size = micro_batch_size
        self.batches_per_epoch = SAMPLES // micro_batch_size

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(
            samples(),  # type: ignore[arg-type]
            InOrder(),
            Cursor(),
            micro_batch_size=self.micro_batch_size,
            collate_fn=torch.utils.data.default_collate,
            count_targets=lambda batch: int((batch["labels"][:, 1:] != -100).sum()),
            accumulate=self.trainer.accumulate_grad_batches,
        )


def module() -> CausalLMModule:
    """A tiny Llama under plain gradient descent, so that a wrong scale of a gradient shows."""
    torch.manual_seed(0)
    return CausalLMModule(
        BaseModelConfig(config=CONFIG),
        optimizer=lambda params: torch.optim.SGD(params, lr=RATE),
        schedule=Schedule("constant", warmup_steps=0),
    )


def trained(micro_batch_size: int, accumulate: int, clip: float | None) -> dict[str, Tensor]:
    """Weights after one epoch of 20 samples: two windows of 8 and a last one of 4."""
    lightning_module = module()
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(lightning_module, datamodule=Data(micro_batch_size))
    return {name: value.clone() for name, value in lightning_module.state_dict().items()}


def by_hand(clip: float | None) -> dict[str, Tensor]:
    """The same three updates, written out: mean loss over all target tokens of 8, 8 and 4."""
    lightning_module = module()
    lightning_module.configure_model()
    model = lightning_module.model
    for first in (0, 8, 16):
        chosen = samples()[first : first + 8]
        ids = torch.stack([sample["input_ids"] for sample in chosen])
        labels = torch.stack([sample["labels"] for sample in chosen])
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
        model.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
    return {f"model.{name}": value for name, value in model.state_dict().items()}


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize(("micro_batch_size", "accumulate"), [(4, 2), (2, 4), (1, 8)])
def test_accumulation_changes_nothing(
    micro_batch_size: int, accumulate: int, clip: float | None
) -> None:
    expected = by_hand(clip)
    found = trained(micro_batch_size, accumulate, clip)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_the_law_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """With means of micro-batch means, which is what Lightning does by itself, it does."""
    monkeypatch.setattr(CausalLMModule, "global_mean", _mean_of_means)
    monkeypatch.setattr(CausalLMModule, "on_train_batch_start", _count_targets, raising=False)
    found = trained(2, 4, None)
    expected = by_hand(None)
    assert max(float((found[k] - expected[k]).abs().max()) for k in expected) > 1e-3


def _count_targets(self: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
    self.micro_batch_targets = int((batch["labels"][:, 1:] != -100).sum())


def _mean_of_means(self: Any, loss_sum: Tensor, tokens: Tensor, batch_idx: int) -> Tensor:
    self._window_targets = tokens
    return loss_sum / self.micro_batch_targets
