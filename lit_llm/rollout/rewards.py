"""Rewards of responses as functions: text and token ids in, one score each out.

A reward is a rule of ``rules.py``, or a function of the user's own, by its import path or file.
Reward models are in ``lit_llm.modules.rewards``.

Legend: N samples.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from lit_llm.errors import UserError

RULES = "lit_llm.rollout.rules"
"""The module whose functions are known by their names alone."""
_SHOWN = 160
"""Characters of a text that a message shows."""


@dataclass(frozen=True)
class RewardSample:
    """A response and what it is a response to.

    Attributes:
        prompt: What the user says last, or the plain text that is continued.
        response: The response as text, without special tokens.
        prompt_ids: Tokens of the whole prompt, as the policy has read it.
        response_ids: Tokens of the response, with the stop token that ended it.
        stopped: Whether it ended with a stop token; otherwise it was cut off.
        messages: The conversation up to the response; None where a plain text is continued.
        reference: The answer that the data have, if any.
        answer_format: Regular expression that a well-formed answer matches as a whole, if any.
    """

    prompt: str
    response: str
    prompt_ids: list[int]
    response_ids: list[int]
    stopped: bool
    messages: list[dict[str, Any]] | None = None
    reference: str | None = None
    answer_format: str | None = None


class RewardFunction(Protocol):
    """One finite number a sample, in their order; a higher one is better.

    All samples of a rollout come at once, in an order of no meaning, on every rank its own. When it
    is loaded, a function is called without samples: what is wrong with its options can be said then
    (as a ``UserError``), and what takes long be prepared.
    """

    def __call__(self, samples: Sequence[RewardSample]) -> Sequence[float] | Tensor:
        """Scores (N,)."""


def load_reward_function(path: str, options: Mapping[str, Any] | None = None) -> RewardFunction:
    """A reward function with its options.

    Args:
        path: The name of a rule (``exact_match``), ``package.module:function``, or
            ``file.py:function``.
        options: Its arguments after the samples, by name.

    Returns:
        The function, called without samples once.

    Raises:
        UserError: There is no such function, or it does not take these options.
    """
    options = dict(options or {})
    function = find_function(path)
    _check_options(path, function, options)
    bound: RewardFunction = partial(function, **options)
    try:
        bound([])
    except UserError as error:
        raise UserError(f"reward function {path}: {str(error).rstrip('.')}.") from error
    except (ImportError, OSError) as error:
        raise UserError(f"reward function {path} fails with {_told(error)}.") from error
    except Exception:
        pass  # not every function expects to get no samples; the real ones will tell
    return bound


def rule_names() -> list[str]:
    """The rules that are known by their names alone."""
    return list(_functions_of(importlib.import_module(RULES)))


def score_samples(name: str, function: RewardFunction, samples: Sequence[RewardSample]) -> Tensor:
    """Scores of samples by a function.

    Args:
        name: The reward, for messages.
        function: Scores the samples.
        samples: The samples.

    Returns:
        (N,) float32 on the CPU.

    Raises:
        UserError: The function fails, or gives something else than one finite number a sample; the
            sentence shows the first sample that this happens with.
    """
    try:
        return checked_scores(name, function(list(samples)), samples)
    except _SampleError:
        raise
    except Exception as error:
        problem = str(error) if isinstance(error, UserError) else f"failed with {_told(error)}"
        sample_error(name, problem.rstrip("."), _first_failing(function, samples), error)


def checked_scores(name: str, scores: Any, samples: Sequence[RewardSample]) -> Tensor:
    """What a reward function gave as numbers.

    Args:
        name: The reward, for messages.
        scores: What it gave: a sequence of numbers (truth values count as 1 and 0), a tensor or an
            array of shape (N,).
        samples: What it gave it for.

    Returns:
        (N,) float32 on the CPU.

    Raises:
        UserError: These are not N finite numbers; the sentence shows a sample with none.
    """
    wanted = "one finite number a sample is wanted"
    given = scores.tolist() if hasattr(scores, "tolist") else scores
    if isinstance(given, str | bytes | Mapping | Set) or not hasattr(given, "__iter__"):
        sample_error(name, f"gave {_short(given)}, where {wanted}", next(iter(samples), None))
    values = list(given)
    if len(values) != len(samples):
        count = f"gave {len(values)} scores for {len(samples)} samples, where {wanted}"
        sample_error(name, count, next(iter(samples), None))
    numbers = [_number(value) for value in values]
    result = torch.tensor(numbers, dtype=torch.float64).float()
    for value, fine, sample in zip(values, result.isfinite().tolist(), samples, strict=True):
        if not fine:
            sample_error(name, f"gave {_short(value)}, where {wanted}", sample)
    return result


def sample_error(
    name: str, problem: str, sample: RewardSample | None, cause: Exception | None = None
) -> NoReturn:
    """Ends with a sentence about a reward that shows a sample.

    Args:
        name: The reward.
        problem: What is wrong, as it goes on after the name.
        sample: The sample where it is wrong, if it is known.
        cause: The error behind it.

    Raises:
        UserError: Always.
    """
    told = "" if sample is None else f"; {_shown(sample)}"
    raise _SampleError(f"reward {name}: {problem}{told}.") from cause


class _SampleError(UserError):
    """A sentence that shows its sample already."""


def _number(value: Any) -> float:
    """A value as a number; NaN where it is none."""
    if isinstance(value, str | bytes):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


def _first_failing(
    function: RewardFunction, samples: Sequence[RewardSample]
) -> RewardSample | None:
    for sample in samples:
        try:
            function([sample])
        except Exception:
            return sample
    return None


def _shown(sample: RewardSample) -> str:
    return f"the prompt is {_short(sample.prompt)} and the response {_short(sample.response)}"


def _short(value: object) -> str:
    """A value on one line, texts in quotes, with its beginning and its end."""
    text = repr(value)
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]} ... {text[-half:]}"


def _told(error: Exception) -> str:
    """What an error is, and where it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    # Where the user's own code called a library, rather than where the library failed.
    own = [frame for frame in frames if "site-packages" not in frame.filename]
    where = f" in {own[-1].filename}:{own[-1].lineno}" if own else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{where}{': ' if text else ''}{text[:300]}"


