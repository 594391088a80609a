"""A stage's transformers model: built from plain data, adapted, and kept in checkpoints.

Shapes: B batch, T sequence, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_llm.data.chat_template import stop_token_ids
from lit_llm.data.chat_tokenizer import load_chat_tokenizer
from lit_llm.data.tokenizer import load_tokenizer
from lit_llm.errors import UserError
from lit_llm.models.adapters import (
    AdapterConfig,
    add_adapter,
    merged_copy,
    trainable_summary,
    unwrap,
)
from lit_llm.models.build import build_model, config_fields
from lit_llm.models.compile import compile_blocks
from lit_llm.models.config import BaseModelConfig
from lit_llm.models.vocabulary import set_stop_tokens, vocabulary_of
from lit_llm.modules.base import BaseModule
from lit_llm.modules.frozen import frozen_fingerprint, kept_elsewhere
from lit_llm.modules.schedules import Schedule
from lit_llm.planning.flops import training_flops_per_token
from lit_llm.strategies.gathering import Replica, needs_gathering


class ModelModule(BaseModule):
    """The ground of the stages that train one transformers model, whole or through adapters.

    Args:
        base: The model to start from.
        tokenizer: Folder, Hub name or .gguf file of the tokenizer; it fixes the vocabulary and the
            special ids.
        seq_len: Longest sequence that will be fed.
        optimizer: Builds the optimizer from parameter groups.
        schedule: The learning rate over the run.
        chat_template: File with a chat template.
        pad_token: Text of the padding token.
        adapter: Train adapters instead of all weights.

    Raises:
        UserError: For a value that makes no sense.
    """

    reads_chats = True
    """Whether the tokenizer needs a chat template and a padding token of its own."""
    scores_texts = False
    """Whether the model scores whole texts, by ``heads``, in place of predicting tokens."""
    has_reference = False
    """Whether the model that training starts from is needed again later, as it was."""
    _replica: Replica | None = None

    def __init__(
        self,
        base: BaseModelConfig,
        tokenizer: str | None,
        seq_len: int | None,
        optimizer: OptimizerCallable,
        schedule: Schedule,
        chat_template: str | None = None,
        pad_token: str | None = None,
        adapter: AdapterConfig | None = None,
    ) -> None:
        if isinstance(base, dict):  # from a checkpoint, which holds plain data
            base = BaseModelConfig(**base)
        if isinstance(schedule, dict):
            schedule = Schedule(**schedule)
        if isinstance(adapter, dict):
            adapter = AdapterConfig(**adapter)
        super().__init__(optimizer, schedule)
        if adapter is not None:
            adapter.validate()
        hyper_parameters = {
            "base": asdict(base),
            "tokenizer": tokenizer,
            "seq_len": seq_len,
            "schedule": asdict(schedule),
        }
        if self.reads_chats:
            hyper_parameters |= {
                "chat_template": chat_template,
                "pad_token": pad_token,
                "adapter": None if adapter is None else asdict(adapter),
            }
        self.save_hyperparameters(hyper_parameters)
        self.base = base
        self.tokenizer_path = tokenizer
        self.seq_len = seq_len
        self.chat_template = chat_template
        self.pad_token = pad_token
        self.adapter = adapter
        self.model: Any = None
        # Frozen weights of a pretrained model are on disk already; random ones are nowhere else.
        self.saves_frozen = adapter is None or base.pretrained is None
        self.strict_loading = self.saves_frozen
        self._frozen: set[str] = set()
        self._base_fingerprint: str | None = None
        self._summary = ""
        self.flops_per_token: float | None = None
        """Of forward and backward; None where it is not known."""

    # ----- the model ----------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the model, once; strategies call this where its weights should come to life."""
        if self.model is not None:
            return
        tokenizer = None if self.tokenizer_path is None else self.load_tokenizer()
        self.model = self.build_model(tokenizer)
        # A strategy may hold parts of the weights only, which could not be counted.
        self._summary = trainable_summary(self.trained())
        if self.seq_len and hasattr(self.model, "get_output_embeddings"):
            self.flops_per_token = training_flops_per_token(self.model, self.seq_len)
        if self._trainer is not None and needs_gathering(self.trainer.strategy):
            self._replica = Replica(self.model, owner=self)
        if self.base.compile:
            compile_blocks(self.model)
        self.remember_shapes()

    def trained(self) -> nn.Module:
        """What holds the trained weights."""
        return self.model

    def load_tokenizer(self) -> Any:
        """Load the tokenizer that fixes the vocabulary and the special ids."""
        if not self.reads_chats:
            return load_tokenizer(str(self.tokenizer_path))
        return load_chat_tokenizer(
            str(self.tokenizer_path), chat_template=self.chat_template, pad_token=self.pad_token
        )

    def build_model(self, tokenizer: Any | None) -> Any:
        """Build or load the model, let it stop at the end of a turn, and add the adapters.

        Args:
            tokenizer: What it must fit; ``None`` leaves the vocabulary to the config.
        """
        model = self.build_bare(
            quantization=None if self.adapter is None else self.adapter.quantization,
            **({} if tokenizer is None else {**vocabulary_of(tokenizer)}),
        )
        if tokenizer is not None and self.reads_chats and model.can_generate():
            set_stop_tokens(model, stop_token_ids(tokenizer))
        if self.adapter is not None:
            model = add_adapter(model, self.adapter)
        if not self.saves_frozen:
            # Told now: precision and strategy may change how the weights are held.
            self._frozen = {f"model.{name}" for name in kept_elsewhere(model)}
            self._base_fingerprint = frozen_fingerprint(model)
        return model

    def build_bare(self, quantization: Literal["nf4"] | None, **vocabulary: Any) -> Any:
        """Build or load the model without adapters.

        Args:
            quantization: Hold the weights in 4 bits, where only adapters are trained.
            vocabulary: Size and special ids of the tokenizer.
        """
        settings = {"seq_len": self.seq_len, "quantization": quantization, **vocabulary}
        if not self.has_reference or self.base.pretrained is None:
            return build_model(self.base, **settings)
        # New rows of a grown embedding are random, and have to be the same when loaded again.
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            return build_model(self.base, **settings)

    @contextmanager
    def whole(self, model: Any = None, *, exact: bool = False) -> Iterator[Any]:
        """A model with all its weights on every rank, to be used outside of steps.

        It is the model itself where no strategy shards it, and otherwise a copy that lasts as long
        as the context. All ranks have to enter together.

        Args:
            model: Which one, of the architecture of ``model``; by default that.
            exact: In the precision that the optimizer keeps, not the one that steps compute in.
        """
        model = self.model if model is None else model
        if self._replica is None:
            yield model
            return
        root: Any = self.trainer.strategy.model
        with self._replica.filled(model, root, exact=exact) as copied:
            yield copied

    def exported(self, model: Any) -> Any:
        """A model as it is handed on: of plain transformers, adapters merged into a copy.

        Args:
            model: ``model``, whole.
        """
        return merged_copy(model)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Run the model: ids (B, T) to a transformers output with ``logits``."""
        return self.model(input_ids=input_ids, **kwargs)

    def on_fit_start(self) -> None:
        """Tell how much is trained."""
        rank_zero_info(self._summary)

    # ----- checkpoints --------------------------------------------------------------------------

    def left_out(self) -> set[str]:
        """Names of what is in the module's state but in no checkpoint: it is on disk already."""
        return self._frozen

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe the model, so that a checkpoint loads by itself.

        A whole model describes its architecture, and needs neither tokenizer nor Hub. Adapters
        leave out the frozen weights of a pretrained model, but tell which they were.
        """
        super().on_save_checkpoint(checkpoint)
        checkpoint |= {"stage": self.stage, "tokenizer": self.tokenizer_path}
        hyper_parameters, left_out = checkpoint["hyper_parameters"], self.left_out()
        state = {k: v for k, v in checkpoint["state_dict"].items() if k not in left_out}
        checkpoint["state_dict"] = state
        if self.saves_frozen:
            base = {**asdict(self.base), "pretrained": None, "preset": None}
            base["config"] = config_fields(self.model.config)
            if self.reads_chats and unwrap(self.model).can_generate():
                # It is loaded without a tokenizer, which would know how turns end.
                base["config"]["eos_token_id"] = self.model.generation_config.eos_token_id
            hyper_parameters |= {"base": base, "tokenizer": None}
            return
        hyper_parameters |= {"base": asdict(self.base), "tokenizer": self.tokenizer_path}
        checkpoint["frozen"] = self._base_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse adapters that were trained on other weights.

        Raises:
            UserError: The checkpoint is of another model.
        """
        super().on_load_checkpoint(checkpoint)
        if not self.saves_frozen and checkpoint.get("frozen") != self._base_fingerprint:
            raise UserError(
                f"the checkpoint holds adapters of another base model than {self.base.pretrained}; "
                "give the weights it was trained on (model.base.pretrained) or another --output_dir"
            )
        if self.strict_loading or not checkpoint.get("state_dict"):
            return
        differing = (self.whole_shapes.keys() - self.left_out()) ^ checkpoint["state_dict"].keys()
        if differing:
            raise UserError(
                f"the checkpoint is of another model: {min(differing)} exists only here or only "
                "there; resume with the settings it was trained with, or give another --output_dir"
            )
