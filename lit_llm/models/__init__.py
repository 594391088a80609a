"""Builds, loads, runs and exports transformers models."""

from lit_llm.models.buffers import keep_buffer_dtypes
from lit_llm.models.build import build_model, resolve_config
from lit_llm.models.compile import compile_blocks, decoder_blocks
from lit_llm.models.config import BaseModelConfig
from lit_llm.models.export import ExportError, check_export_folder, export_model
from lit_llm.models.forward import (
    causal_lm_loss,
    causal_lm_statistics,
    hidden_states,
    output_head,
    supports_fused_head,
)
from lit_llm.models.presets import PRESETS, preset_config
from lit_llm.models.vocabulary import Vocabulary, vocabulary_of

__all__ = [
    "PRESETS",
    "BaseModelConfig",
    "ExportError",
    "Vocabulary",
    "build_model",
    "causal_lm_loss",
    "causal_lm_statistics",
    "check_export_folder",
    "compile_blocks",
    "decoder_blocks",
    "export_model",
    "hidden_states",
    "keep_buffer_dtypes",
    "output_head",
    "preset_config",
    "resolve_config",
    "supports_fused_head",
    "vocabulary_of",
]
