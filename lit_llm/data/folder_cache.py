"""Folders that are prepared once: right and whole, or not there."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lit_llm.errors import UserError

Cache = TypeVar("Cache")


def cached_folder(
    folder: Path, open_whole: Callable[[Path], Cache], build: Callable[[Path], None]
) -> Cache:
    """Open a prepared folder; prepare it first where it is not there.

    It is written under another name and renamed when it is whole, so a half-written one is never
    read. Any number of processes may call this at once: one builds, the others wait and open the
    same. The lock ends with the process that holds it, so one that was killed blocks nobody.

    Args:
        folder: Where it belongs; its name should be a hash of all that decides its content.
        open_whole: Opens the folder; ``OSError``, ``ValueError`` and ``KeyError`` mean that it is
            absent or damaged.
        build: Fills the empty folder it is given.

    Returns:
        What ``open_whole`` returns.

    Raises:
        UserError: When the folder cannot be written.
    """
    from filelock import FileLock

    def attempt() -> Cache | None:
        try:
            return open_whole(folder)
        except (OSError, ValueError, KeyError):
            return None

    if (cache := attempt()) is not None:
        return cache
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"{folder.parent}: the cache cannot be written here ({error.strerror or error}); "
            "give another cache_dir."
        ) from error
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        if (cache := attempt()) is not None:  # another process has built it meanwhile
            return cache
        for left_over in folder.parent.glob(f".{folder.name}.*"):
            shutil.rmtree(left_over)  # of a builder that was killed, since we have the lock
        draft.mkdir()
        build(draft)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        lock.release()
    return open_whole(folder)
