"""LoRA adapters: little trainable matrices beside a frozen model (peft).

LoRA: https://arxiv.org/abs/2106.09685, DoRA: https://arxiv.org/abs/2402.09353,
QLoRA: https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lit_llm.errors import UserError
from lit_llm.models.adapter_checks import (
    check_adapter_folder,
    check_names,
    check_task,
    check_tied,
    holds_matrix,
    is_tied,
    read_json,
)
from lit_llm.models.build import build_model
from lit_llm.models.config import BaseModelConfig
from lit_llm.models.folders import TOKENIZER_FILES, check_replaceable, whole_folder
from lit_llm.models.pretrained import one_line
from lit_llm.models.score_head import HEAD, is_classifier

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALL_LINEAR = "all-linear"
_ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "generation_config.json",
    "reward_statistics.json",
    *TOKENIZER_FILES,
)
STATISTICS = ("reward_mean", "reward_std", "reward_aggregation")
"""Fields that a reward model's config has, in the order of ``RewardStatistics``."""


@dataclass
class AdapterConfig:
    """Adapters in place of training every weight.

    Args:
        method: ``lora``; ``dora``, which learns length and direction of each weight apart; or
            ``qlora``, LoRA over a model held in 4 bits (needs a CUDA device and bitsandbytes).
        r: Rank of the two matrices: what an adapter can learn, and its size.
        alpha: The update is scaled by alpha / r (with ``rslora`` by alpha / sqrt(r)).
        dropout: Dropout on the input of an adapter.
        target_modules: Layers that get an adapter: ``all-linear`` is every linear layer but the
            output head; or names such as ``[q_proj, v_proj]``.
        modules_to_save: Layers to train whole and save with the adapter, such as ``[embed_tokens]``
            where the vocabulary has grown.
        rslora: Scale by the square root of the rank, which keeps high ranks learning
            (https://arxiv.org/abs/2312.03732).
    """

    method: Literal["lora", "dora", "qlora"] = "lora"
    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: str | list[str] = ALL_LINEAR
    modules_to_save: list[str] | None = None
    rslora: bool = False

    def validate(self) -> None:
        """Checks what can be checked without a model.

        Raises:
            UserError: A value that does not exist or make sense.
        """
        if self.method not in ("lora", "dora", "qlora"):
            raise UserError(f"adapter method {self.method!r}: use lora, dora or qlora.")
        if self.r < 1 or self.alpha <= 0:
            raise UserError(f"adapter r {self.r} and alpha {self.alpha} must be positive.")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"adapter dropout {self.dropout}: give a probability of 0 to below 1.")
        if not self.target_modules:
            raise UserError(f"adapter target_modules is empty; use {ALL_LINEAR} or layer names.")

    @property
    def quantization(self) -> Literal["nf4"] | None:
        """What :func:`lit_llm.models.build_model` takes for the model under these adapters."""
        return "nf4" if self.method == "qlora" else None


