"""The embedded preferences: right and wrong answers about Python's standard library.

Made from the documentation of the running Python, so a first reward model needs no network, no file
and nobody's taste: one answer is right, the others were made wrong, each in a way that has a name.
The questions are those of ``python_questions``, so a model that was fine-tuned on them knows them.
About as many wrong answers are longer than the right one as are shorter: length alone tells next to
nothing.

Two sets: what a function does, to train on; and which parameters it takes, to see whether a reward
model has learnt more than what is wrong in the first set.
"""

import dataclasses
import functools
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise, takewhile

from lit_llm.data.preference_formats import Preference
from lit_llm.data.python_questions import (
    DescribedFunction,
    Kind,
    answer,
    ask,
    described_functions,
    stable_hash,
)
from lit_llm.data.splits import split_position

_NEAREST = 4  # answers of about the same length, of which one is taken
# Fractions of the splits are multiples of a twentieth more often than not.
_BUCKETS = 20
_DRAWS = 16  # orders of the words, of which the most broken one is taken
# No sentence ends with these.
_DANGLING = frozenset(
    "a an and because every if its my nor of or our than the their unless whether which whose "
    "your".split()
)
# What many descriptions share.
_TELLING_NOTHING = frozenset(
    "a all an and any are as at be by false for from given if in into is it its of on or return "
    "returns that the then this to true with".split()
)
_ByLength = dict[int, list[DescribedFunction]]  # by the characters of their answers


def collect_preferences() -> list[Preference]:
    """Collect what each function does, against three wrong answers, in the order of the functions.

    - ``other``: what another function of the same split does, told in
      about as many characters.
    - ``truncated``: broken off, in the first sentence or in the one that follows it.
    - ``shuffled``: the words in another order.

    Functions that are described alike are one group, as in ``collect_conversations``.

    Raises:
        UserError: When this Python comes without the sources of its library.
    """
    functions = described_functions()
    others = _Others(functions, "does", _described_alike)
    tally = _Tally("does")

    def wrong(function: DescribedFunction) -> Iterator[tuple[str, DescribedFunction]]:
        if (other := others.choose(function)) is not None:
            yield "other", dataclasses.replace(function, purpose=other.purpose)
        cut = [_cut(function.name, function.purpose)]
        if function.more is not None:
            cut.append(f"{function.purpose} {_cut(function.name, function.more)}")
        versions = [dataclasses.replace(function, purpose=text) for text in cut]
        yield "truncated", tally.choose(function, versions)
        if (text := _shuffled(function.name, function.purpose)) is not None:
            yield "shuffled", dataclasses.replace(function, purpose=text)

    return list(_preferences(functions, "does", "python-docs", wrong))


def collect_parameter_preferences() -> list[Preference]:
    """Collect the parameters of each function, against two wrong lists, in the same order.

    - ``other``: the parameters of another function of the same split.
    - ``near``: one parameter is missing, or one of another function was added.

    Groups are those of ``collect_preferences``.

    Raises:
        UserError: When this Python comes without the sources of its library.
    """
    functions = [function for function in described_functions() if function.call is not None]
    others = _Others(functions, "parameters", _same_parameters)
    tally = _Tally("parameters")
    names: defaultdict[str, set[str]] = defaultdict(set)
    for function in functions:
        for module in (function.module, ""):  # "" is the whole library
            names[module].update(name for name in function.parameters if name[0] != "*")

    def wrong(function: DescribedFunction) -> Iterator[tuple[str, DescribedFunction]]:
        taken = {name.lstrip("*") for name in function.parameters}
        other = others.choose(function)
        if other is not None:
            yield "other", dataclasses.replace(function, parameters=other.parameters)
            taken.update(other.parameters)
        foreign = sorted(names[function.module] - taken) or sorted(names[""] - taken)
        versions = [
            dataclasses.replace(function, parameters=changed)
            for changed in (*_one_missing(function), *_one_added(function, foreign))
            if other is None or changed != other.parameters
        ]
        if versions:
            yield "near", tally.choose(function, versions)

    return list(_preferences(functions, "parameters", "python-parameters", wrong))


def _preferences(
    described: Iterable[DescribedFunction],
    kind: Kind,
    origin: str,
    wrong: Callable[[DescribedFunction], Iterable[tuple[str, DescribedFunction]]],
) -> Iterator[Preference]:
    for function in described:
        versions = dict(wrong(function))
        if versions:
            yield Preference(
                prompt=[{"role": "user", "content": ask(function, kind)}],
                answers=tuple(
                    [{"role": "assistant", "content": answer(version, kind)}]
                    for version in (function, *versions.values())
                ),
                pairs=tuple((0, number) for number in range(1, 1 + len(versions))),
                margins=None,
                origin=f"{origin}:{function.name}",
                group=function.group,
                kinds=tuple(versions),
            )


