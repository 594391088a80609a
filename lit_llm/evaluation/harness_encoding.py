"""Text to tokens as lm-evaluation-harness's own ``hf`` model does it.

Import this module inside functions only: it needs the extra ``eval``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix

from lit_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HarnessEncoding(TemplateLM):
    """What the harness asks of a model's tokenizer.

    Args:
        tokenizer: The tokenizer; nothing in it is changed.

    Raises:
        UserError: It has no token to begin a text with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.tokenizer: Any = tokenizer
        if self.prefix_token_id is None:
            raise UserError(
                "the tokenizer has neither a BOS nor an EOS token to begin a text with; set one in "
                "its tokenizer_config.json"
            )

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no other context: BOS, or EOS where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def eos_text(self) -> str | None:
        """EOS as text."""
        return None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)

    @property
    def pad_token_id(self) -> int:
        """Any token will do, as it is masked."""
        pad = self.tokenizer.pad_token_id
        return self.prefix_token_id if pad is None else pad

    @property
    def tokenizer_name(self) -> str:
        """Name that the harness's cache of requests is kept under."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text.

        Args:
            string: The text.
            add_special_tokens: Whether the tokenizer adds its own; by default it does unless the
                text begins with BOS already.
        """
        if add_special_tokens is None:
            prefix = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = not has_bos_prefix(string, prefix)
        # verbose: no warning about texts longer than the context, which are cut or refused here.
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; without its system messages where the template takes none.

        Args:
            chat_history: Messages with role and content.
            add_generation_prompt: Whether the assistant's answer begins at the end; otherwise the
                last message is left open.
        """
        from jinja2 import TemplateError

        options: dict[str, Any] = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, **options))
        except TemplateError:
            kept = [message for message in chat_history if message["role"] != "system"]
            if len(kept) == len(chat_history):
                raise
            return str(self.tokenizer.apply_chat_template(kept, **options))
