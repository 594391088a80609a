"""What the stages that learn from comparisons share: reward models and DPO.

Shapes: N answers, P pairs, B prompts.
"""

from abc import abstractmethod
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_llm.evaluation.intervals import Rate, rate
from lit_llm.evaluation.pair_metrics import PairMetrics
from lit_llm.evaluation.preference_measures import ScoredPairs
from lit_llm.models.adapters import AdapterConfig
from lit_llm.models.config import BaseModelConfig
from lit_llm.modules.model import ModelModule
from lit_llm.modules.schedules import Schedule

_TESTED = ("test", "ood")
_LEAST_PAIRS = 30
"""Fewer pairs say nothing about swapped columns."""


class Comparison(NamedTuple):
    """How a model judges a batch of preferences.

    Attributes:
        loss: 0-dim, the weighted sum over pairs.
        correct: (P,) 1 where the better answer is preferred, 0.5 at a tie.
        values: (N,) what the answers are compared by, detached: scores or implicit rewards.
        details: More values of each answer (N,), detached, to be logged.
        heads: (N, H) what each head of a reward model says, detached.
    """

    loss: Tensor
    correct: Tensor
    values: Tensor
    details: dict[str, Tensor]
    heads: Tensor | None = None


class PreferenceModule(ModelModule):
    """The ground of the stages that learn which of two answers is better.

    The loss is a mean over prompts: the pairs of a prompt share its weight, as in InstructGPT
    (https://arxiv.org/abs/2203.02155, equation 1).

    Args:
        base: The model to start from. Dropout is off unless ``dropout`` asks for it: it would blur
            what two answers are compared by.
        tokenizer: Folder, Hub name or .gguf file of the tokenizer.
        seq_len: Longest sequence that will be fed.
        optimizer: Builds the optimizer from parameter groups.
        schedule: The learning rate over the run.
        chat_template: File with a chat template.
        pad_token: Text of the padding token.
        adapter: Train adapters instead of all weights.
    """

    def __init__(
        self,
        base: BaseModelConfig,
        tokenizer: str | None,
        seq_len: int | None,
        optimizer: OptimizerCallable,
        schedule: Schedule,
        chat_template: str | None,
        pad_token: str | None,
        adapter: AdapterConfig | None,
    ) -> None:
        if isinstance(base, dict):  # from a checkpoint, which holds plain data
            base = BaseModelConfig(**base)
        if base.dropout is None:
            base = replace(base, dropout=0.0)
        super().__init__(
            base, tokenizer, seq_len, optimizer, schedule, chat_template, pad_token, adapter
        )
        self.pair_metrics = torch.nn.ModuleList([PairMetrics(), PairMetrics()])
        self._window: dict[str, Tensor] = {}

    # ----- what a stage says --------------------------------------------------------------------

    @abstractmethod
    def compare(self, batch: dict[str, Tensor]) -> Comparison:
        """Judge a batch of preferences."""

    @abstractmethod
    def measures(self, sums: dict[str, float]) -> dict[str, float]:
        """Name what is logged of the means over prompts (loss) and pairs (all else).

        Args:
            sums: ``loss``, ``accuracy``, ``margin``; and each of the values and details over the
                better and the worse answers, as ``NAME/better`` and ``NAME/worse``.
        """

    # ----- training -----------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return this micro-batch's share of the mean loss over the global batch's prompts."""
        found = self.compare(batch)
        sums = _sums(found, batch)
        if batch_idx % self.trainer.accumulate_grad_batches == 0 or not self._window:
            self._window = {name: torch.zeros_like(value) for name, value in sums.items()}
        for name, value in sums.items():
            self._window[name] += value
        return self.global_mean(found.loss, batch["num_targets"], batch_idx)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log means over the global batch, all its ranks and micro-batches counted."""
        super().on_before_optimizer_step(optimizer)
        if not self._window:
            return
        totals = self.data_parallel_sum(torch.stack(list(self._window.values())))
        means = _means(dict(zip(self._window, totals.tolist(), strict=True)))
        for name, value in self.measures(means).items():
            self.log(f"train/{name}", value, prog_bar=name == "loss")

    # ----- evaluation ---------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        metrics: Any = self.pair_metrics
        for metric in metrics:
            metric.reset()
            metric.process_group = self.data_parallel_group

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Keep how each pair is judged."""
        self._evaluate(batch, 0)

    def on_validation_epoch_end(self) -> None:
        """Log loss, accuracy and margin over all pairs, and look for swapped columns."""
        pairs = self._log_evaluation("val", 0)
        if pairs is not None and not self.trainer.sanity_checking and self.global_step:
            self._warn_of_swapped_columns(pairs)

    def on_test_epoch_start(self) -> None:
        """Start the sums anew."""
        self.on_validation_epoch_start()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Keep how each pair is judged; the second loader reads the set out of distribution."""
        self._evaluate(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log the held-out measures."""
        for number, name in enumerate(_TESTED):
            self._log_evaluation(name, number)

    @property
    def scored_pairs(self) -> dict[str, ScoredPairs]:
        """Every pair of a test, the same on all ranks: of the sets ``test`` and maybe ``ood``."""
        metrics: Any = zip(_TESTED, self.pair_metrics, strict=True)
        found = {name: metric.judged()[1] for name, metric in metrics}
        return {name: pairs for name, pairs in found.items() if pairs is not None}

    def _evaluate(self, batch: dict[str, Tensor], loader: int) -> Comparison:
        found = self.compare(batch)
        agreement = None
        if found.heads is not None and found.heads.shape[1] > 1:
            better, worse = found.heads[batch["pairs"]].unbind(1)
            agreement = (better > worse).float().mean(1)
        metric: Any = self.pair_metrics[loader]
        metric.update(found.loss, found.values, found.details, batch, agreement)
        return found

    def _log_evaluation(self, stage: str, loader: int) -> ScoredPairs | None:
        metric: Any = self.pair_metrics[loader]
        means, pairs = metric.judged()
        if pairs is None:
            return None
        for name, value in self.measures(means).items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "loss")
        shares = self._by_source(pairs)
        if len(shares) > 1:
            for label, share in shares.items():
                self.log(f"{stage}/accuracy/{label}", share.value)
        return pairs

    def _by_source(self, pairs: ScoredPairs) -> dict[str, Rate]:
        labels: list[str] = self.trainer.datamodule.source_labels  # type: ignore[attr-defined]
        correct, prompts = pairs.correct, pairs.prompts
        return {
            labels[number]: rate(correct[own], prompts[own])
            for number in pairs.source.unique().tolist()
            for own in [pairs.source == number]
        }

    def _warn_of_swapped_columns(self, pairs: ScoredPairs) -> None:
        for label, share in self._by_source(pairs).items():
            if share.pairs >= _LEAST_PAIRS and share.high < 0.5:
                rank_zero_warn(
                    f"{label}: the model prefers the worse answer in most of {share.pairs} "
                    f"held-out pairs (accuracy {share.value:.2f}); look whether chosen and "
                    "rejected are swapped there"
                )


def _sums(found: Comparison, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over the prompts (loss, weight) and pairs (all else) of a micro-batch, detached."""
    better, worse = batch["pairs"].unbind(1)
    sums = {
        "loss": found.loss.detach(),
        "prompts": batch["pair_weights"].sum(),
        "pairs": torch.ones_like(found.correct).sum(),
        "accuracy": found.correct.sum(),
        "margin": (found.values[better] - found.values[worse]).sum(),
    }
    for name, values in ({"values": found.values} | found.details).items():
        sums[f"{name}/better"] = values[better].sum()
        sums[f"{name}/worse"] = values[worse].sum()
    return {name: value.detach().float() for name, value in sums.items()}


def _means(sums: dict[str, float]) -> dict[str, float]:
    """The loss a prompt and everything else a pair."""
    prompts, pairs = sums.pop("prompts"), sums.pop("pairs")
    return {
        name: value / max(prompts if name == "loss" else pairs, 1.0) for name, value in sums.items()
    }
