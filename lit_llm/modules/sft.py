"""Supervised fine-tuning: a causal language model on conversations, whole or through adapters.

Shapes: B batch, T sequence, D width.
"""

from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_llm.data.chat_template import stop_token_ids
from lit_llm.data.chat_tokenizer import load_chat_tokenizer
from lit_llm.errors import UserError
from lit_llm.functional import neftune_noise, segment_lengths
from lit_llm.models.adapters import AdapterConfig, add_adapter, trainable_summary
from lit_llm.models.config import BaseModelConfig
from lit_llm.models.vocabulary import set_stop_tokens
from lit_llm.modules.causal_lm import CausalLMModule
from lit_llm.modules.frozen import frozen_fingerprint, kept_elsewhere
from lit_llm.modules.schedules import Schedule


class SFTModule(CausalLMModule):
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
        super().__init__(base, tokenizer, seq_len, optimizer, schedule, z_loss)
        if isinstance(adapter, dict):  # from a checkpoint, which holds plain data
            adapter = AdapterConfig(**adapter)
        if adapter is not None:
            adapter.validate()
        if neftune_alpha < 0:
            raise UserError(
                f"neftune_alpha must not be negative, got {neftune_alpha}; 5 is usual, 0 is off"
            )
        self.save_hyperparameters(
            {
                "chat_template": chat_template,
                "pad_token": pad_token,
                "adapter": None if adapter is None else asdict(adapter),
                "neftune_alpha": neftune_alpha,
            }
        )
        self.chat_template = chat_template
        self.pad_token = pad_token
        self.adapter = adapter
        self.neftune_alpha = neftune_alpha
        self._noise_lengths: Tensor | None = None
        self._frozen: set[str] = set()
        self._base_fingerprint = ""
        # The frozen weights of a pretrained model are where they came from: a checkpoint needs no
        # copy of them.
        self.saves_frozen = adapter is None or not self.base.pretrained
        self.strict_loading = self.saves_frozen

    # ----- the model ----------------------------------------------------------------------------

    def load_tokenizer(self) -> Any:
        """Load the tokenizer with a chat template and a padding token."""
        return load_chat_tokenizer(
            str(self.tokenizer_path), chat_template=self.chat_template, pad_token=self.pad_token
        )

    def build_model(self, tokenizer: Any | None, quantization: Literal["nf4"] | None = None) -> Any:
        """Build or load the model, let it stop at the end of a turn, and add the adapters."""
        if self.adapter is not None:
            quantization = self.adapter.quantization
        model = super().build_model(tokenizer, quantization)
        if tokenizer is not None:
            set_stop_tokens(model, stop_token_ids(tokenizer))
        if self.adapter is not None:
            model = add_adapter(model, self.adapter)
        if not self.saves_frozen:
            # Told now: precision and strategy may change how the weights are held.
            self._frozen = {f"model.{name}" for name in kept_elsewhere(model)}
            self._base_fingerprint = frozen_fingerprint(model)
        if self.neftune_alpha:
            model.get_input_embeddings().register_forward_hook(self._add_noise)
        return model

    def on_fit_start(self) -> None:
        """Tell how much is trained."""
        rank_zero_info(trainable_summary(self.model))

    # ----- NEFTune ------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return this micro-batch's share of the mean loss over the global batch's tokens."""
        if self.neftune_alpha:
            self._noise_lengths = _sample_lengths(batch)
        try:
            return super().training_step(batch, batch_idx)
        finally:
            self._noise_lengths = None

    def _add_noise(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Add noise to embeddings (B, T, D), in training steps only."""
        lengths = self._noise_lengths
        if lengths is None:
            return output
        if lengths.shape != output.shape[:2]:  # padding was left out, and all rows made one
            lengths = lengths[lengths > 0][None]
        return neftune_noise(output, lengths, self.neftune_alpha)

    # ----- checkpoints --------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the frozen weights of a pretrained model, but tell which they were."""
        super().on_save_checkpoint(checkpoint)
        hyper_parameters, state = checkpoint["hyper_parameters"], checkpoint["state_dict"]
        if self.saves_frozen:  # it is loaded without a tokenizer, which would know how turns end
            stops = self.model.generation_config.eos_token_id
            hyper_parameters["base"]["config"]["eos_token_id"] = stops
            return
        hyper_parameters |= {"base": asdict(self.base), "tokenizer": self.tokenizer_path}
        checkpoint["frozen"] = self._base_fingerprint
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k not in self._frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse adapters that were trained on other weights.

        Raises:
            UserError: The checkpoint is of another model.
        """
        super().on_load_checkpoint(checkpoint)
        if self.saves_frozen or not checkpoint.get("state_dict"):
            return
        differing = (self.state_dict().keys() - self._frozen) ^ checkpoint["state_dict"].keys()
        if differing:
            raise UserError(
                f"the checkpoint is of another model: {min(differing)} exists only here or only "
                "there; resume with the settings it was trained with, or give another --output_dir"
            )
        if checkpoint.get("frozen") != self._base_fingerprint:
            raise UserError(
                f"the checkpoint holds adapters of another base model than {self.base.pretrained}; "
                "give the weights it was trained on (model.base.pretrained) or another --output_dir"
            )


def _sample_lengths(batch: dict[str, Tensor]) -> Tensor:
    """(B, T): tokens of the sample that each token belongs to; 0 at padding."""
    if "document_ids" in batch:
        return segment_lengths(batch["document_ids"])
    mask = batch.get("attention_mask")
    return segment_lengths(
        torch.zeros_like(batch["input_ids"]) if mask is None else mask.long() - 1
    )
