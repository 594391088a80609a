"""Builds, loads, runs and exports transformers models."""

from lit_llm.models.adapter_checks import adapter_heads, check_adapter_folder
from lit_llm.models.adapters import (
    AdapterConfig,
    add_adapter,
    is_adapted,
    merge_adapter,
    merged_copy,
    save_adapter,
    trainable_summary,
    unwrap,
)
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
from lit_llm.models.pretrained import pretrained_heads
from lit_llm.models.reward import (
    RewardEnsemble,
    RewardStatistics,
    build_reward_model,
    load_reward_models,
    read_statistics,
    score,
    standardised,
    write_statistics,
)
from lit_llm.models.vocabulary import Vocabulary, set_stop_tokens, vocabulary_of

__all__ = [
    "PRESETS",
    "AdapterConfig",
    "BaseModelConfig",
    "ExportError",
    "RewardEnsemble",
    "RewardStatistics",
    "Vocabulary",
    "adapter_heads",
    "add_adapter",
    "build_model",
    "build_reward_model",
    "causal_lm_loss",
    "causal_lm_statistics",
    "check_adapter_folder",
    "check_export_folder",
    "compile_blocks",
    "decoder_blocks",
    "export_model",
    "hidden_states",
    "is_adapted",
    "keep_buffer_dtypes",
    "load_reward_models",
    "merge_adapter",
    "merged_copy",
    "output_head",
    "preset_config",
    "pretrained_heads",
    "read_statistics",
    "resolve_config",
    "save_adapter",
    "score",
    "set_stop_tokens",
    "standardised",
    "supports_fused_head",
    "trainable_summary",
    "unwrap",
    "vocabulary_of",
    "write_statistics",
]
