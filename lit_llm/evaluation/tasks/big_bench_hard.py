"""BIG-Bench Hard: one task over all its parts, answered without reasoning aloud."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from lit_llm.errors import UserError
from lit_llm.evaluation.tasks.reading import Row, as_dataset, read_rows

if TYPE_CHECKING:
    from datasets import DatasetDict

_SHOTS = 3
_WORDS = ("yes", "no", "true", "false", "valid", "invalid")


def big_bench_hard(data_dir: str, files: list[str], **rest: Any) -> DatasetDict:
    """Suzgun et al. 2022, https://arxiv.org/abs/2210.09261.

    The first three problems of each part are the examples of the others, and are not tested.
    """
    parts: defaultdict[str, list[Row]] = defaultdict(list)
    for data, origin in read_rows(data_dir, files[0], {"input": str, "target": str}):
        part = origin.rpartition(":")[0].replace("\\", "/").rpartition("/")[2].partition(".")[0]
        parts[part].append({"input": data["input"], "target": data["target"], "subset": part})
    rows = []
    for part, own in parts.items():
        if len(own) <= _SHOTS:
            raise UserError(
                f"{data_dir}: {part} of {files[0]} has {len(own)} problems; {_SHOTS} are examples, "
                "so that it takes more"
            )
        rows += [{**row, "shots": own[:_SHOTS]} for row in own[_SHOTS:]]
    return as_dataset(test=rows)


def matches(doc: Row, results: list[str]) -> dict[str, float]:
    """Whether the answer is the right one: as it stands, and where it stands within a sentence.

    ``exact_match``: the first line is the target, but for case and a full stop.
    ``flexible_match``: so is the first letter in round brackets, or the first word of yes, no,
    valid, invalid, true, false, where the target is of that kind.

    Args:
        doc: The problem.
        results: What the model wrote.
    """
    answer, target = _plain(results[0]), _plain(doc["target"])
    exact = answer.partition("\n")[0].strip().removesuffix(".") == target
    flexible: bool | None = None
    if re.fullmatch(r"\([a-z]\)", target):
        flexible = _first(r"\([a-z]\)", answer) == target
    elif target in _WORDS:
        flexible = _first(rf"\b(?:{'|'.join(_WORDS)})\b", answer) == target
    return {"exact_match": float(exact), "flexible_match": float(exact or flexible or False)}


def _plain(text: str) -> str:
    return text.strip().lower()


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[0] if found else None
