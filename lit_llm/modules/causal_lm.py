"""Causal language modelling: the pre-training stage, and the ground of supervised fine-tuning.

Shapes: B batch, T sequence, V vocabulary.
"""

from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_llm.data.tokenizer import load_tokenizer
from lit_llm.errors import UserError
from lit_llm.evaluation.token_metrics import TokenMetrics
from lit_llm.models.build import build_model, config_fields
from lit_llm.models.compile import compile_blocks
from lit_llm.models.config import BaseModelConfig
from lit_llm.models.forward import causal_lm_loss, causal_lm_statistics
from lit_llm.models.vocabulary import vocabulary_of
from lit_llm.modules.base import BaseModule
from lit_llm.modules.schedules import Schedule


class CausalLMModule(BaseModule):
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
        if isinstance(base, dict):  # from a checkpoint, which holds plain data
            base = BaseModelConfig(**base)
        if isinstance(schedule, dict):
            schedule = Schedule(**schedule)
        super().__init__(optimizer, schedule)
        if z_loss < 0:
            raise UserError(f"z_loss must not be negative, got {z_loss}; 1e-4 is usual, 0 is off")
        self.save_hyperparameters(
            {
                "base": asdict(base),
                "tokenizer": tokenizer,
                "seq_len": seq_len,
                "schedule": asdict(schedule),
                "z_loss": z_loss,
            }
        )
        self.base = base
        self.tokenizer_path = tokenizer
        self.seq_len = seq_len
        self.z_loss = z_loss
        self.model: Any = None
        self.val_metrics = TokenMetrics()
        self._window_nll: Tensor | None = None
        self._token_bytes: Tensor | None = None

    def configure_model(self) -> None:
        """Build the model, once; strategies call this where its weights should come to life."""
        if self.model is not None:
            return
        tokenizer = None if self.tokenizer_path is None else self.load_tokenizer()
        self.model = self.build_model(tokenizer)
        if self.base.compile:
            compile_blocks(self.model)

    def load_tokenizer(self) -> Any:
        """Load the tokenizer that fixes the vocabulary and the special ids."""
        return load_tokenizer(str(self.tokenizer_path))

    def build_model(self, tokenizer: Any | None, quantization: Literal["nf4"] | None = None) -> Any:
        """Build or load the model.

        Args:
            tokenizer: What it must fit; ``None`` leaves the vocabulary to the config.
            quantization: Hold the weights in 4 bits, where only adapters are trained.
        """
        vocabulary: dict[str, Any] = {} if tokenizer is None else {**vocabulary_of(tokenizer)}
        return build_model(self.base, seq_len=self.seq_len, quantization=quantization, **vocabulary)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe the architecture itself, so that loading needs neither tokenizer nor Hub."""
        base = {**asdict(self.base), "pretrained": None, "preset": None}
        base["config"] = config_fields(self.model.config)
        checkpoint["hyper_parameters"] |= {"base": base, "tokenizer": None}

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Run the model: ids (B, T) to a transformers output with logits (B, T, V)."""
        return self.model(input_ids=input_ids, **kwargs)

    # ----- training -----------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return this micro-batch's share of the mean loss over the global batch's tokens."""
        sums = causal_lm_loss(self.model, **model_inputs(batch), z_loss=self.z_loss)
        if batch_idx % self.trainer.accumulate_grad_batches == 0 or self._window_nll is None:
            self._window_nll = torch.zeros_like(sums.nll)
        self._window_nll += sums.nll
        return self.token_mean(sums.loss, batch["num_target_tokens"], batch_idx)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the global batch's mean loss, all its ranks and micro-batches counted."""
        super().on_before_optimizer_step(optimizer)
        if self._window_nll is None or self._window_tokens is None:
            return
        loss = self.data_parallel_sum(self._window_nll) / self._window_tokens.clamp(min=1)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/perplexity", loss.exp())

    # ----- evaluation ---------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew, one for each source."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        labels = getattr(datamodule, "source_labels", None)
        self.val_metrics = TokenMetrics(labels).to(self.device)
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


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Any]:
    """Leave out what the batch carries for others: sources and token counts."""
    names = ("input_ids", "labels", "attention_mask", "position_ids", "document_ids")
    return {name: batch[name] for name in names if name in batch}
