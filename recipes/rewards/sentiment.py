"""A reward function of your own, by example: how positive a text is, judged by a small classifier.

The classifier is a logistic regression on words and pairs of words, trained in about a second on
any file of records ``{"text": ..., "label": 0 or 1}`` (reviews, say). One half of the records, by
the hash of their text, trains the judge that the policy learns from, the other half a second judge
that it never sees: while both scores rise, the texts do get more positive; when the first rises
alone, the policy has found the weak spots of its judge.

    model:
      rewards:
        - function: recipes/rewards/sentiment.py:positive
          options: {data: reviews.jsonl.gz}
      judges:
        - function: recipes/rewards/sentiment.py:positive
          options: {data: reviews.jsonl.gz, part: judge}
          name: other_half
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from lit_llm.data.record_formats import text_of
from lit_llm.data.records import RecordSource, read_records
from lit_llm.data.splits import split_position
from lit_llm.errors import UserError
from lit_llm.rollout.rewards import RewardSample

LABELS = {"0": 0, "1": 1, "False": 0, "True": 1}
PARTS = ("reward", "judge")
_WORDS = re.compile(r"\w+(?:['’]\w+)*|[!?]")


def positive(
    samples: Sequence[RewardSample], data: str, part: str = "reward", clip: float = 5.0
) -> list[float]:
    """Log-odds that a text is positive: above 0 rather positive, below 0 rather not.

    Judged is a continued text as a whole, and of a conversation the response.

    Args:
        samples: The samples.
        data: File with the records: .jsonl, .json, .csv or .parquet, also with .gz or .zst.
        part: ``reward`` or ``judge``: which half of the records has trained the classifier.
        clip: Largest score, and with a minus the smallest.

    Returns:
        One score a sample.

    Raises:
        UserError: The records cannot be read, or an option makes no sense.
    """
    if part not in PARTS:
        raise UserError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    if not clip > 0:
        raise UserError(f"clip must be above 0, got {clip}")
    judge = trained_judge(data, part)
    texts = [
        sample.prompt + sample.response if sample.messages is None else sample.response
        for sample in samples
    ]
    return [min(max(judge.log_odds(text), -clip), clip) for text in texts]


class Judge:
    """A logistic regression on the words and pairs of words of a text, each counted once.

    A text's features have the length 1, so a longer text does not get a larger score for it.

    Args:
        texts: What to learn from.
        labels: 0 or 1 for each.
        decay: Strength of the pull of the weights towards 0, divided by the number of texts.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[int], decay: float = 0.2) -> None:
        counts = Counter(feature for text in texts for feature in features(text))
        known = (feature for feature, count in sorted(counts.items()) if count > 1)
        self.numbers = {feature: number for number, feature in enumerate(known)}
        self.weights = np.zeros(len(self.numbers))
        self.bias = 0.0
        self._fit([self._row(text) for text in texts], np.array(labels, float), decay)

    def log_odds(self, text: str) -> float:
        """Log-odds that the label of a text is 1, in nats."""
        row = self._row(text)
        return float(self.weights[row].sum() / max(len(row), 1) ** 0.5 + self.bias)

    def accuracy(self, texts: Sequence[str], labels: Sequence[int]) -> float:
        """Share of texts with the right sign."""
        guesses = [self.log_odds(text) > 0 for text in texts]
        return float(np.mean(np.equal(guesses, labels)))

    def _row(self, text: str) -> np.ndarray:
        numbers = [self.numbers[feature] for feature in features(text) if feature in self.numbers]
        return np.array(sorted(numbers), int)

    def _fit(self, rows: list[np.ndarray], labels: np.ndarray, decay: float) -> None:
        """Nesterov's accelerated gradient descent on the mean loss, which is smooth and convex."""
        sizes = np.array([len(row) for row in rows])
        words, texts = np.concatenate(rows), np.repeat(np.arange(len(rows)), sizes)
        values = 1 / np.sqrt(sizes[texts])
        decay /= len(rows)
        # The curvature of the loss is at most 1/4 of the length of the features, 1, and the bias.
        step = 1 / (0.25 * 2 + decay)
        point = np.zeros(len(self.weights) + 1)
        last = point
        for number in range(300):
            ahead = point + number / (number + 3) * (point - last)
            logits = np.bincount(texts, values * ahead[words], len(rows)) + ahead[-1]
            error = (1 / (1 + np.exp(-logits)) - labels) / len(rows)
            gradient = np.append(
                np.bincount(words, values * error[texts], len(self.weights)), error.sum()
            )
            gradient[:-1] += decay * ahead[:-1]
            last, point = point, ahead - step * gradient
        self.weights, self.bias = point[:-1], float(point[-1])


@cache
def trained_judge(data: str, part: str) -> Judge:
    """The judge of one half of the records; tells how often it is right about the other half."""
    halves: dict[str, tuple[list[str], list[int]]] = {name: ([], []) for name in PARTS}
    for text, label in read_labelled(data):
        # Another seed than that of the splits, so that each half has its share of all of them.
        texts, labels = halves[PARTS[split_position(text, seed=1) < 0.5]]
        texts.append(text)
        labels.append(label)
    if any(len(set(labels)) < 2 for _, labels in halves.values()):
        raise UserError(f"{data}: too few records; either half needs texts of both labels")
    own, others = halves.pop(part), halves.popitem()[1]
    judge = Judge(*own)
    rank_zero_info(
        f"sentiment: the {part} half ({len(own[0]):,} texts) trained a judge that is right about "
        f"{judge.accuracy(*others):.1%} of the other half ({len(others[0]):,} texts)"
    )
    return judge


def read_labelled(data: str) -> Iterator[tuple[str, int]]:
    """Texts with their labels, 0 or 1."""
    for record, origin in read_records(RecordSource(data)):
        label = LABELS.get(str(record.get("label")))
        if label is None:
            raise UserError(f"{origin}: the label must be 0 or 1, not {record.get('label')!r}")
        yield text_of(record, "text", origin), label


def features(text: str) -> set[str]:
    """Words and pairs of words, in lower case."""
    words = _WORDS.findall(text.lower())
    return {*words, *map(" ".join, pairwise(["<", *words, ">"]))}
