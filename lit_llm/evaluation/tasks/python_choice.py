"""Which description belongs to a function: from the embedded data, so that it works anywhere."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from lit_llm.data.preference_formats import Answer
from lit_llm.data.python_preferences import collect_preferences
from lit_llm.data.python_questions import stable_hash
from lit_llm.data.splits import split_position
from lit_llm.evaluation.tasks.reading import Row, as_dataset

if TYPE_CHECKING:
    from datasets import DatasetDict

# The share that is held out by default where the least is; a larger one holds these out too.
_TEST_FRACTION = 0.05


def python_choice(**rest: Any) -> DatasetDict:
    """Functions of Python's library that fine-tuning and reward models hold out for the test."""
    return as_dataset(test=_rows())


@functools.cache
def _rows() -> list[Row]:
    rows = []
    for preference in collect_preferences():
        kinds = preference.kinds or ()
        if split_position(preference.group) >= _TEST_FRACTION or "other" not in kinds:
            continue
        right, *wrong = (_text(turns) for turns in preference.answers)
        place = stable_hash(preference.origin, "place") % 2
        choices = [wrong[kinds.index("other")]]
        choices.insert(place, right)
        rows.append({"question": _text(preference.prompt), "choices": choices, "answer": place})
    return rows


def _text(turns: Answer) -> str:
    return turns if isinstance(turns, str) else str(turns[0]["content"])
