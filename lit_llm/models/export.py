"""Hands a trained model on as a Hugging Face folder, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_llm.errors import UserError
from lit_llm.models.folders import TOKENIZER_FILES, check_replaceable, whole_folder
from lit_llm.models.reward import score
from lit_llm.models.score_head import auto_class, is_classifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What an exported folder may hold. Anything else in a folder belongs to somebody.
_EXPORT_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    *TOKENIZER_FILES,
)


class ExportError(RuntimeError):
    """The exported folder does not give back the model that was exported."""


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | os.PathLike[str],
) -> Path:
    """Writes config, safetensors, generation config, tokenizer and chat template to ``folder``.

    The files are written beside it, read back with ``AutoModelForCausalLM.from_pretrained`` and
    compared (logits of a fixed input, ids of a fixed text); only then do they take the folder's
    place. A failed or killed export therefore leaves what was there. A reward model is read back
    with ``AutoModelForSequenceClassification``, and what transformers makes of a padded batch is
    compared with our own scores.

    Args:
        model: An unwrapped transformers model with all its weights; its blocks may be compiled.
        tokenizer: The tokenizer that goes with it, if any.
        folder: Where to export to. An earlier export there is replaced as a whole.

    Returns:
        The folder.

    Raises:
        UserError: ``folder`` is a file, holds files that no export writes, or cannot be written;
            or a reward model has no padding token of its own.
        ExportError: The folder read back gives other logits, scores or token ids.
    """
    target = Path(folder).expanduser().absolute()
    check_export_folder(target)
    if is_classifier(model):
        _check_padding(model)
    with whole_folder(target) as draft:
        model.save_pretrained(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        _verify_model(model, draft)
        if tokenizer is not None:
            _verify_tokenizer(tokenizer, draft)
    return target


def check_export_folder(folder: str | os.PathLike[str]) -> None:
    """Says before any training whether :func:`export_model` may write to ``folder``.

    Raises:
        UserError: It is a file, or holds files that no export writes.
    """
    check_replaceable(folder, _EXPORT_FILES, "export", "an exported model")


def _verify_model(model: PreTrainedModel, draft: Path) -> None:
    # A model with code of its own is not known to the Auto classes.
    of_transformers = type(model).__module__.startswith("transformers.")
    loader = auto_class(is_classifier(model)) if of_transformers else type(model)
    config = model.config.get_text_config()
    copy: Any = loader.from_pretrained(
        draft, dtype=model.dtype, attn_implementation=config._attn_implementation
    )
    copy.to(model.device)
    length = min(16, getattr(config, "max_position_embeddings", None) or 16)
    tokens = torch.arange(2 * length, device=model.device).view(2, length) * 7919
    tokens = tokens % config.vocab_size
    with torch.no_grad(), _plain_evaluation(model), _plain_evaluation(copy):
        if is_classifier(model):
            _compare_scores(model, copy, tokens)
        else:
            expected, found = (m(tokens, use_cache=False).logits.float() for m in (model, copy))
            _compare("logits", expected, found, tolerance=1e-6)


def _compare_scores(model: PreTrainedModel, copy: PreTrainedModel, tokens: Tensor) -> None:
    """Also what others will compute: by transformers, which finds the last token by its id."""
    pad = model.config.get_text_config().pad_token_id
    other = pad - 1 if pad else 1
    tokens = torch.where(tokens == pad, other, tokens)
    mask = torch.ones_like(tokens)
    mask[1, (tokens.shape[1] + 1) // 2 :] = 0
    tokens = tokens.masked_fill(mask == 0, pad)
    expected = score(model, tokens, mask)
    _compare("scores", expected, score(copy, tokens, mask), tolerance=1e-6)
    found = copy(tokens, attention_mask=mask, use_cache=False).logits.float()
    # transformers applies the head in the model's own precision.
    tolerance = max(1e-5, 4 * torch.finfo(model.dtype).eps)
    _compare("scores", expected, found, tolerance * max(1.0, expected.abs().max().item()))


def _compare(what: str, expected: Tensor, found: Tensor, tolerance: float) -> None:
    if not expected.isfinite().all():
        raise ExportError(f"the model gives {what} that are NaN or infinite; nothing was exported")
    difference = (expected - found).abs().max().item()
    if not difference <= tolerance:
        raise ExportError(
            f"the exported model gives other {what} than the trained one (by {difference:.3g}); "
            "nothing was exported"
        )


def _check_padding(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.pad_token_id is None or config.pad_token_id in ends:
        what = "no padding token" if config.pad_token_id is None else "padding that ends texts too"
        raise UserError(
            f"this reward model has {what}: transformers would read its score at another token; "
            "train it with a padding token of its own (pad_token)."
        )


@contextmanager
def _plain_evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Dropout and autocast off, and no compilation just for one small forward."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    plain = torch.autocast(model.device.type, enabled=False)
    try:
        with plain, torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _verify_tokenizer(tokenizer: PreTrainedTokenizerBase, draft: Path) -> None:
    from transformers import AutoTokenizer

    copy = AutoTokenizer.from_pretrained(draft)
    text = "The quick brown fox: 42 naïve façades, 3.5 €\n\tjumps()!"
    if (
        copy(text)["input_ids"] != tokenizer(text)["input_ids"]
        or copy.all_special_ids != tokenizer.all_special_ids
        or copy.chat_template != tokenizer.chat_template
    ):
        raise ExportError(
            "the exported tokenizer gives other ids than the one trained with; nothing was exported"
        )
