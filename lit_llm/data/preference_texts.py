"""Where a prompt ends and an answer begins in preferences that are plain texts."""

from collections.abc import Sequence
from typing import Any

from lit_llm.errors import UserError

# Where the prompt may stand in data whose authors gave it another name.
_QUESTION_FIELDS = ("question", "query", "instruction")
_CONTEXT_FIELDS = ("input", "context", "user", "text", "post", "history")


def check_question(data: dict[str, Any], origin: str) -> None:
    """Refuse texts without a prompt whose question stands in a field that is not read.

    Raises:
        UserError: With the name of that field.
    """
    texts = [data.get(field) for field in ("chosen", "rejected")]
    if "prompt" in data or not all(isinstance(text, str) for text in texts):
        return
    shared = split_texts([str(text) for text in texts])[0]
    # Answers may well begin alike, so a question has to be in what is shared. The other names say
    # less: they count where nothing else could be the prompt.
    names = _QUESTION_FIELDS if shared.strip() else (*_QUESTION_FIELDS, *_CONTEXT_FIELDS)
    for name in names:
        text = data.get(name)
        if isinstance(text, str) and text.strip() and text.strip() not in shared:
            raise UserError(
                f"{origin}: field {name!r} looks like the prompt, which the format preference "
                f"takes from a field 'prompt' only; give the source rename: {{{name}: prompt}} "
                "(and for a chat model format: chat_preference), or rename the field to something "
                "else if it is none."
            )


def without_prompt(prompt: str, texts: list[str]) -> list[str]:
    """What follows a prompt that all texts repeat; the same texts where they do not.

    A text that would then be empty only looks as if it repeated the prompt.
    """
    if not prompt.strip() or not all(text.startswith(prompt) for text in texts):
        return texts
    rest = [text[len(prompt) :] for text in texts]
    return rest if all(map(str.strip, rest)) else texts


def split_texts(texts: Sequence[str]) -> tuple[str, list[str]]:
    """What texts share up to a border of words, and how each goes on; white space goes with it."""
    shortest = min(map(len, texts))
    differ = (index for index in range(shortest) if len({text[index] for text in texts}) > 1)
    border = next(differ, shortest)
    while border and not all(_begins_word(text, border) for text in texts):
        border -= 1
    return texts[0][:border], [text[border:] for text in texts]


def _begins_word(text: str, border: int) -> bool:
    """Whether white space begins there and a word follows."""
    return (
        text[border : border + 1].isspace()
        and not text[border - 1].isspace()
        and not text[border:].isspace()
    )
