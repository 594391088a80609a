"""Reward models: a score for every answer, learned from which of two is better.

Shapes: N answers, T sequence, H heads, P pairs.
"""

from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_llm.errors import UserError
from lit_llm.functional.preference import bradley_terry_loss
from lit_llm.models.adapters import AdapterConfig
from lit_llm.models.config import BaseModelConfig
from lit_llm.models.reward import (
    Aggregation,
    RewardStatistics,
    build_reward_model,
    score,
    standardised,
    write_statistics,
)
from lit_llm.modules.preference import Comparison, PreferenceModule
from lit_llm.modules.schedules import Schedule


class RewardModule(PreferenceModule):
    """A transformers backbone with a scalar head, trained on comparisons (Bradley-Terry).

    The head reads the last token of prompt and answer. Mean and standard deviation of the scores of
    the validation split's answers are kept with the model after every validation, so whoever uses
    its scores gets them standardised.

    Args:
        base: The model to start from: a causal language model, which gets a new head, best a
            fine-tuned one; or a reward model, which keeps its own.
        tokenizer: Folder, Hub name or .gguf file of the tokenizer. The command line takes it from
            ``data.tokenizer``.
        seq_len: Longest sequence that will be fed; the command line takes it from
            ``data.seq_len``.
        chat_template: File with a chat template; the command line takes it from the data's.
        pad_token: Text of the padding token; the command line takes it from the data's.
        adapter: Train adapters (LoRA, DoRA, QLoRA) and the head instead of all weights.
        heads: Heads on one backbone, an ensemble that begins from different random heads
            (https://arxiv.org/abs/2401.00243); their scores are standardised one by one and put
            together by ``aggregation``.
        aggregation: ``mean`` of the heads; ``min``, the most careful head; or ``mean_minus_std``,
            which takes off where the heads disagree (https://arxiv.org/abs/2310.02743).
        margin: Factor of the margins that the data may give: how much higher the better answer is
            to score (Llama 2, https://arxiv.org/abs/2307.09288); 0 ignores them.
        centring: Strength of the pull of the scores towards 0
            (https://arxiv.org/abs/2312.09244); 0.01 is usual, 0 is off.
        label_smoothing: How often a preference is taken to be the wrong way round; below 0.5.
        optimizer: The optimizer's class and its settings. Norms, biases and embeddings get no
            weight decay.
        schedule: The learning rate over the run.

    Raises:
        UserError: For a value that makes no sense.
    """

    scores_texts = True

    def __init__(
        self,
        base: BaseModelConfig,
        tokenizer: str | None = None,
        seq_len: int | None = None,
        chat_template: str | None = None,
        pad_token: str | None = None,
        adapter: AdapterConfig | None = None,
        heads: int = 1,
        aggregation: Aggregation = "mean",
        margin: float = 1.0,
        centring: float = 0.01,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(
            params, lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
        ),
        schedule: Schedule = Schedule(name="cosine", warmup_steps=0.03),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(
            base, tokenizer, seq_len, optimizer, schedule, chat_template, pad_token, adapter
        )
        if heads < 1:
            raise UserError(f"model: heads must be at least 1, got {heads}")
        if margin < 0 or centring < 0:
            raise UserError(
                f"model: margin {margin} and centring {centring} must not be negative; 0 is off"
            )
        if not 0 <= label_smoothing < 0.5:
            raise UserError(
                f"model: label_smoothing must be at least 0 and below 0.5, got {label_smoothing}"
            )
        self.save_hyperparameters(
            {
                "heads": heads,
                "aggregation": aggregation,
                "margin": margin,
                "centring": centring,
                "label_smoothing": label_smoothing,
            }
        )
        self.heads = heads
        self.aggregation: Aggregation = aggregation
        self.margin = margin
        self.centring = centring
        self.label_smoothing = label_smoothing
        # Plain numbers: buffers would be rounded to the precision of the weights.
        self.statistics: RewardStatistics | None = None
        """Mean and standard deviation of each head's scores; None before the first validation."""
        self.reference_answers = 0
        """How many answers they were measured on."""
        self._measured_at = -1
        self._moments = torch.zeros(0)

    def build_bare(self, quantization: Literal["nf4"] | None, **vocabulary: Any) -> Any:
        """Build the backbone with its head, or load it."""
        return build_reward_model(
            self.base,
            heads=self.heads,
            seq_len=self.seq_len,
            quantization=quantization,
            **vocabulary,
        )

    def exported(self, model: Any) -> Any:
        """The reward model with its statistics in the config, adapters merged into a copy."""
        merged = super().exported(model)
        if self.statistics is None:
            rank_zero_warn(
                "the reward model was never validated, so the mean and the standard deviation of "
                "its scores are not known and not exported; set data.val_fraction above 0"
            )
        else:
            write_statistics(merged, self.statistics)
        return merged

    def compare(self, batch: dict[str, Tensor]) -> Comparison:
        """Score all answers in one forward."""
        scores = score(self.model, batch["input_ids"], batch["attention_mask"])
        found = bradley_terry_loss(
            scores,
            batch["pairs"],
            weights=batch["pair_weights"],
            margins=batch["margins"] * self.margin,
            label_smoothing=self.label_smoothing,
            centring=self.centring,
        )
        heads = scores.detach()
        return Comparison(found.loss, found.correct, self._aggregated(heads), {}, heads)

    def _aggregated(self, scores: Tensor) -> Tensor:
        """What PPO will see of scores (N, H), but in the units of the loss (logits of a pair)."""
        known = self.statistics or RewardStatistics(
            [0.0] * self.heads, [1.0] * self.heads, self.aggregation
        )
        mean, std = (sum(values) / self.heads for values in (known.mean, known.std))
        return standardised(scores, known) * std + mean

    def measures(self, sums: dict[str, float]) -> dict[str, float]:
        """Loss (nats a prompt), accuracy and margin, and the mean score of either side."""
        names = {"values/better": "score_better", "values/worse": "score_worse"}
        return {names.get(name, name): value for name, value in sums.items()}

    # ----- mean and standard deviation of the scores --------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        super().on_validation_epoch_start()
        self._moments = torch.zeros(3, self.heads, dtype=torch.double, device=self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Keep how each pair is judged, and the moments of the scores."""
        scores = self._evaluate(batch, 0).heads
        assert scores is not None
        # Each answer once; what fills up a rank's last batch has no weight.
        counted = batch["pairs"][batch["pair_weights"] > 0].unique()
        kept = scores[counted].double()
        self._moments += torch.stack([torch.ones_like(kept), kept, kept.square()]).sum(1)

    def on_validation_epoch_end(self) -> None:
        """Log the measures, and keep mean and standard deviation of the scores with the model."""
        super().on_validation_epoch_end()
        count, total, squares = self.data_parallel_sum(self._moments)
        if self.trainer.sanity_checking or not int(count[0]):
            return
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        # Scores that are all the same are left as they are, rather than divided by 0.
        kept = torch.where(std > 1e-6 * mean.abs().clamp(min=1), std, 1.0)
        self.statistics = RewardStatistics(mean.tolist(), kept.tolist(), self.aggregation)
        self.reference_answers = int(count[0])
        self._measured_at = self.global_step
        self.log("val/score_std", std.mean())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the statistics, if they are those of these weights."""
        super().on_save_checkpoint(checkpoint)
        if self.statistics is not None and self._measured_at == self.global_step:
            checkpoint["reward_statistics"] = asdict(self.statistics)
            checkpoint["reference_answers"] = self.reference_answers

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the statistics up again."""
        super().on_load_checkpoint(checkpoint)
        kept = checkpoint.get("reward_statistics")
        self.statistics = None if kept is None else RewardStatistics(**kept)
        self.reference_answers = checkpoint.get("reference_answers", 0)
        self._measured_at = checkpoint["global_step"]
