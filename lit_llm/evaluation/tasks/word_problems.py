"""Arithmetic in words: GSM8K, SVAMP and MultiArith, all as questions in the form of GSM8K.

GSM8K (Cobbe et al. 2021, https://arxiv.org/abs/2110.14168) ends its answers with ``#### NUMBER``;
its training problems are the examples of all three, so that one rule reads all answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_llm.errors import UserError
from lit_llm.evaluation.tasks.reading import Fields, Row, as_dataset, read_rows

if TYPE_CHECKING:
    from datasets import DatasetDict


def gsm8k(data_dir: str, files: list[str], **rest: Any) -> DatasetDict:
    """School problems in several steps, and the training problems as examples."""
    return as_dataset(test=_gsm8k(data_dir, files[0]), train=_gsm8k(data_dir, files[1]))


def _gsm8k(data_dir: str, name: str) -> list[Row]:
    rows = []
    for data, origin in read_rows(data_dir, name, {"question": str, "answer": str}):
        if "####" not in data["answer"]:
            raise UserError(f"{origin}: field 'answer' does not end with '#### NUMBER'")
        rows.append({"question": data["question"], "answer": data["answer"]})
    return rows


def svamp(data_dir: str, files: list[str], **rest: Any) -> DatasetDict:
    """One-step problems told in a misleading way (Patel et al. 2021, https://arxiv.org/abs/2103.07191)."""
    fields: Fields = {"Body": str, "Question": str, "Answer": (float, int), "Type": str}
    rows = []
    for data, _ in read_rows(data_dir, files[0], fields):
        body = data["Body"].strip()
        rows.append(
            {
                # A third of them lack the full stop between what is told and what is asked.
                "question": f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} "
                f"{data['Question'].strip()}",
                "answer": f"#### {data['Answer']:g}",
                "subset": data["Type"].replace("Divison", "Division"),
            }
        )
    return as_dataset(test=rows, train=_gsm8k(data_dir, files[1]))


def multiarith(data_dir: str, files: list[str], **rest: Any) -> DatasetDict:
    """Problems in two steps (Roy and Roth 2015, https://aclanthology.org/D15-1202)."""
    rows = []
    for data, origin in read_rows(data_dir, files[0], {"sQuestion": str, "lSolutions": list}):
        if len(data["lSolutions"]) != 1:
            raise UserError(f"{origin}: field 'lSolutions' wants one number")
        rows.append(
            {
                "question": data["sQuestion"].strip(),
                "answer": f"#### {data['lSolutions'][0]:g}",
            }
        )
    return as_dataset(test=rows, train=_gsm8k(data_dir, files[1]))
