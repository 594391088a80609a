"""How a recipe talks to the terminal: one sentence for a mistake, no traceback unless asked for."""

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from lit_llm.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")


def recipe(main: Callable[P, R]) -> Callable[P, R]:
    """Turn a ``UserError`` inside a recipe's ``main`` into one line on stderr and exit code 1.

    Set ``LIT_LLM_TRACEBACK=1`` to see where the error was raised.
    """

    @functools.wraps(main)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return main(*args, **kwargs)
        except Exception as error:
            mistake = _user_error(error)
            if mistake is None or os.environ.get("LIT_LLM_TRACEBACK") == "1":
                raise
            print(f"error: {mistake}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None

    return wrapper


def _user_error(error: BaseException | None) -> UserError | None:
    """Find the user's mistake behind an error: parsers and trainers wrap what they catch."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error
