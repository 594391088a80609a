"""Tasks whose answer is one of several: PIQA, CommonsenseQA, MMLU, TruthfulQA, BLiMP, BIG-bench.

A document holds what its prompt is made of, ``choices``, the number of the right one as ``answer``,
and maybe ``subset``, the part of the task it belongs to.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lit_llm.data.python_questions import stable_hash
from lit_llm.data.record_formats import Record
from lit_llm.errors import UserError
from lit_llm.evaluation.tasks.reading import Row, as_dataset, read_rows

if TYPE_CHECKING:
    from datasets import DatasetDict

_LETTERS = "ABCDEFGHIJ"


def piqa(data_dir: str, files: list[str], **rest: Any) -> DatasetDict:
    """A goal and two ways to it (Bisk et al. 2020, https://arxiv.org/abs/1911.11641)."""
    records = read_rows(data_dir, files[0], {"goal": str, "sol1": str, "sol2": str, "label": int})
    rows = [
        {
            "goal": data["goal"],
            "choices": [data["sol1"], data["sol2"]],
            "answer": _number(data["label"], 2, "label", origin),
        }
        for data, origin in records
    ]
    return as_dataset(test=rows)


def commonsense_qa(data_dir: str, files: list[str], **rest: Any) -> DatasetDict:
    """A question and five words (Talmor et al. 2019, https://arxiv.org/abs/1811.00937)."""
    records = read_rows(data_dir, files[0], {"question": dict, "answerKey": str})
    return as_dataset(test=[_commonsense(record) for record in records])


def _commonsense(record: Record) -> Row:
    question = record.data["question"]
    try:
        labels = [choice["label"] for choice in question["choices"]]
        texts = [choice["text"] for choice in question["choices"]]
        answer = labels.index(record.data["answerKey"])
        if labels != list(_LETTERS[:5]):
            raise ValueError("the labels are not A to E")
        return {"question": question["stem"].strip(), "choices": texts, "answer": answer}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{record.origin}: field 'question' wants stem and choices of five with label and "
            f"text, of which answerKey names one ({error})"
        ) from error


def mmlu(data_dir: str, files: list[str], **rest: Any) -> DatasetDict:
    """Questions of 57 subjects (Hendrycks et al. 2021, https://arxiv.org/abs/2009.03300).

    Where there is a second file, each carries the examples of its own subject.
    """
    fields = {"question": str, "subject": str, "choices": list, "answer": int}
    rows, *examples = [
        [_mmlu(record) for record in read_rows(data_dir, name, fields)] for name in files
    ]
    if not examples:
        return as_dataset(test=rows)
    shots = defaultdict(list)
    for row in examples[0]:
        shots[row["subset"]].append(row)
    return as_dataset(test=[{**row, "shots": shots[row["subset"]]} for row in rows])


def _mmlu(record: Record) -> Row:
    data, origin = record
    if len(data["choices"]) != 4:
        raise UserError(f"{origin}: field 'choices' has {len(data['choices'])} texts, not 4")
    return {
        "question": data["question"].strip(),
        "choices": [str(choice) for choice in data["choices"]],
        "answer": _number(data["answer"], 4, "answer", origin),
        "subset": data["subject"],
    }


def truthfulqa_mc1(data_dir: str, files: list[str], **rest: Any) -> DatasetDict:
    """The one best answer among false ones (Lin et al. 2022, https://arxiv.org/abs/2109.07958)."""
    return _truthfulqa(data_dir, files, "mc1_targets")


def truthfulqa_mc2(data_dir: str, files: list[str], **rest: Any) -> DatasetDict:
    """All true answers among all false ones; ``labels`` says which are true."""
    return _truthfulqa(data_dir, files, "mc2_targets")


def _truthfulqa(data_dir: str, files: list[str], targets: str) -> DatasetDict:
    rows = []
    for data, origin in read_rows(data_dir, files[0], {"question": str, targets: dict}):
        choices, labels = data[targets].get("choices"), data[targets].get("labels")
        if not choices or not labels or len(choices) != len(labels) or 1 not in labels:
            raise UserError(
                f"{origin}: field {targets!r} wants choices, and as many labels, one of them 1"
            )
        # A text of no words has no likelihood; there is one among the Spanish ones.
        pairs = [(text, label) for text, label in zip(choices, labels, strict=True) if text.strip()]
        pairs = turned(pairs, data["question"])
        true = [label for _, label in pairs]
        rows.append(
            {
                "question": data["question"],
                "choices": [text for text, _ in pairs],
                "labels": true,
                "answer": true.index(1),
            }
        )
    return as_dataset(test=rows)


def true_share(doc: Row, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """TruthfulQA's MC2: the probability of the true answers among all of them.

    acc = sum over true answers of p / sum over all answers of p.

    Args:
        doc: A document with ``labels``.
        results: Log-likelihood of each choice, and whether it is what greedy search says.
    """
    logs = [log for log, _ in results]
    highest = max(logs)  # all of them may be too small for exp
    shares = [math.exp(log - highest) for log in logs]
    true = sum(share for share, label in zip(shares, doc["labels"], strict=True) if label == 1)
    return {"acc": true / sum(shares)}


def blimp(data_dir: str, files: list[str], **rest: Any) -> DatasetDict:
    """A sentence and one that breaks a rule (Warstadt et al. 2020, https://arxiv.org/abs/1912.00582)."""
    fields = {"sentence_good": str, "sentence_bad": str, "UID": str}
    rows = []
    for data, _ in read_rows(data_dir, files[0], fields):
        good = data["sentence_good"]
        choices = turned([good, data["sentence_bad"]], good)
        rows.append({"choices": choices, "answer": choices.index(good), "subset": data["UID"]})
    return as_dataset(test=rows)


def big_bench(data_dir: str, files: list[str], **rest: Any) -> DatasetDict:
    """A question and scored answers, one of which is right (https://arxiv.org/abs/2206.04615)."""
    rows = []
    for data, origin in read_rows(data_dir, files[0], {"input": str, "target_scores": dict}):
        # Some begin with a space, where the harness adds one.
        scores = {choice.strip(): score for choice, score in data["target_scores"].items()}
        if list(scores.values()).count(1) != 1:
            raise UserError(f"{origin}: field 'target_scores' wants one answer of score 1")
        if not all(scores):
            continue  # CryoBiology has two with an answer of no words, which has no likelihood
        choices = turned(list(scores), data["input"])
        answer = next(place for place, choice in enumerate(choices) if scores[choice] == 1)
        rows.append({"question": data["input"].strip(), "choices": choices, "answer": answer})
    return as_dataset(test=rows)


def turned(choices: list[Any], name: str) -> list[Any]:
    """Choices that are scored one by one, begun at another place, always the same for a name.

    Of equal scores the harness takes the first, and in some files that is always the right one.
    """
    start = stable_hash(name, "first") % len(choices)
    return [*choices[start:], *choices[:start]]


def _number(value: int, below: int, field: str, origin: str) -> int:
    if not 0 <= value < below:
        raise UserError(f"{origin}: field {field!r} is {value}, not from 0 to {below - 1}")
    return value
