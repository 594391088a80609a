"""Short answers that the model writes: XQuAD and facts of Wikidata."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING, Any

from lit_llm.errors import UserError
from lit_llm.evaluation.tasks.reading import Row, as_dataset, read_rows

if TYPE_CHECKING:
    from datasets import DatasetDict

_ARTICLES = {"en": r"\b(a|an|the)\b", "es": r"\b(un|una|unos|unas|el|la|los|las)\b"}
_CLAUSE_END = re.compile(r"[.,;:!?\n(](?:\s|$)|\n")


def xquad(data_dir: str, files: list[str], language: str, **rest: Any) -> DatasetDict:
    """A passage and a question that it answers (Artetxe et al. 2020, https://arxiv.org/abs/1910.11856)."""
    rows = []
    fields = {"context": str, "question": str, "answers": dict}
    for data, origin in read_rows(data_dir, files[0], fields):
        answers = data["answers"].get("text")
        if not isinstance(answers, list) or not answers:
            raise UserError(f"{origin}: field 'answers' wants a list 'text' of at least one answer")
        rows.append(
            {
                "context": data["context"],
                "question": data["question"],
                "targets": answers,
                "language": language,
            }
        )
    return as_dataset(test=rows)


def answer_overlap(doc: Row, results: list[str]) -> dict[str, float]:
    """SQuAD's exact match and F1 over words, the best over the accepted answers.

    Both texts in lower case, without punctuation of any script and without the articles of their
    language (as in https://arxiv.org/abs/1910.07475). Rajpurkar et al. 2016,
    https://arxiv.org/abs/1606.05250.

    Args:
        doc: A document with ``targets`` and ``language``.
        results: What the model wrote.
    """
    answer = words(results[0], doc["language"])
    targets = [words(target, doc["language"]) for target in doc["targets"]]
    return {
        "exact_match": float(answer in targets),
        "f1": max(_f1(answer, target) for target in targets),
    }


def wikidata(data_dir: str, files: list[str], **rest: Any) -> DatasetDict:
    """The beginning of a sentence that states a fact (BIG-bench, https://arxiv.org/abs/2206.04615)."""
    rows = []
    for data, origin in read_rows(data_dir, files[0], {"input": str, "target": (str, list)}):
        target = data["target"]
        targets = target if isinstance(target, list) else [target]
        if not targets or not all(isinstance(own, str) and words(own) for own in targets):
            raise UserError(f"{origin}: field 'target' wants a text or a list of texts")
        rows.append({"input": data["input"].strip(), "targets": targets})
    return as_dataset(test=rows)


def fact_match(doc: Row, results: list[str]) -> dict[str, float]:
    """Whether the sentence goes on with an accepted answer.

    ``prefix_match``: its first words are those of an answer. ``exact_match``: so is the whole of
    its first clause. Articles count for nothing, but where they are the answer (blood type A).

    Args:
        doc: A document with ``targets``.
        results: What the model wrote.
    """
    text = results[0].strip()
    clause = _CLAUSE_END.split(text, maxsplit=1)[0]
    found = {"prefix_match": 0.0, "exact_match": 0.0}
    for language in (None, "en"):
        written, first = words(text, language), words(clause, language)
        for target in filter(None, (words(target, language) for target in doc["targets"])):
            found["prefix_match"] = max(found["prefix_match"], written[: len(target)] == target)
            found["exact_match"] = max(found["exact_match"], first == target)
    return {name: float(value) for name, value in found.items()}


def words(text: str, language: str | None = None) -> list[str]:
    """The words of a text without case and punctuation, nor the articles of a language."""
    plain = "".join(c for c in text.lower() if not unicodedata.category(c).startswith("P"))
    return re.sub(_ARTICLES[language], " ", plain).split() if language else plain.split()


def _f1(answer: list[str], target: list[str]) -> float:
    if not answer or not target:
        return float(answer == target)
    shared = sum((Counter(answer) & Counter(target)).values())
    return 2 * shared / (len(answer) + len(target))
