"""What can be said of written answers without knowing what is right: do they repeat, do they end.

Legend: words are white space apart where they are counted, and runs of letters and digits, or
single punctuation marks, in lower case, where n-grams are looked at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from lit_llm.evaluation.responses import repetition
from lit_llm.evaluation.results import Answer, Better, Items, Measurement, Scale, measure

OwnScore = tuple[float, int]
"""Negative log-likelihood of an answer in nats, and its tokens."""


def coherence_measurements(
    task: str, answers: Sequence[Answer], own_scores: Sequence[OwnScore] | None = None
) -> list[Measurement]:
    """Measure written answers.

    - ``repetition``: mean share of an answer's 3-grams of words that it has said before
      (:func:`lit_llm.evaluation.responses.repetition`); lower is better.
    - ``distinct_1``, ``distinct_2``: mean share of an answer's words and pairs of words that are
      different ones (Li et al. 2016, https://arxiv.org/abs/1510.03055, who take all answers
      together: that is ``corpus_distinct_1`` and ``corpus_distinct_2``); higher is better. A longer
      text says more words again, so they compare answers of about the same length only.
    - ``self_perplexity``: exp of the mean negative log-likelihood per token of the answers under
      the model that wrote them. A low one is no merit: a loop has the lowest. It only describes.
    - ``words``: mean words of an answer; it only describes.
    - ``stop_rate``: share of answers that end by themselves, where that is known; higher is better.
    - ``empty_rate``: share of answers without anything but white space; lower is better.

    None of them knows whether an answer is true or to the point, and a writing without spaces makes
    one word of many.

    Args:
        task: Name of the task.
        answers: What the model wrote.
        own_scores: What the model gives its own answers, in their order; tokens are 0 for none.

    Returns:
        The measurements; none of what no answer says anything about.

    Raises:
        ValueError: There is not one score an answer.
    """
    if own_scores is not None and len(own_scores) != len(answers):
        raise ValueError(f"{len(own_scores)} scores for {len(answers)} answers")
    keys = [answer.item for answer in answers]
    texts = [_words(answer.answer) for answer in answers]
    found: list[Measurement] = []

    def add(
        metric: str,
        values: Sequence[float | None],
        better: Better | None,
        weights: Sequence[float] | None = None,
        scale: Scale = "mean",
    ) -> None:
        weights = [1.0] * len(values) if weights is None else weights
        rows = [
            (key, float(value), float(weight))
            for key, value, weight in zip(keys, values, weights, strict=True)
            if value is not None and weight > 0
        ]
        if rows:
            own = Items(*(list(column) for column in zip(*rows, strict=True)))
            found.append(measure(task, metric, own, better=better, scale=scale))

    add("repetition", [repetition(text) for text in texts], "lower")
    for n in (1, 2):
        # Of an answer that is too short to have any, nothing is known.
        distinct = [1 - repetition(text, n) if len(text) >= n else None for text in texts]
        add(f"distinct_{n}", distinct, "higher")
    for n in (1, 2):
        found.extend(_corpus_distinct(task, texts, n))
    if own_scores is not None:
        losses, tokens = [score[0] for score in own_scores], [score[1] for score in own_scores]
        add("self_perplexity", losses, None, weights=tokens, scale="exp")
    add("words", [len(answer.answer.split()) for answer in answers], None)
    add("stop_rate", [answer.stopped for answer in answers], "higher")
    add("empty_rate", [not answer.answer.strip() for answer in answers], "lower")
    return found


def _corpus_distinct(task: str, texts: Sequence[Sequence[int]], n: int) -> list[Measurement]:
    """Over all answers: low where every answer is the same, which no single answer shows.

    It falls with every answer that is added, so it is no mean, has no interval and no direction.
    """
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    if not grams:
        return []
    value = len(set(grams)) / len(grams)
    metric = f"corpus_distinct_{n}"
    return [Measurement(task, metric, value, math.nan, math.nan, len(texts), better=None)]


def _words(text: str) -> list[int]:
    """Words as numbers, which are equal where the words are, in one process."""
    return [hash(word) for word in re.findall(r"\w+|[^\w\s]", text.lower())]
