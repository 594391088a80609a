"""What a model must know of its tokenizer, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from torch import nn

from lit_llm.errors import UserError
from lit_llm.models.adapters import unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Vocabulary(TypedDict):
    """Keyword arguments of :func:`lit_llm.models.build_model` that follow from a tokenizer.

    Attributes:
        vocab_size: Rows an embedding needs: one more than the largest token id.
        pad_token_id: Id of the padding token, if there is one.
        bos_token_id: Id of the token that begins a text, if there is one.
        eos_token_id: Id of the token that ends a text, if there is one.
    """

    vocab_size: int
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | None


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Size and special ids of a transformers tokenizer.

    ``tokenizer.vocab_size`` leaves out added tokens and ``len(tokenizer)`` is too small where ids
    have gaps, so the size follows from the largest id.
    """
    return Vocabulary(
        vocab_size=max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1)),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def set_stop_tokens(model: nn.Module, token_ids: Sequence[int]) -> None:
    """Makes ``generate`` end at any of these tokens, in the folder a model is exported to as well.

    A chat model ends its turn with a token of the template and a text with EOS; transformers stops
    at what the generation config names.

    Args:
        model: A transformers model, possibly wrapped by peft.
        token_ids: Ids of the tokens, the tokenizer's EOS among them.

    Raises:
        UserError: There are none, or the model cannot produce one of them.
    """
    inner: Any = unwrap(model)
    ids = list(dict.fromkeys(token_ids))
    size = inner.config.get_text_config().vocab_size
    if not ids or not all(0 <= index < size for index in ids):
        raise UserError(f"stop tokens {ids}: give ids of the model's vocabulary of {size} tokens.")
    inner.generation_config.eos_token_id = ids[0] if len(ids) == 1 else ids
