"""Loads pretrained models: from a Hugging Face folder, the Hub, or a GGUF file."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lit_llm.errors import UserError
from lit_llm.models.config import BaseModelConfig
from lit_llm.models.gguf import check_gguf, is_gguf, unpacking_options
from lit_llm.models.score_head import HEAD, auto_class, check_head, is_classifier_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Quantization = Literal["nf4"]

# What transformers raises for bad files; the second line for damaged GGUF files.
_LOADING_ERRORS = (
    *(OSError, ValueError, ImportError, KeyError, RuntimeError),
    *(IndexError, TypeError, OverflowError, MemoryError, struct.error),
)


def load_config(config: BaseModelConfig) -> PretrainedConfig:
    """The transformers config of ``config.pretrained``.

    Raises:
        UserError: There is no such model, or its config cannot be read.
    """
    from transformers import AutoConfig

    name = str(config.pretrained)
    _check_path(name)
    try:
        return AutoConfig.from_pretrained(**_source(config))
    except _LOADING_ERRORS as error:
        raise _loading_error(name, error) from error


def pretrained_heads(config: BaseModelConfig) -> int | None:
    """How many scores the model of ``config.pretrained`` gives; ``None`` for a language model.

    Raises:
        UserError: As for :func:`load_config`.
    """
    hf_config = load_config(config)
    return int(hf_config.num_labels or 1) if is_classifier_config(hf_config) else None


def load_model(
    config: BaseModelConfig,
    hf_config: PretrainedConfig,
    options: dict[str, Any],
    quantization: Quantization | None = None,
    classifier: bool = False,
) -> PreTrainedModel:
    """The model of ``config.pretrained`` with all its weights.

    Args:
        config: What to load.
        hf_config: Its config, as :func:`load_config` gives it and perhaps changed since.
        options: More arguments of ``from_pretrained``.
        quantization: Keep the weights in this format; ``None`` for plain tensors.
        classifier: Load a model that scores whole texts. Its head, and nothing else, may be new
            where the weights are those of a causal language model.

    Raises:
        UserError: It cannot be loaded, lacks tensors, or cannot be quantized here.
    """
    from safetensors import SafetensorError

    name = str(config.pretrained)
    if is_gguf(name):
        options = options | unpacking_options()
    if quantization is not None:
        options = options | {"quantization_config": _nf4()}
    new_head = classifier and not is_classifier_config(hf_config)
    try:
        with _no_load_report() if new_head else nullcontext():
            loaded: Any = auto_class(classifier).from_pretrained(
                **_source(config), config=hf_config, output_loading_info=True, **options
            )
    except (*_LOADING_ERRORS, SafetensorError) as error:
        attention = attention_error(hf_config.model_type, options, error)
        raise attention or _loading_error(name, error) from error
    model: PreTrainedModel = loaded[0]
    lacking, kind = sorted(loaded[1]["missing_keys"]), "causal language"
    if classifier:
        check_head(model)
        if new_head:
            lacking = [key for key in lacking if not key.startswith(f"{HEAD}.")]
        else:
            kind = "reward"
    if lacking:  # transformers would leave them random and only warn
        raise UserError(
            f"the weights of {name!r} lack {len(lacking)} tensors that {type(model).__name__} "
            f"needs, such as {lacking[0]!r}; it is not the checkpoint of a {kind} model."
        )
    if is_gguf(name):  # an adapter says by the name what it belongs to; the folder alone is none
        model.name_or_path = model.config._name_or_path = name
    return model


def attention_error(model_type: str, options: dict[str, Any], error: Exception) -> UserError | None:
    """The sentence for an error that the choice of attention caused; ``None`` for other errors."""
    attention = options["attn_implementation"]
    known = ("attention implementation", "attn_implementation", "scaled_dot_product", "flash")
    if attention == "eager" or not any(word in str(error).lower() for word in known):
        return None
    return UserError(
        f"{model_type} cannot run with attn_implementation={attention} here; "
        f"use attn_implementation=eager. ({one_line(error)})"
    )


def one_line(error: Exception) -> str:
    """What an error says, short enough for a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _source(config: BaseModelConfig) -> dict[str, Any]:
    """Where transformers finds the model, as arguments of ``from_pretrained``."""
    path = Path(str(config.pretrained)).expanduser()
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path)}
    if is_gguf(path.name):
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return where | {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def _nf4() -> Any:
    """4-bit NormalFloat with doubly quantized scales (QLoRA, https://arxiv.org/abs/2305.14314)."""
    if not torch.cuda.is_available():
        raise UserError("4-bit weights (method: qlora) need a CUDA device; use method: lora.")
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "4-bit weights (method: qlora) need bitsandbytes: pip install bitsandbytes, or use "
            "method: lora."
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,  # FSDP divides tensors of floats only
    )


def _check_path(name: str) -> None:
    """Says what a local path lacks before transformers mistakes it for a name on the Hub."""
    path = Path(name).expanduser()
    if is_gguf(name):
        check_gguf(path)
        return
    if not path.exists():
        if name.count("/") > 1 or name.startswith((".", "~", "/")) or "\\" in name:
            raise UserError(
                f"the model folder {name!r} does not exist; give --model.base.pretrained, or make "
                "it first with the recipe of the stage before."
            )
        return
    if not path.is_dir():
        raise UserError(
            f"the model {name!r} is a file; give the folder that holds it, or a .gguf file."
        )
    missing = []
    if not (path / "config.json").is_file():
        missing.append("config.json")
    patterns = ("*.safetensors", "pytorch_model*.bin")
    if not any(file for pattern in patterns for file in path.glob(pattern)):
        missing.append("weights (*.safetensors)")
    if (path / "adapter_config.json").is_file() and missing:
        raise UserError(
            f"{name!r} holds a peft adapter, not a model; merge it into its base first: "
            f"python recipes/export.py --model BASE --adapter {name} --output_dir FOLDER"
        )
    if missing:
        raise UserError(f"{name!r} is no Hugging Face model folder: no {' and no '.join(missing)}.")


@contextmanager
def _no_load_report() -> Iterator[None]:
    """Keeps transformers from telling that a new head is new, and should be trained.

    What else may be missing is looked at here.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _loading_error(name: str, error: Exception) -> UserError:
    if "custom code" in str(error):
        return UserError(
            f"the model {name!r} brings Python code of its own; read it, and set trust_remote_code "
            "only if you trust it."
        )
    if Path(name).expanduser().exists():
        return UserError(f"the model in {name!r} cannot be loaded: {one_line(error)}")
    return UserError(
        f"there is no folder {name!r}, and the Hugging Face Hub does not hand out a model of that "
        f"name: check the name and the network, or give a local folder. ({one_line(error)})"
    )
