"""Reads llama.cpp's GGUF files as plain transformers models.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Quantized weights are unpacked,
so the model trains and exports like any other.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lit_llm.errors import UserError

_MAGIC = b"GGUF"


def is_gguf(name: str) -> bool:
    """Whether a model is named by a GGUF file (which need not exist)."""
    return name.lower().endswith(".gguf")


def check_gguf(path: Path) -> None:
    """Says what keeps a GGUF file from being read.

    Raises:
        UserError: It is missing or no GGUF file, or a package that reads it is.
    """
    if not path.is_file():
        raise UserError(f"the model file {str(path)!r} does not exist.")
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise UserError(f"{str(path)!r} is no GGUF file: it does not begin with 'GGUF'.")
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"reading {path.name} needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )


def unpacking_options() -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that unpack quantized weights into a plain model.

    Without them transformers 5.23 refuses to save the model, and where the ``kernels`` package is
    installed leaves the weights packed and frozen. Releases before it always give a plain model.
    """
    try:
        from transformers.utils.quantization_config import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
