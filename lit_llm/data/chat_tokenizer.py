"""A tokenizer made ready for conversations: a chat template, and padding that is no other token."""

from pathlib import Path
from typing import TYPE_CHECKING

from lit_llm.data.chat_template import stop_token_ids, with_chat_template
from lit_llm.data.tokenizer import load_tokenizer
from lit_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_chat_tokenizer(
    name_or_path: str, *, chat_template: str | None = None, pad_token: str | None = None
) -> "PreTrainedTokenizerBase":
    """Load a tokenizer with a chat template and a padding token.

    Args:
        name_or_path: Folder, Hub name or .gguf file of the tokenizer.
        chat_template: File with a Jinja chat template; by default the tokenizer's own, and one of
            ours where it has none.
        pad_token: Text of the padding token. By default the tokenizer's own; where that is missing
            or is a token that ends a text or an answer, a special token that has no other use.

    Raises:
        UserError: The tokenizer or the template cannot be read.
    """
    tokenizer = load_tokenizer(name_or_path)
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{chat_template}: the chat template cannot be read ({error.strerror})."
            ) from error
    tokenizer = with_chat_template(tokenizer)
    if pad_token is not None:
        tokenizer.add_special_tokens({"pad_token": pad_token})
    elif (spare := _spare_token(tokenizer)) is not None:
        tokenizer.pad_token = spare
    return tokenizer


def _spare_token(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """A special token to pad with, where the tokenizer's own padding means something else."""
    ends = {tokenizer.eos_token_id, *stop_token_ids(tokenizer)}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return None
    template = str(tokenizer.chat_template)
    names = {
        str(token): index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
        and index not in ends
        and index != tokenizer.bos_token_id
        and str(token) not in template
    }
    # What is called padding, then what other models pad with, then what nobody uses.
    for part in ("pad", "reserved", "endoftext", "unk", "unused", "extra"):
        for name in names:
            if part in name.lower():
                return name
    return None
