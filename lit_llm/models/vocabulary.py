"""What a model must know of its tokenizer, as plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

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