class _Others:
    """Finds other functions whose answers are about as long.

    Args:
        described: All functions.
        kind: What is answered.
        alike: Whether the answer for one of two functions may do for the other.
    """

    def __init__(
        self,
        described: Sequence[DescribedFunction],
        kind: Kind,
        alike: Callable[[DescribedFunction, DescribedFunction], bool],
    ) -> None:
        self.alike = alike
        self.lengths: dict[str, int] = {}
        self.candidates: defaultdict[tuple[int | str, ...], _ByLength] = defaultdict(
            lambda: defaultdict(list)
        )
        for function in described:
            length = len(answer(dataclasses.replace(function, qualname=""), kind))
            self.lengths[function.name] = length
            for key in self._keys(function):
                self.candidates[key][length].append(function)

    def choose(self, function: DescribedFunction) -> DescribedFunction | None:
        nearest: list[DescribedFunction] = []
        for key in self._keys(function):
            nearest = self._nearest(function, self.candidates[key])
            if len(nearest) == _NEAREST:
                break
        return nearest[stable_hash(function.name, "nearest") % len(nearest)] if nearest else None

    def _keys(self, function: DescribedFunction) -> list[tuple[int | str, ...]]:
        """Where to look: what comes first is the more alike.

        Functions of one bucket are in one split. Otherwise what is wrong in a test would be what
        was right in training, and a model that remembers the texts would be taught to fail.
        """
        bucket = int(_BUCKETS * split_position(function.group))
        return [(bucket, function.module), (bucket,), (function.module,), ()]

    def _nearest(
        self, function: DescribedFunction, candidates: _ByLength
    ) -> list[DescribedFunction]:
        own = self.lengths[function.name]
        sign = 1 if stable_hash(function.name, "longer first") % 2 else -1
        found: list[DescribedFunction] = []
        for length in sorted(candidates, key=lambda length: (abs(length - own), sign * length)):
            found += sorted(
                (other for other in candidates[length] if not self.alike(function, other)),
                key=lambda other: stable_hash(function.name, other.name),
            )
            if len(found) >= _NEAREST:
                break
        return found[:_NEAREST]


def _described_alike(one: DescribedFunction, other: DescribedFunction) -> bool:
    """Whether one description may do for both; methods of one name mostly do the same."""
    if one.group == other.group or _last_name(one) == _last_name(other):
        return True
    words, others = _telling_words(one.purpose), _telling_words(other.purpose)
    return 2 * len(words & others) > min(len(words), len(others)) or not words or not others


def _last_name(function: DescribedFunction) -> str:
    return function.qualname.rpartition(".")[2].lower()


@functools.cache
def _telling_words(sentence: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", sentence.lower())) - _TELLING_NOTHING


def _same_parameters(one: DescribedFunction, other: DescribedFunction) -> bool:
    return sorted(one.parameters) == sorted(other.parameters)


class _Tally:
    """Chooses wrong versions so that about as many are longer as shorter.

    Among equals, as many have more parameters than the right one as have fewer.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.surplus = (0, 0)

    def choose(
        self, function: DescribedFunction, versions: Sequence[DescribedFunction]
    ) -> DescribedFunction:
        def surplus(version: DescribedFunction) -> tuple[int, int]:
            longer = len(answer(version, self.kind)) - len(answer(function, self.kind))
            more = len(version.parameters) - len(function.parameters)
            return self.surplus[0] + _sign(longer), self.surplus[1] + _sign(more)

        def rank(version: DescribedFunction) -> tuple[int, int, int]:
            longer, more = surplus(version)
            return abs(longer), abs(more), stable_hash(function.name, answer(version, self.kind))

        chosen = min(versions, key=rank)
        self.surplus = surplus(chosen)
        return chosen


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def _cut(name: str, sentence: str) -> str:
    """The beginning of a sentence, up to somewhere in its middle half.

    It ends after a word that none ends with, where there is one; half of those get a full stop.
    """
    words = sentence.split()
    middle = range(max(1, len(words) // 4), max(2, len(words) * 3 // 4 + 1))
    ends = [end for end in middle if words[end - 1][-1] not in ".?!"] or list(middle)
    dangling = [end for end in ends if words[end - 1].lower() in _DANGLING]
    ends = dangling or ends
    text = " ".join(words[: ends[stable_hash(name, "end") % len(ends)]])
    return f"{text}." if dangling and stable_hash(name, "full stop") % 2 else text


def _shuffled(name: str, sentence: str) -> str | None:
    """The words of a sentence in another order, with a capital and a full stop where they belong.

    None where there is no other order.
    """
    words = sentence.removesuffix(".").split()
    if words[0] == "A" or words[0][1:].islower():  # and not "HTTP"
        words[0] = words[0].lower()
    neighbours = set(pairwise(words))
    generator = random.Random(stable_hash(name, "shuffled"))

    def rank(order: list[str]) -> tuple[bool, bool, bool, int]:
        return (
            not order[0][0].isalpha(),
            # "Return y and x" would be right: the verb goes elsewhere.
            order[0] == words[0],
            not re.search(r"[\w)'\"`]$", order[-1]),
            sum(pair in neighbours for pair in pairwise(order)),
        )

    # Of this generator only random() is promised to be the same in every version of Python.
    orders = [sorted(words, key=lambda _: generator.random()) for _ in range(_DRAWS)]
    order = min(orders, key=rank)
    text = " ".join([order[0][0].upper() + order[0][1:], *order[1:]]) + "."
    return None if text == sentence else text


def _one_missing(function: DescribedFunction) -> list[tuple[str, ...]]:
    names = function.parameters
    if not names:
        return []
    missing = stable_hash(function.name, "missing") % len(names)
    return [(*names[:missing], *names[missing + 1 :])]


def _one_added(function: DescribedFunction, foreign: Sequence[str]) -> list[tuple[str, ...]]:
    if not foreign:
        return []
    names = function.parameters
    plain = len(list(takewhile(lambda name: name[0] != "*", names)))
    place = stable_hash(function.name, "place") % (plain + 1)
    added = foreign[stable_hash(function.name, "added") % len(foreign)]
    return [(*names[:place], added, *names[place:])]