def add_adapter(model: PreTrainedModel, config: AdapterConfig) -> PeftModel:
    """Freezes a model and puts adapters into its layers, in place.

    The head of a reward model is new, so it is trained whole and saved with the adapters.

    Args:
        model: A model of :func:`build_model`, which for ``qlora`` has been given
            ``quantization=config.quantization``. Turn gradient checkpointing on before.
        config: Which adapters. Their random half comes from torch's global generator, the other
            half is 0, so that nothing changes until training does. Adapters are float32, whatever
            the model is; layers trained whole keep its data type.

    Returns:
        The peft model around ``model``, in the same mode.

    Raises:
        UserError: The config makes no sense, or names layers that the model does not have.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    config.validate()
    training, kind = model.training, type(model).__name__
    quantized = getattr(model, "is_loaded_in_4bit", False)
    if quantized != (config.method == "qlora"):
        raise UserError(
            "adapters of method qlora go on a model in 4 bits, and only they do; "
            "build the model with the adapter's quantization."
        )
    targets: str | list[str] = config.target_modules
    targets = [targets] if isinstance(targets, str) and targets != ALL_LINEAR else targets
    if not isinstance(targets, str):
        matrices = [name for name, m in model.named_modules() if holds_matrix(m)]
        check_names(matrices, targets, f"target_modules: {kind} has no linear layer")
        if is_tied(model):
            check_tied(model, targets)
        if is_classifier(model) and HEAD in targets:
            raise UserError(
                f"adapter target_modules: {HEAD!r}, the head of a reward model, is trained whole "
                "in any case; leave it out."
            )
    names = [name for name, _ in model.named_modules()]
    check_names(names, config.modules_to_save or [], f"modules_to_save: {kind} has no layer")
    if quantized:  # checkpointing stays as build_model has set it
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(
        task_type="SEQ_CLS" if is_classifier(model) else "CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=targets,
        # peft adds the head of a reward model, to the very list it is given.
        modules_to_save=list(config.modules_to_save) if config.modules_to_save else None,
        use_rslora=config.rslora,
        use_dora=config.method == "dora",
        # An embedding that is trained and is the output head too has to stay one matrix.
        ensure_weight_tying=bool(config.modules_to_save and is_tied(model)),
    )
    try:
        adapted = get_peft_model(model, lora)
    except (ValueError, TypeError) as error:
        raise UserError(f"{kind} takes no such adapters: {one_line(error)}") from error
    return adapted.train(training)


def merged_copy(model: nn.Module) -> PreTrainedModel:
    """The model with its adapters added into the weights, as a plain transformers model.

    Args:
        model: A peft model, which stays as it is; or a model without adapters.

    Returns:
        A copy on the CPU; a model without adapters itself. The copy of a model in 4 bits has the
        weights of the folder it was loaded from, unquantized, in bfloat16.

    Raises:
        UserError: The merged weights are not finite.
    """
    if not is_adapted(model):
        return model  # type: ignore[return-value]
    base = unwrap(model)
    if getattr(base, "is_loaded_in_4bit", False):
        with tempfile.TemporaryDirectory() as folder:
            saved = save_adapter(model, Path(folder) / "adapter")
            config = BaseModelConfig(
                pretrained=base.name_or_path, dtype="bfloat16", resize_embeddings=True
            )
            whole = build_model(
                config,
                vocab_size=base.config.vocab_size,
                pad_token_id=base.config.pad_token_id,
                heads=base.config.num_labels if is_classifier(base) else None,
            )
            return merge_adapter(whole, saved)
    # Copied tensor by tensor: a copy of the whole on a GPU might not fit beside the original.
    copies: dict[int, Any] = {}
    for parameter in model.parameters():
        data = parameter.detach().to("cpu", copy=True)
        copies[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        copies[id(buffer)] = buffer.detach().to("cpu", copy=True)
    return _merge(copy.deepcopy(model, copies))


def merge_adapter(model: PreTrainedModel, folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Adds the adapters of a peft folder into the weights of their base model, in place.

    The generation config (stop tokens) is taken over where the folder has one. Adapters of a reward
    model bring its head, so the base model may have any, and the statistics of its scores.

    Args:
        model: The base model.
        folder: What :func:`save_adapter` or peft wrote.

    Returns:
        The model, plain again.

    Raises:
        UserError: The folder holds no adapter, one of another model, or a damaged one.
    """
    from peft import PeftModel
    from safetensors import SafetensorError
    from transformers import GenerationConfig

    path = check_adapter_folder(folder)
    check_task(model, path)
    try:
        adapted = PeftModel.from_pretrained(model, str(path))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"the adapter in {str(folder)!r} does not go onto {model.name_or_path!r}: "
            f"{one_line(error)}"
        ) from error
    merged = _merge(adapted)
    if (path / "generation_config.json").is_file():
        merged.generation_config = GenerationConfig.from_pretrained(path)
    for field in STATISTICS:  # those of the base are of other scores
        vars(merged.config).pop(field, None)
    if (path / "reward_statistics.json").is_file():
        merged.config.update(read_json(path / "reward_statistics.json"))
    return merged


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Writes the adapters to a folder that ``peft.PeftModel.from_pretrained`` loads.

    It takes its name only when it is complete. The generation config (stop tokens) goes along, the
    embedding of a model that was given new rows (``resize_embeddings``), and the statistics in the
    config of a reward model.

    Args:
        model: A peft model.
        folder: Where to; an earlier adapter there is replaced.
        tokenizer: Tokenizer to put beside the adapters.

    Returns:
        The folder.

    Raises:
        UserError: The model has no adapters, or the folder holds something else or cannot be
            written.
    """
    if not is_adapted(model):
        raise UserError(f"{type(model).__name__} has no adapters to save.")
    peft_model: Any = model
    target = Path(folder).expanduser().absolute()
    check_replaceable(target, _ADAPTER_FILES, "save adapters", "a saved adapter")
    with whole_folder(target) as draft:
        base = unwrap(model)
        grown = getattr(base, "grown_embedding", False)
        if base.can_generate():
            base.generation_config.save_pretrained(draft)
        statistics = {name: getattr(base.config, name, None) for name in STATISTICS}
        if any(statistics.values()):
            text = json.dumps(statistics, indent=2) + "\n"
            (draft / "reward_statistics.json").write_text(text, encoding="utf-8")
        # A critic's adapters beside the policy's stay behind.
        peft_model.save_pretrained(
            draft, save_embedding_layers=grown, selected_adapters=[peft_model.active_adapter]
        )
        (draft / "README.md").unlink(missing_ok=True)  # a form, not filled in
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
    return target


def trainable_summary(model: nn.Module) -> str:
    """One line for people: how many parameters are trained, of how many."""
    count: Any = getattr(model, "get_nb_trainable_parameters", None)  # knows packed 4-bit weights
    if count is not None:
        trainable, total = count()
    else:
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        trainable = sum(size for size, trained in sizes if trained)
        total = sum(size for size, _ in sizes)
    share = 100 * trainable / max(total, 1)
    return f"trainable: {trainable:,} of {total:,} parameters ({share:.2f} %)"


def is_adapted(model: nn.Module) -> bool:
    """Whether a model is wrapped by peft."""
    return callable(getattr(model, "get_base_model", None))


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a peft model (adapters are part of its layers)."""
    wrapped: Any = model
    return wrapped.get_base_model() if is_adapted(model) else wrapped


def _merge(adapted: nn.Module) -> PreTrainedModel:
    peft_model: Any = adapted
    try:
        merged: PreTrainedModel = peft_model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"the adapters cannot be merged: {one_line(error)}") from error
    merged.tie_weights()
    return merged.requires_grad_(True)
