"""Rules that score responses: each public function here is known by its name alone.

All give a score between 0 and 1; a reward's weight scales it.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

from lit_llm.errors import UserError

if TYPE_CHECKING:
    from lit_llm.rollout.rewards import RewardSample

_MARK = "####"
# A minus after a letter, a digit or a bracket is a difference or a range, not a sign.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-+−])?[$€£]?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]+)?(?:\s?/\s?[0-9]+)?\s?%?"
)
_SIGNS = str.maketrans({"−": "-"} | dict.fromkeys("$€£,% \t\n\r\f\v"))


def exact_match(
    samples: Sequence[RewardSample], *, pattern: str | None = None, normalise: bool = True
) -> list[float]:
    """1 where the final answer of the response is that of the reference, else 0.

    The final answer is what stands after the last ``####`` on its line, as in GSM8K (Cobbe et al.
    2021, https://arxiv.org/abs/2110.14168); else the last number; else the whole text.

    Args:
        samples: The samples, each with a reference.
        pattern: Regular expression that finds the final answer: its first group, or the whole
            match, of the last place it matches (``.`` matches line feeds too). A response where it
            matches nothing is wrong; a reference where it matches nothing is the answer itself.
        normalise: Compare numbers by their values (``$1,000.00`` is ``1000``, ``1/2`` is ``0.5``),
            and other answers without case, white space and punctuation around them. Otherwise every
            character counts.

    Returns:
        0 or 1 for each sample.

    Raises:
        UserError: A sample has no reference, or the pattern is none.
    """
    regular = None if pattern is None else _compiled(pattern)
    scores = []
    for sample in samples:
        if not (sample.reference or "").strip():
            raise UserError(
                "exact_match compares with the reference answer, and a sample has none; use "
                "prompts with one (fields such as answer or reference), or another rule"
            )
        reference = str(sample.reference)
        expected = _final_answer(reference, regular) or reference
        found = _final_answer(sample.response, regular)
        scores.append(float(found is not None and _same(found, expected, normalise)))
    return scores


def length_window(
    samples: Sequence[RewardSample],
    *,
    shortest: int = 0,
    longest: int | None = None,
    unit: Literal["tokens", "words"] = "tokens",
    edge: int = 0,
) -> list[float]:
    """1 where the length of the response lies between two limits, else 0 or less than 1.

    Args:
        samples: The samples.
        shortest: Least length.
        longest: Greatest length; none means no limit.
        unit: ``tokens`` of the policy, the stop token included; or ``words``, what white space
            parts.
        edge: Over how many tokens or words outside the limits the score falls from 1 to 0, in a
            straight line; 0 for a hard limit.

    Returns:
        A score in [0, 1] for each sample.

    Raises:
        UserError: For limits that make no sense.
    """
    limits = {"shortest": shortest, "longest": longest, "edge": edge}
    for name, limit in limits.items():
        if not (_is_count(limit) or (name == "longest" and limit is None)):
            raise UserError(
                f"length_window: {name} must be a whole number from 0 on, got {limit!r}"
            )
    if shortest == 0 and longest is None:
        raise UserError("length_window needs a limit: give shortest, longest or both")
    if longest is not None and longest < shortest:
        raise UserError(f"length_window: longest {longest} is below shortest {shortest}")
    if unit not in ("tokens", "words"):
        raise UserError(f"length_window: unit must be tokens or words, got {unit!r}")
    scores = []
    for sample in samples:
        length = len(sample.response_ids) if unit == "tokens" else len(sample.response.split())
        outside = max(shortest - length, 0 if longest is None else length - longest, 0)
        scores.append(max(0.0, 1 - outside / edge) if edge else float(outside == 0))
    return scores


def regex(
    samples: Sequence[RewardSample], *, pattern: str | None = None, full: bool = False
) -> list[float]:
    """1 where the response matches a regular expression, else 0.

    Args:
        samples: The samples.
        pattern: Regular expression of Python (``.`` matches line feeds too). By default each
            sample's own answer format, which is to match the response as a whole.
        full: The pattern has to match the response as a whole, and not a part of it.

    Returns:
        0 or 1 for each sample.

    Raises:
        UserError: The pattern is none, or there is none and a sample has no answer format.
    """
    regular = None if pattern is None else _compiled(pattern)
    scores = []
    for sample in samples:
        if regular is not None:
            match = (regular.fullmatch if full else regular.search)(sample.response)
        elif sample.answer_format is not None:
            match = _compiled(sample.answer_format).fullmatch(sample.response)
        else:
            raise UserError("regex needs a pattern, as a sample has no answer format of its own")
        scores.append(float(match is not None))
    return scores


def _compiled(pattern: str) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise UserError(f"the pattern {pattern!r} is no text; put it in quotes")
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(f"the pattern {pattern!r} is no regular expression ({error})") from error


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _final_answer(text: str, pattern: re.Pattern[str] | None) -> str | None:
    if pattern is not None:
        matches = list(pattern.finditer(text))
        return (matches[-1][1 if pattern.groups else 0] or "") if matches else None
    if _MARK in text:
        return text.rpartition(_MARK)[2].strip().partition("\n")[0]
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else text


def _same(found: str, expected: str, normalise: bool) -> bool:
    found, expected = found.strip(), expected.strip()
    if not normalise:
        return found == expected
    value = _value(expected) if _NUMBER.fullmatch(expected) else None
    if value is None:
        return _plain(found) == _plain(expected)
    numbers = _NUMBER.findall(found)  # "72 dollars" after the mark
    return bool(numbers) and _value(numbers[-1]) == value


def _value(number: str) -> Decimal | None:
    """A number as ``_NUMBER`` finds it; None for one that has no value, such as 1/0.

    Decimal, since ``1e999999999`` from a policy must cost no more than any other number.
    """
    above, slash, below = number.translate(_SIGNS).partition("/")
    try:
        return Decimal(above) / Decimal(below) if slash else Decimal(above)
    except ArithmeticError:
        return None


def _plain(text: str) -> str:
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return words.strip(string.punctuation + " ") or words
