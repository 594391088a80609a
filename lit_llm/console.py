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
        except UserError as error:
            if os.environ.get("LIT_LLM_TRACEBACK") == "1":
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None

    return wrapper
