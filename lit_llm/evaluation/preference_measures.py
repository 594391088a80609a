"""How good scores of answers are: accuracy with intervals, calibration, and what length explains.

Shapes: P pairs of a better and a worse answer, of which several may belong to one prompt.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lit_llm.evaluation.intervals import (
    Band,
    Difference,
    Rate,
    paired_difference,
    pearson,
    rate,
    rates_by,
    rates_by_quantile,
    spearman,
)


@dataclass(frozen=True)
class ScoredPairs:
    """Scores of held-out pairs, on the CPU, one entry a pair, in one fixed order.

    Attributes:
        better: Scores of the better answers, (P,) float, as the model gives them: calibration is
            about these, not about standardised ones.
        worse: Scores of the worse answers, (P,) float.
        better_length: Tokens of the better answers, (P,) long.
        worse_length: Tokens of the worse answers, (P,) long.
        source: Number of the source, (P,) long.
        row: Which prompt of the source, (P,) long.
        index: Which pair of the prompt, (P,) long.
        margin: Annotated margin, (P,) float; 0 where there is none.
        group: A number that pairs of one prompt share, (P,) long, also where the prompt stands in
            several rows; by default every row is a prompt of its own.
        agreement: Share of the heads that prefer the better answer, (P,) float; None for one head.
    """

    better: Tensor
    worse: Tensor
    better_length: Tensor
    worse_length: Tensor
    source: Tensor
    row: Tensor
    index: Tensor
    margin: Tensor
    group: Tensor | None = None
    agreement: Tensor | None = None

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.better)

    def select(self, chosen: Tensor) -> "ScoredPairs":
        """The pairs where ``chosen``, (P,) bool, is true."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        kept = {name: part[chosen] for name, part in parts.items() if part is not None}
        return ScoredPairs(**kept)

    @property
    def correct(self) -> Tensor:
        """1 where the better answer has the higher score, 0.5 at a tie, else 0; (P,) double."""
        return _compare(self.better, self.worse)

    @property
    def prompts(self) -> Tensor:
        """A number for the prompt of each pair, (P,) long."""
        rows = torch.stack([self.source, self.row], dim=1)
        told = rows if self.group is None else self.group[:, None]
        number: Tensor = torch.unique(told, dim=0, return_inverse=True)[1]
        return number


