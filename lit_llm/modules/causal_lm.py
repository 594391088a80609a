"""Causal language modelling: the loss of pre-training and fine-tuning, and the pre-training stage.

Shapes: B batch, T sequence.
"""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_llm.errors import UserError
from lit_llm.evaluation.token_metrics import TokenMetrics
from lit_llm.models.adapters import AdapterConfig
from lit_llm.models.config import BaseModelConfig
from lit_llm.models.forward import causal_lm_loss, causal_lm_statistics
from lit_llm.modules.model import ModelModule
from lit_llm.modules.schedules import Schedule


class NextTokenModule(ModelModule):
    """What the stages that predict the next token share: the loss and the held-out measures.

    Args:
        base: The model to start from.
        tokenizer: Folder, Hub name or .gguf file of the tokenizer.
        seq_len: Longest sequence that will be fed.
        optimizer: Builds the optimizer from parameter groups.
        schedule: The learning rate over the run.
        z_loss: Weight of the penalty on log(Z)^2 that keeps logits from drifting (PaLM,
            https://arxiv.org/abs/2204.02311, section 5); 0 is off.
        chat_template: File with a chat template.
        pad_token: Text of the padding token.
        adapter: Train adapters instead of all weights.

    Raises:
        UserError: For a value that makes no sense.
    """

    def __init__(
        self,
        base: BaseModelConfig,
        tokenizer: str | None,
        seq_len: int | None,
        optimizer: OptimizerCallable,
        schedule: Schedule,
        z_loss: float = 0.0,
        chat_template: str | None = None,
        pad_token: str | None = None,
        adapter: AdapterConfig | None = None,
    ) -> None:
        super().__init__(
            base, tokenizer, seq_len, optimizer, schedule, chat_template, pad_token, adapter
        )
        if z_loss < 0:
            raise UserError(f"z_loss must not be negative, got {z_loss}; 1e-4 is usual, 0 is off")
        self.save_hyperparameters({"z_loss": z_loss})
        self.z_loss = z_loss
        self.val_metrics = TokenMetrics()
        self._window_nll: Tensor | None = None
        self._token_bytes: Tensor | None = None

    # ----- training -----------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return this micro-batch's share of the mean loss over the global batch's tokens."""
        sums = causal_lm_loss(self.model, **model_inputs(batch), z_loss=self.z_loss)
        if batch_idx % self.trainer.accumulate_grad_batches == 0 or self._window_nll is None:
            self._window_nll = torch.zeros_like(sums.nll)
        self._window_nll += sums.nll
        return self.global_mean(sums.loss, batch["num_targets"], batch_idx)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the global batch's mean loss, all its ranks and micro-batches counted."""
        super().on_before_optimizer_step(optimizer)
        if self._window_nll is None or self._window_targets is None:
            return
        loss = self.data_parallel_sum(self._window_nll) / self._window_targets.clamp(min=1)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/perplexity", loss.exp())

    # ----- evaluation ---------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew, one for each source."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        labels = getattr(datamodule, "source_labels", None)
        self.val_metrics = TokenMetrics(labels).to(self.device)
        self.val_metrics.process_group = self.data_parallel_group
        self._token_bytes = getattr(datamodule, "token_bytes", None)
        if self._token_bytes is not None:
            self._token_bytes = self._token_bytes.to(self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add the batch's token losses to the sums."""
        nll, correct, is_target = causal_lm_statistics(self.model, **model_inputs(batch))
        num_bytes = None
        if self._token_bytes is not None:
            # A position predicts the token after it; the last one predicts nothing.
            num_bytes = self._token_bytes[batch["input_ids"]].roll(-1, dims=1)
        self.val_metrics.update(nll, correct, is_target, batch.get("source"), num_bytes)

    def on_validation_epoch_end(self) -> None:
        """Log loss, perplexity, bits per byte and token accuracy over all tokens of all ranks."""
        self._log_evaluation("val")

    def on_test_epoch_start(self) -> None:
        """Start the sums anew."""
        self.on_validation_epoch_start()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add the batch's token losses to the sums."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the held-out measures."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        for name, value in self.val_metrics.compute().items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "loss")


class CausalLMModule(NextTokenModule):
    """Next-token prediction on a transformers model.

    Args:
        base: The model to start from: a preset or a config (random weights), or pretrained ones.
        tokenizer: Folder or Hub name of the tokenizer; it fixes the vocabulary and the special ids
            of a new model. The command line takes it from ``data.tokenizer``.
        seq_len: Longest sequence that will be fed; the command line takes it from
            ``data.seq_len``.
        optimizer: The optimizer's class and its settings. Norms, biases and embeddings get no
            weight decay.
        schedule: The learning rate over the run.
        z_loss: Weight of the penalty on log(Z)^2 that keeps logits from drifting (PaLM,
            https://arxiv.org/abs/2204.02311, section 5); 1e-4 is usual, 0 is off.
    """

    reads_chats = False

    def __init__(
        self,
        base: BaseModelConfig,
        tokenizer: str | None = None,
        seq_len: int | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(
            params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
        ),
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen, so it can be shared
        z_loss: float = 0.0,
    ) -> None:
        super().__init__(base, tokenizer, seq_len, optimizer, schedule, z_loss)


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Any]:
    """Leave out what the batch carries for others: sources and token counts."""
    names = ("input_ids", "labels", "attention_mask", "position_ids", "document_ids")
    return {name: batch[name] for name in names if name in batch}