# ----- finding the function -----------------------------------------------------------------------


def find_function(path: str) -> Callable[..., Any]:
    """The function that ``file.py:name`` or ``package.module:name`` names, or a rule of ours.

    Raises:
        UserError: There is no such file, module or function.
    """
    name, colon, attribute = path.rpartition(":")
    if not colon:
        name, attribute = RULES, path
    module = _from_file(name, path) if name.endswith(".py") else _imported(name, path)
    function = getattr(module, attribute, None) if attribute else None
    if colon and callable(function) and not inspect.isclass(function):
        return function
    known = _functions_of(module)
    if not colon and attribute in known:
        return known[attribute]
    names = ", ".join(known) or "none"
    if colon:
        raise UserError(
            f"reward function {path!r}: {name} has no function {attribute!r}; it has: {names}."
        )
    raise UserError(
        f"reward function {path!r}: there is no such rule; use one of {names}, or a function of "
        "your own: 'file.py:function' or 'package.module:function'."
    )


def _functions_of(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Functions that a module defines for others."""
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    }


def _imported(name: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        own = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
        if own or isinstance(error, ValueError):  # the latter for "" and relative names
            raise UserError(
                f"reward function {path!r}: there is no module {name!r} to import; name its file "
                "(file.py:function), or set PYTHONPATH to the folder that holds it."
            ) from error
        raise UserError(
            f"reward function {path!r}: {name} cannot be imported: {_told(error)}."
        ) from error


def _from_file(name: str, path: str) -> ModuleType:
    file = Path(name).expanduser()
    if not file.is_file():
        raise UserError(f"reward function {path!r}: there is no file {name!r}.")
    # A name of its own, so that "statistics.py" does not take the place of another module.
    module_name = f"lit_llm_reward_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look there for their module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(
            f"reward function {path!r}: {name} cannot be imported: {_told(error)}."
        ) from error
    return module


def _check_options(path: str, function: Callable[..., Any], options: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # what is written in C may not say
        return
    try:
        signature.bind([], **options)
    except TypeError as error:
        names = ", ".join(list(signature.parameters)[1:]) or "none"
        raise UserError(
            f"reward function {path}: {error}; it takes the samples, and the options: {names}."
        ) from error
