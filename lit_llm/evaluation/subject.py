"""The model that is evaluated: from a folder, the Hub, a GGUF file, or a training run."""

from __future__ import annotations

import os
import pkgutil
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lit_llm.data.tokenizer import load_tokenizer
from lit_llm.errors import UserError
from lit_llm.evaluation.runner import file_name
from lit_llm.evaluation.tasks.library import offline_where_it_is
from lit_llm.models import BaseModelConfig, build_model, pretrained_heads, vocabulary_of
from lit_llm.modules.frozen import tensors_fingerprint
from lit_llm.modules.stages import is_checkpoint, load_stage
from lit_llm.strategies.checkpoint_io import read_checkpoint
from lit_llm.strategies.resume import find_checkpoint

if TYPE_CHECKING:
    from lit_llm.evaluation.harness_model import HarnessModel


_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_LONGEST_NAME = 100  # two of them are in the name of a file


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
        path = Path(self.source).expanduser()
        if is_checkpoint(self.source):
            self._check_checkpoint(path)
            return
        if not self.source.strip() or (not path.exists() and not _HUB_NAME.fullmatch(self.source)):
            raise UserError(
                f"there is no model {self.source!r}: give a folder, a checkpoint, a .gguf file, or "
                "a name on the Hugging Face Hub"
            )
        with _reached(self.source):
            if pretrained_heads(BaseModelConfig(pretrained=self.source)) is not None:
                raise UserError(
                    f"{self.source} is a model that scores texts, and can say nothing; give a "
                    "language model, or name this one as the --judge"
                )
            load_tokenizer(self.source)

    def _check_checkpoint(self, path: Path) -> None:
        """Look what a checkpoint of one file is of; what others hold is known when it is read."""
        chosen = find_checkpoint(path, str(path))
        if chosen is None or not chosen.is_file():
            return
        checkpoint = read_checkpoint(chosen)
        stage, tokenizer = str(checkpoint.get("stage", "")), checkpoint.get("tokenizer")
        try:
            scores = stage.startswith("lit_llm.") and pkgutil.resolve_name(stage).scores_texts
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"{chosen} is of the stage {stage}, which this version of lit_llm does not have; "
                "evaluate what the run exported"
            ) from error
        if scores:
            raise UserError(
                f"{self.source} is the run of a model that scores texts, and can say nothing; give "
                "a language model, or name what this run exported as the --judge"
            )
        try:
            if tokenizer is not None:
                with _reached(tokenizer):
                    load_tokenizer(tokenizer)
        except UserError as error:
            raise UserError(
                f"{chosen} was trained with the tokenizer {tokenizer}, which cannot be loaded any "
                f"more; write a model with recipes/export.py {self.source} --tokenizer FOLDER "
                "--output_dir MODEL, and evaluate that one"
            ) from error

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
            config = BaseModelConfig(pretrained=self.source, dtype=dtype)
            with _reached(self.source):
                tokenizer = load_tokenizer(self.source)
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
        UserError: Not one name a model, one of them twice, or one that no folder can have.
    """
    if names and len(names) != len(sources):
        raise UserError(
            f"--names gives {len(names)} names for {len(sources)} models; give one for each"
        )
    own = list(names) or _called(sources)
    folders = [file_name(name).casefold() for name in own]
    for name, folder in zip(own, folders, strict=True):
        if folders.count(folder) > 1:
            raise UserError(
                f"two models are named {name!r}, or as good as that in a folder's name; tell them "
                "apart with --names"
            )
        if folder.startswith((".", "evaluation.")) or not 0 < len(folder.encode()) <= _LONGEST_NAME:
            raise UserError(
                f"{name:.40} is no name for a model's folder in --output_dir; give one of letters "
                f"and digits, at most {_LONGEST_NAME} bytes long, with --names"
            )
    return [Subject(name, source) for name, source in zip(own, sources, strict=True)]


def _reached(source: str) -> AbstractContextManager[None]:
    """Do not wait half a minute for a Hub that cannot be reached."""
    return nullcontext() if Path(source).expanduser().exists() else offline_where_it_is()


def _called(sources: Sequence[str]) -> list[str]:
    """As few of the last parts of each path as tell them apart, without a last "model"."""
    parts = []
    for source in sources:
        path = Path(source).expanduser()
        path = Path(os.path.abspath(path)) if path.exists() else path  # the name of "." or ".."
        own = [part for part in path.parts if part != path.anchor]
        parts.append((own[:-1] if len(own) > 1 and own[-1] == "model" else own) or [source])
    for count in range(1, max(map(len, parts)) + 1):
        called = ["/".join(own[-count:]) for own in parts]
        if len(set(called)) == len(called):
            return called
    last = [own[-1] for own in parts]  # the same model twice
    return [f"{name} ({n})" for n, name in enumerate(last, start=1)]
