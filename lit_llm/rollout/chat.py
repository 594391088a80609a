"""A chat with a model: its history, its answers as they come, and the loop around them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_llm.errors import UserError
from lit_llm.rollout.generation import GenerationConfig, max_positions, stream

_HELP = """\
/reset        forget the conversation
/system TEXT  set the system prompt (without TEXT: remove it) and forget the conversation
/save FILE    append the conversation to FILE, a .jsonl that recipes/sft.py can train on
/help         this
/exit         end, as Ctrl-D does; Ctrl-C stops an answer
A line that begins with a space is a message, whatever follows."""


class ChatSession:
    """The messages exchanged with a model, rendered with its tokenizer's chat template.

    An answer ends at a token of ``model.generation_config.eos_token_id`` or at the tokenizer's EOS.

    Args:
        model: A transformers causal language model, possibly wrapped by peft.
        tokenizer: Its tokenizer, with a chat template.
        config: How to sample. Up to half of the model's positions are kept free for an answer.
        system: System prompt, if any.
        seed: Seed of the first answer; every answer after it has a seed of its own.

    Attributes:
        messages: What was said so far, without the system prompt; an exchange without an answer is
            not kept.
        left_out: How many of the oldest messages the last prompt had no room for.
        cut_off: Whether the last answer reached ``max_new_tokens`` or the end of the context.

    Raises:
        UserError: The tokenizer has no chat template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: GenerationConfig,
        system: str | None = None,
        seed: int = 0,
    ) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"{tokenizer.name_or_path or 'the tokenizer'}: the tokenizer has no chat template, "
                "so it is unknown how a chat is written; use a model trained on conversations "
                "(recipes/sft.py makes one)."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.left_out = 0
        self.cut_off = False
        self._seed = seed
        stops = model.generation_config.eos_token_id
        own = stops if isinstance(stops, list) else [stops]
        self._stops = sorted({*own, tokenizer.eos_token_id} - {None})
        pad = tokenizer.pad_token_id
        self._pad: int = next((i for i in (pad, *self._stops) if i is not None), 0)

    def stream(self, text: str) -> Generator[str, None, None]:
        """Say something to the model and read its answer piece by piece.

        Pieces are whole characters; special tokens are not shown. Closing the iterator, or an
        interrupt while reading it, ends the answer and keeps what was said of it. When the context
        is full the oldest exchanges are left out of the prompt (``left_out``), never the system
        prompt.

        Args:
            text: The user's message.

        Returns:
            The pieces.

        Raises:
            UserError: The message alone does not fit the model, or the template refuses it.
        """
        # A terminal hands over bytes that are no text as lone surrogates.
        text = text.encode("utf-8", "replace").decode("utf-8")
        question = {"role": "user", "content": text}
        prompt, new = self._prompt(question)
        self.cut_off = False
        return self._answer(question, prompt, new)

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.messages = []
        self.left_out = 0

    def save(self, path: str | Path) -> Path:
        """Append the conversation to a ``.jsonl`` as one line ``{"messages": [...]}``.

        Raises:
            UserError: Nothing was said yet, or the file cannot be written.
        """
        if not self.messages:
            raise UserError("there is no conversation to save yet; say something first.")
        path = Path(path).expanduser()
        messages = [*self._system_message(), *self.messages]
        line = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:  # appends, wherever it was read
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read() == b"\n" else "\n" + line
                file.write(line.encode())
        except OSError as error:
            raise UserError(
                f"cannot save the conversation to {str(path)!r}: {error.strerror}."
            ) from error
        return path

    def _system_message(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _prompt(self, question: dict[str, str]) -> tuple[list[int], int]:
        """Token ids of the newest messages that fit, and how many tokens the answer may have."""
        positions, new = max_positions(self.model), self.config.max_new_tokens
        for first in range(0, len(self.messages) + 1, 2):
            ids = self._ids([*self._system_message(), *self.messages[first:], question])
            room = new if positions is None else positions - len(ids)
            if positions is None or room >= min(new, positions // 2):
                self.left_out = first
                return ids, min(new, room)
        raise UserError(
            f"the message is too long: with the system prompt it has {len(ids)} tokens, and the "
            f"model takes {positions}, answer included; shorten it, or lower max_new_tokens."
        )

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )
        except Exception as error:  # a template is a program, and raises what it likes
            raise UserError(
                f"the chat template does not take these messages: {error}; some templates, for "
                "example, know no system prompt."
            ) from error
        return list(rendered["input_ids"])

    def _answer(
        self, question: dict[str, str], prompt: list[int], new: int
    ) -> Generator[str, None, None]:
        tokens = stream(
            self.model,
            prompt,
            replace(self.config, max_new_tokens=new),
            pad_token_id=self._pad,
            stop_token_ids=self._stops,
            seed=self._seed,
        )
        self._seed += 1
        ids: list[int] = []
        said = ""
        try:
            with closing(tokens):
                for token in tokens:
                    ids.append(token)
                    text = self._decode(ids)
                    # A character may take several tokens; half of one decodes to U+FFFD.
                    if len(text) > len(said) and not text.endswith("\ufffd"):
                        piece, said = text[len(said) :], text
                        yield piece
            self.cut_off = len(ids) == new  # a stop token would have taken one place
            if len(text := self._decode(ids)) > len(said):
                piece, said = text[len(said) :], text
                yield piece
        finally:
            if said.strip():
                self.messages += [question, {"role": "assistant", "content": said}]

    def _decode(self, ids: list[int]) -> str:
        # Cleaning up spaces would change what was shown already.
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


def converse(session: ChatSession) -> None:
    """Talk with a person at a terminal, or answer every line of a pipe.

    Answers go to stdout, everything else to stderr. At a terminal a mistake is said and the talk
    goes on, and Ctrl-C stops the answer; in a pipe both end it.

    Args:
        session: The conversation to go on with.

    Raises:
        UserError: In a pipe: a message or a command cannot be followed, or is no UTF-8.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        _note("/help lists the commands, Ctrl-D ends")
    for line in _typed() if interactive else _piped():
        try:
            if line.startswith("/"):
                if line.strip() == "/exit":
                    return
                _command(session, line)
            elif line.strip():
                answer(session, line.strip())
        except UserError as error:
            if not interactive:
                raise
            _note(f"error: {error}")
        except KeyboardInterrupt:
            if not interactive:
                raise SystemExit(130) from None
            print(flush=True)


def answer(session: ChatSession, text: str) -> None:
    """Print the answer to one message as it comes, and what is to be known about it.

    Args:
        session: The conversation.
        text: The user's message.

    Raises:
        UserError: As for :meth:`ChatSession.stream`.
    """
    before = session.left_out
    pieces = session.stream(text)
    if session.left_out > before:
        _note(f"(the context is full: the oldest {session.left_out} messages are left out)")
    with closing(pieces):
        for piece in pieces:
            print(piece, end="", flush=True)
    print(flush=True)
    if session.cut_off:
        _note("(cut off at the longest answer; raise max_new_tokens, or reset a full context)")


def _command(session: ChatSession, line: str) -> None:
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/reset":
        session.reset()
        _note("(the conversation is forgotten)")
    elif name == "/system":
        session.system = rest or None
        session.reset()
        _note(f"(system prompt {'set' if rest else 'removed'}; the conversation is forgotten)")
    elif name == "/save" and rest:
        _note(f"({len(session.messages)} messages saved to {session.save(rest)})")
    elif name == "/help":
        _note(_HELP)
    else:
        wrong = "/save needs a file" if name == "/save" else f"there is no command {name}"
        _note(f"{wrong}; /help lists the commands")


def _typed() -> Iterator[str]:
    with suppress(ImportError):
        import readline  # noqa: F401 - input() then edits lines and remembers them
    while True:
        try:
            yield input("> " if sys.stdout.isatty() else "")
        except EOFError:
            print(flush=True)
            return
        except KeyboardInterrupt:
            print(flush=True)


def _piped() -> Iterator[str]:
    try:
        for line in sys.stdin:
            yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"the input is no UTF-8 text ({error.reason}); convert it first."
        ) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
