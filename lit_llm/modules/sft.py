"""Supervised fine-tuning: a causal language model on conversations, whole or through adapters.

Shapes: B batch, T sequence, D width.
"""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lit_llm.errors import UserError
from lit_llm.functional import neftune_noise, segment_lengths
from lit_llm.models.adapters import AdapterConfig
from lit_llm.models.config import BaseModelConfig
from lit_llm.modules.causal_lm import NextTokenModule
from lit_llm.modules.schedules import Schedule


class SFTModule(NextTokenModule):
    """Next-token prediction on the tokens that ``labels`` choose: what the assistant says.

    Args:
        base: The model to fine-tune.
        tokenizer: Folder, Hub name or .gguf file of the tokenizer. The command line takes it from
            ``data.tokenizer``.
        seq_len: Longest sequence that will be fed; the command line takes it from
            ``data.seq_len``.
        chat_template: File with a chat template; the command line takes it from the data's.
        pad_token: Text of the padding token; the command line takes it from the data's.
        adapter: Train adapters (LoRA, DoRA, QLoRA) instead of all weights. They are saved as a peft
            folder in the output folder, and merged into the exported model.
        neftune_alpha: Strength of the noise on the embeddings in training (NEFTune,
            https://arxiv.org/abs/2310.05914); 5 is usual, 0 is off.
        optimizer: The optimizer's class and its settings. Norms, biases and embeddings get no
            weight decay.
        schedule: The learning rate over the run.
        z_loss: Weight of the penalty on log(Z)^2; 0 is off.

    Raises:
        UserError: For a value that makes no sense.
    """

    def __init__(
        self,
        base: BaseModelConfig,
        tokenizer: str | None = None,
        seq_len: int | None = None,
        chat_template: str | None = None,
        pad_token: str | None = None,
        adapter: AdapterConfig | None = None,
        neftune_alpha: float = 0.0,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(
            params, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
        ),
        schedule: Schedule = Schedule(name="cosine", warmup_steps=0.03),  # noqa: B008 - frozen
        z_loss: float = 0.0,
    ) -> None:
        super().__init__(
            base,
            tokenizer,
            seq_len,
            optimizer,
            schedule,
            z_loss,
            chat_template,
            pad_token,
            adapter,
        )
        if neftune_alpha < 0:
            raise UserError(
                f"neftune_alpha must not be negative, got {neftune_alpha}; 5 is usual, 0 is off"
            )
        self.save_hyperparameters({"neftune_alpha": neftune_alpha})
        self.neftune_alpha = neftune_alpha
        self._noise = _Noise(neftune_alpha)

    def build_model(self, tokenizer: Any | None) -> Any:
        """Build or load the model, and let NEFTune reach its embeddings."""
        model = super().build_model(tokenizer)
        if self.neftune_alpha:
            model.get_input_embeddings().register_forward_hook(self._noise)
        return model

    # ----- NEFTune ------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return this micro-batch's share of the mean loss over the global batch's tokens."""
        if self.neftune_alpha:
            self._noise.lengths = _sample_lengths(batch)
        try:
            return super().training_step(batch, batch_idx)
        finally:
            self._noise.lengths = None


class _Noise:
    """Adds noise to embeddings (B, T, D), in training steps only.

    It knows nothing of the module: a copy of the model takes its hooks along, and what they know.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.lengths: Tensor | None = None  # within a step

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        lengths = self.lengths
        if lengths is None:
            return output
        if lengths.shape != output.shape[:2]:  # padding was left out, and all rows made one
            lengths = lengths[lengths > 0][None]
        return neftune_noise(output, lengths, self.alpha)


def _sample_lengths(batch: dict[str, Tensor]) -> Tensor:
    """(B, T): tokens of the sample that each token belongs to; 0 at padding."""
    if "document_ids" in batch:
        return segment_lengths(batch["document_ids"])
    mask = batch.get("attention_mask")
    return segment_lengths(
        torch.zeros_like(batch["input_ids"]) if mask is None else mask.long() - 1
    )
