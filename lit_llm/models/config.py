"""Which model to train, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lit_llm.errors import UserError


@dataclass
class BaseModelConfig:
    """A transformers model: pretrained, or with random weights from a config or a preset.

    A recipe's preset is its default: it is left alone where ``pretrained`` or a whole ``config``
    (one with a ``model_type``) is given, and filled up where ``config`` names single fields.

    Args:
        pretrained: Folder with a Hugging Face model, the name of one on the Hugging Face Hub, or a
            ``.gguf`` file (unpacked; it needs ``pip install gguf accelerate``).
        preset: A ready-made architecture with random weights, e.g. ``llama-5m`` or ``qwen3-15m``.
        config: A transformers config with random weights, e.g.
            ``{"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 4}``; without
            ``model_type``, fields that differ from the preset's.
        dtype: Data type of the weights. Mixed precision keeps float32 weights.
        attn_implementation: Attention of transformers: ``sdpa``, ``eager``, ``flash_attention_2``
            or ``flex_attention``; or ``blocked``, ours, which is faster than SDPA in bfloat16
            training on a CPU and is SDPA everywhere else.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        compile: Compile every decoder block with ``torch.compile``.
        revision: Branch, tag or commit of a model on the Hub.
        trust_remote_code: Run Python code that comes with a model of the Hub. Leave it off unless
            you have read that code.
        dropout: Probability of every dropout the architecture has (Llama and Qwen: on attention
            weights only); by default what the model's config says.
        resize_embeddings: Give a pretrained model whose embedding has fewer rows than the tokenizer
            has tokens new rows, near the mean of the old ones. They must be trained: with adapters
            add ``embed_tokens`` to ``modules_to_save``.
    """

    pretrained: str | None = None
    preset: str | None = None
    config: dict[str, Any] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False
    compile: bool = False
    revision: str | None = None
    trust_remote_code: bool = False
    dropout: float | None = None
    resize_embeddings: bool = False

    def validate(self) -> None:
        """Checks what can be checked without loading anything.

        Raises:
            UserError: None of pretrained, preset and config, or both a pretrained model and a
                config; a dtype or dropout that does not exist; ``revision`` without ``pretrained``.
        """
        if not (self.pretrained or self.preset or self.config):
            raise UserError("the model needs one of pretrained, preset and config; none was given.")
        if self.pretrained and self.config:
            raise UserError(
                "a pretrained model brings its own config; leave out pretrained or config."
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"model dtype {self.dtype!r}: use float32 or bfloat16.")
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            raise UserError(f"model dropout {self.dropout}: give a probability of 0 to below 1.")
        if self.revision and not self.pretrained:
            raise UserError("model revision only goes with a pretrained model; leave it out.")
