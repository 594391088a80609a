"""Folders that are written whole or not at all."""

from __future__ import annotations

import fnmatch
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lit_llm.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


def check_replaceable(
    folder: str | os.PathLike[str], files: Sequence[str], action: str, thing: str
) -> None:
    """Says whether a folder may be replaced: it is absent, or holds ``files`` alone.

    Args:
        folder: The folder.
        files: Patterns of what it may hold; anything else belongs to somebody.
        action: What is to be done, for people: "export".
        thing: What it may hold, for people: "an exported model".

    Raises:
        UserError: It is a file, or holds something else.
    """
    path = Path(folder).expanduser()
    if path.is_file():
        raise UserError(f"cannot {action} to {str(folder)!r}: it is a file; name a folder.")
    if not path.is_dir():
        return
    for entry in sorted(path.iterdir()):
        known = any(fnmatch.fnmatch(entry.name, pattern) for pattern in files)
        if entry.is_dir() or not known:
            raise UserError(
                f"will not {action} to {str(folder)!r}: it holds {entry.name!r}, which is no part "
                f"of {thing} and would be lost; name another folder."
            )


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A draft beside ``target`` that takes its place when the block ends without an error.

    Args:
        target: Absolute path of the folder; what is there is replaced as a whole.

    Yields:
        The empty draft.

    Raises:
        UserError: There can be no folder.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"cannot write to {str(target)!r}: {error.strerror}.") from error
    try:
        yield draft
        draft.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        _replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _replace(draft: Path, target: Path) -> None:
    """Puts ``draft`` where ``target`` is; a folder with files cannot be replaced in one step."""
    if not target.exists():
        os.replace(draft, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.replace(target, old)
    try:
        os.replace(draft, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
