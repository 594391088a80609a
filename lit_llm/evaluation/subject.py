"""The model that is evaluated: from a folder, the Hub, a GGUF file, or a training run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lit_llm.data.tokenizer import load_tokenizer
from lit_llm.errors import UserError
from lit_llm.models import BaseModelConfig, build_model, pretrained_heads, vocabulary_of
from lit_llm.modules.frozen import tensors_fingerprint
from lit_llm.modules.stages import is_checkpoint, load_stage

if TYPE_CHECKING:
    from lit_llm.evaluation.harness_model import HarnessModel


@dataclass
class Subject:
    """A model that is evaluated.

    Attributes:
        name: Name in the report.
        source: Folder, name on the Hub, ``.gguf`` file, checkpoint, or a run's folder, of which the
            newest checkpoint is taken.
        about: What is to be known of it; known once it is loaded.
        fingerprint: Names its weights and tokens; likewise.
    """

    name: str
    source: str
    about: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""

    def check(self) -> None:
        """Look whether there is a language model, without loading its weights.

        Raises:
            UserError: There is none.
        """
        if is_checkpoint(self.source):
            return  # what is in it is known when it is read
        if pretrained_heads(BaseModelConfig(pretrained=self.source)) is not None:
            raise UserError(
                f"{self.source} is a model that scores texts, and can say nothing; give a language "
                "model, or name this one as the --judge"
            )
        load_tokenizer(self.source)

    def load(
        self, dtype: Literal["float32", "bfloat16"] = "float32", *, batch_tokens: int
    ) -> HarnessModel:
        """The model with all its weights, on the GPU where there is one.

        Args:
            dtype: Data type of the weights.
            batch_tokens: Tokens that go through it at once.

        Raises:
            UserError: It cannot be loaded.
        """
        from lit_llm.evaluation.harness_model import HarnessModel

        if is_checkpoint(self.source):
            module, tokenizer = load_stage(self.source)
            if getattr(module, "scores_texts", False) or tokenizer is None:
                raise UserError(
                    f"{self.source} is of no stage that says anything; give a language model"
                )
            network: Any = module.exported(module.model).to(getattr(torch, dtype))
        else:
            tokenizer = load_tokenizer(self.source)
            config = BaseModelConfig(pretrained=self.source, dtype=dtype)
            network = build_model(config, vocab_size=vocabulary_of(tokenizer)["vocab_size"])
        network.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.fingerprint = tensors_fingerprint(dict(network.state_dict())) + str(dtype)
        lm = HarnessModel(network, tokenizer, batch_tokens=batch_tokens)
        self.about = {
            "parameters": network.num_parameters(),
            "context": lm.max_length,
            "dtype": dtype,
            "chat template": "its own" if tokenizer.chat_template else "none",
        }
        return lm


def subjects(sources: Sequence[str], names: Sequence[str] = ()) -> list[Subject]:
    """The models of a comparison, each with a name of its own.

    Args:
        sources: Where they are.
        names: Their names; by default what their folders are called, and what those are in where
            that is only "model".

    Raises:
        UserError: Not one name a model, or one of them twice.
    """
    if names and len(names) != len(sources):
        raise UserError(
            f"--names gives {len(names)} names for {len(sources)} models; give one for each"
        )
    own = list(names) or _called(sources)
    if twice := [name for name in own if own.count(name) > 1]:
        raise UserError(f"two models are named {twice[0]!r}; tell them apart with --names")
    return [Subject(name, source) for name, source in zip(own, sources, strict=True)]


def _called(sources: Sequence[str]) -> list[str]:
    """As few of the last parts of each path as tell them apart, without a last "model"."""
    parts = []
    for source in sources:
        own = [part for part in Path(source).parts if part not in ("/", "\\", ".")]
        parts.append((own[:-1] if len(own) > 1 and own[-1] == "model" else own) or [source])
    for count in range(1, max(map(len, parts)) + 1):
        called = ["/".join(own[-count:]) for own in parts]
        if len(set(called)) == len(called):
            return called
    return [f"{called[n]} ({n + 1})" for n in range(len(called))]