@dataclass(frozen=True)
class ConfidenceBin:
    """Pairs of which the confidence lies in (low, high]: mean confidence against accuracy."""

    low: float
    high: float
    confidence: float
    accuracy: Rate


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy.

    Attributes:
        ece: Expected calibration error, in [0, 1].
        confidence: Mean confidence.
        accuracy: Accuracy of the same pairs.
        bins: Bins that hold pairs.
    """

    ece: float
    confidence: float
    accuracy: float
    bins: list[ConfidenceBin]


@dataclass(frozen=True)
class Length:
    """What the length of an answer has to do with its score.

    Attributes:
        pearson: Correlation of score and tokens of the answer, over all answers of the pairs.
        spearman: The same of their ranks.
        judge: What the length-only judge prefers, ``"longer"`` or ``"shorter"``: what is right more
            often in the training pairs.
        judge_accuracy: Its accuracy on the held-out pairs; equal lengths count one half.
        advantage: Accuracy of the model less that of the judge, on the same pairs.
        longer_by_model: Over the pairs with different lengths, the mean probability that the scores
            give to the longer answer to be the better one, sigmoid(its score - the other's); 0.5
            where there are none. A calibrated model that may use length has that of the data.
        longer_by_data: Share of these pairs in which the longer answer is the better one.
        lean: The first less the second: how much more the model leans to length than the data.
    """

    pearson: float
    spearman: float
    judge: str
    judge_accuracy: Rate
    advantage: Difference
    longer_by_model: float
    longer_by_data: float
    lean: Difference


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation and range of finite scores, and how many were not finite."""

    mean: float
    std: float
    least: float
    most: float
    not_finite: int


@dataclass(frozen=True)
class PairMeasures:
    """All that is measured on one set of pairs.

    Attributes:
        accuracy: Share of pairs in which the better answer has the higher score.
        by_source: The same for each source.
        by_length: The same where the better answer is the longer one, as long, the shorter one.
        by_difference: The same for five equal shares of the pairs, by |difference of the scores|.
        by_margin: The same by annotated margin; empty without.
        calibration: Confidence against accuracy.
        length: What length has to do with it.
        scores: All scores.
        better: Scores of the better answers.
        worse: Scores of the worse answers.
        heads_disagree: Share of pairs of which the heads do not all prefer the same answer; None
            for one head.
    """

    accuracy: Rate
    by_source: dict[str, Rate]
    by_length: dict[str, Rate]
    by_difference: list[Band]
    by_margin: list[Band]
    calibration: Calibration
    length: Length
    scores: Spread
    better: Spread
    worse: Spread
    heads_disagree: float | None


def measure_pairs(
    pairs: ScoredPairs, train_lengths: Tensor, labels: Sequence[str], bins: int = 10
) -> PairMeasures:
    """Measure the scores of held-out pairs.

    A pair with a score that is not finite counts as wrong; calibration and correlations leave it
    out.

    Args:
        pairs: At least one pair.
        train_lengths: Tokens of the better and the worse answers of the training pairs, (Q, 2).
        labels: Names of the sources.
        bins: Bins of confidence.
    """
    prompts, correct = pairs.prompts, pairs.correct
    gaps = (pairs.better - pairs.worse).double().abs()
    finite = gaps.isfinite()
    agreement = pairs.agreement
    lengths = _compare(pairs.better_length, pairs.worse_length)
    names = ("better is shorter", "both are as long", "better is longer")
    scores = torch.cat([pairs.better, pairs.worse])
    return PairMeasures(
        accuracy=accuracy_interval(pairs),
        by_source=rates_by(correct, prompts, [labels[one] for one in pairs.source.tolist()]),
        by_length=rates_by(correct, prompts, [names[int(2 * one)] for one in lengths]),
        by_difference=rates_by_quantile(correct[finite], prompts[finite], gaps[finite]),
        by_margin=rates_by_quantile(correct, prompts, pairs.margin.double())
        if bool(pairs.margin.any())
        else [],
        calibration=calibrate(gaps[finite], correct[finite], prompts[finite], bins),
        length=_measure_length(pairs, train_lengths),
        scores=_spread(scores),
        better=_spread(pairs.better),
        worse=_spread(pairs.worse),
        heads_disagree=None
        if agreement is None
        else float(((agreement > 0) & (agreement < 1)).double().mean()),
    )


def accuracy_interval(pairs: ScoredPairs) -> Rate:
    """Share of pairs in which the better answer has the higher score; ties count one half."""
    return rate(pairs.correct, pairs.prompts)


def calibrate(gaps: Tensor, correct: Tensor, prompts: Tensor, bins: int = 10) -> Calibration:
    """Compare how sure the scores are with how often they are right.

    By the Bradley-Terry model the higher-scored answer is the better one with probability
    sigmoid(|difference|), in [0.5, 1], which ``bins`` bins of equal width divide. ECE is
    Σ_b (P_b / P) |accuracy_b - mean confidence_b| (Guo et al. 2017, "On Calibration of Modern
    Neural Networks", https://arxiv.org/abs/1706.04599, eq. 3).

    Args:
        gaps: |Difference of the scores|, (P,), finite.
        correct: 1 for right, 0.5 for a tie, 0 for wrong, (P,).
        prompts: Number of each pair's prompt, (P,) long.
        bins: Number of bins.
    """
    if not len(gaps):
        return Calibration(math.nan, math.nan, math.nan, [])
    confidence = gaps.double().sigmoid()
    # ceil - 1: the upper end belongs to a bin, and 0.5 to the first.
    place = ((confidence - 0.5) * 2 * bins).ceil().long().sub(1).clamp(0, bins - 1)
    found, error = [], 0.0
    for number in range(bins):
        chosen = place == number
        if not bool(chosen.any()):
            continue
        low, high = 0.5 + number / bins / 2, 0.5 + (number + 1) / bins / 2
        mean, right = float(confidence[chosen].mean()), rate(correct[chosen], prompts[chosen])
        found.append(ConfidenceBin(low, high, mean, right))
        error += right.pairs / len(gaps) * abs(right.value - mean)
    return Calibration(error, float(confidence.mean()), float(correct.mean()), found)


def _measure_length(pairs: ScoredPairs, train_lengths: Tensor) -> Length:
    correct, prompts = pairs.correct, pairs.prompts
    scores = torch.cat([pairs.better, pairs.worse])
    tokens = torch.cat([pairs.better_length, pairs.worse_length])
    finite = scores.isfinite()
    trained = _compare(train_lengths[:, 0], train_lengths[:, 1])
    judge = "shorter" if len(trained) and float(trained.mean()) < 0.5 else "longer"
    longer = _compare(pairs.better_length, pairs.worse_length)
    judged = longer if judge == "longer" else 1 - longer
    gaps = (pairs.better - pairs.worse).double()
    differ = (longer != 0.5) & gaps.isfinite()
    by_data = longer[differ]
    by_model = (gaps[differ] * (2 * by_data - 1)).sigmoid()
    return Length(
        pearson(scores[finite], tokens[finite]),
        spearman(scores[finite], tokens[finite]),
        judge,
        rate(judged, prompts),
        paired_difference(correct, judged, prompts),
        float(by_model.mean()) if len(by_model) else 0.5,
        float(by_data.mean()) if len(by_data) else 0.5,
        paired_difference(by_model, by_data, prompts[differ])
        if len(by_model)
        else Difference(0.0, 0.0, 0.0),
    )


def _compare(first: Tensor, second: Tensor) -> Tensor:
    """1 where the first is greater, 0.5 where they are equal, else (also for NaN) 0."""
    return (first > second).double() + 0.5 * (first == second).double()


def _spread(scores: Tensor) -> Spread:
    finite = scores[scores.isfinite()].double()
    lost = len(scores) - len(finite)
    if not len(finite):
        return Spread(math.nan, math.nan, math.nan, math.nan, lost)
    mean, std = float(finite.mean()), float(finite.std(correction=0))
    return Spread(mean, std, float(finite.min()), float(finite.max()), lost)
