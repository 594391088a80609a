"""Shares and differences of pairs with intervals that count prompts, and correlations.

Shapes: P pairs, of which several may belong to one prompt. Those are not independent: a prompt that
is easy is easy for all its pairs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_Z = 1.959964  # 95 % of a normal distribution lie within so many standard deviations


@dataclass(frozen=True)
class Rate:
    """A share of pairs with its 95 % interval.

    Attributes:
        value: The share.
        low: Lower end of the interval.
        high: Upper end of the interval.
        pairs: Pairs counted.
        prompts: Prompts they belong to.
        effective: How many independent pairs would say as much.
    """

    value: float
    low: float
    high: float
    pairs: int
    prompts: int
    effective: float


@dataclass(frozen=True)
class Difference:
    """Mean difference of two values of each pair, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Band:
    """Pairs of which a value lies in [low, high]."""

    low: float
    high: float
    accuracy: Rate


def rate(correct: Tensor, prompts: Tensor) -> Rate:
    """Share of pairs with its 95 % interval by Wilson (1927), for pairs that share prompts.

    Wilson's interval takes the number of independent pairs. With several pairs a prompt this is the
    effective number P / design effect (Kish 1965; Rao and Scott 1992, "A simple method for the
    analysis of clustered binary data", https://doi.org/10.2307/2532311). The design effect is the
    variance of the share over prompts, k / (k - 1) · Σ_i (y_i - p n_i)² / P², divided by that of
    independent pairs, p (1 - p) / P, where prompt i of k has n_i pairs, y_i of them right. The
    effective number is kept between P² / Σ_i n_i², which is right where the pairs of a prompt are
    all alike, and P; it is the former where all pairs or none are right, which shows no variance.
    With one pair a prompt this is plain Wilson.

    Args:
        correct: 1 for right, 0.5 for a tie, 0 for wrong, (P,); at least one.
        prompts: Number of each pair's prompt, (P,) long.
    """
    share, variance, clusters = _clustered_mean(correct, prompts)
    pairs = len(correct)
    sizes = torch.unique(prompts, return_counts=True)[1].double()
    fewest = float(pairs**2 / sizes.square().sum())
    effective = fewest
    if 0 < share < 1 and clusters > 1:
        # P / design effect; equal shares of all prompts are as good as pairs can be.
        effective = share * (1 - share) / variance if variance > 0 else float(pairs)
        effective = min(max(effective, fewest), pairs)
    low, high = wilson_interval(share, effective)
    return Rate(share, low, high, pairs, clusters, effective)


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """95 % interval of a share of ``count`` independent trials (Wilson 1927).

    https://doi.org/10.1080/01621459.1927.10502953. Unlike share ± 2 standard errors it stays within
    [0, 1] and holds for small counts and shares near 0 and 1.

    Args:
        share: The share, in [0, 1].
        count: The number of trials, above 0; need not be whole.
    """
    square = _Z**2 / count
    middle = (share + square / 2) / (1 + square)
    half = _Z * math.sqrt(share * (1 - share) / count + square / count / 4) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(first: Tensor, second: Tensor, prompts: Tensor) -> Difference:
    """Mean of ``first - second`` over pairs with its 95 % interval.

    Both are of the same pairs, so what makes a pair hard for both cancels. The interval is a normal
    approximation with the variance over prompts: a bootstrap over prompts comes to the same where
    there are enough prompts to say anything, but needs a generator and more time.

    Args:
        first: (P,), at least one.
        second: (P,).
        prompts: Number of each pair's prompt, (P,) long.

    Returns:
        The difference; with one prompt only, its interval is all of [-1, 1].
    """
    mean, variance, clusters = _clustered_mean(first - second, prompts)
    if clusters < 2:
        return Difference(mean, -1.0, 1.0)
    half = _Z * math.sqrt(variance)
    return Difference(mean, max(-1.0, mean - half), min(1.0, mean + half))


def rates_by(correct: Tensor, prompts: Tensor, groups: Sequence[str]) -> dict[str, Rate]:
    """Accuracy of each group of pairs, groups in order of their names.

    Args:
        correct: 1 for right, 0.5 for a tie, 0 for wrong, (P,).
        prompts: Number of each pair's prompt, (P,) long.
        groups: Name of the group of each pair.
    """
    found = {}
    for name in sorted(set(groups)):
        chosen = torch.tensor([group == name for group in groups])
        found[name] = rate(correct[chosen], prompts[chosen])
    return found


def rates_by_quantile(
    correct: Tensor, prompts: Tensor, values: Tensor, count: int = 5
) -> list[Band]:
    """Accuracy of equal shares of the pairs, by the size of a value; equal values stay together.

    Args:
        correct: 1 for right, 0.5 for a tie, 0 for wrong, (P,).
        prompts: Number of each pair's prompt, (P,) long.
        values: What the pairs are ordered by, (P,), finite.
        count: Number of shares.
    """
    ordered = values.sort().values
    cuts = [ordered[len(ordered) * i // count] for i in range(1, count)] if len(ordered) else []
    band = torch.zeros(len(values), dtype=torch.long)
    for cut in cuts:
        band += values >= cut
    bands = []
    for number in band.unique().tolist():
        chosen = band == number
        low, high = float(values[chosen].min()), float(values[chosen].max())
        bands.append(Band(low, high, rate(correct[chosen], prompts[chosen])))
    return bands


def pearson(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation of two (N,) tensors; 0 where one is constant."""
    x, y = (values.double() - values.double().mean() for values in (first, second))
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm > 0 else 0.0


def spearman(first: Tensor, second: Tensor) -> float:
    """Spearman's correlation of two (N,) tensors: Pearson's of ranks; equal values share a rank."""
    return pearson(_ranks(first), _ranks(second))


def sign_test(ups: int, downs: int) -> float:
    """Two-sided p-value of so many ups and downs where both are equally probable."""
    total, fewer = ups + downs, min(ups, downs)
    if 2 * fewer == total:
        return 1.0
    steps = np.arange(1, fewer + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log((total - steps + 1) / steps))])
    return min(1.0, 2 * float(np.exp(logs - total * math.log(2)).sum()))


def student_p(t: float, freedom: int) -> float:
    """Two-sided p-value of Student's t.

    With t = sqrt(freedom) tan(angle), its density is a power of the cosine, which is summed.

    Args:
        t: The statistic.
        freedom: Degrees of freedom, at least 1.
    """
    angles = np.linspace(math.atan(abs(t) / math.sqrt(freedom)), math.pi / 2, 20_001)
    heights = np.cos(angles).clip(0) ** (freedom - 1)
    area = (heights.sum() - (heights[0] + heights[-1]) / 2) * (angles[1] - angles[0])
    logs = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    return min(1.0, 2 / math.sqrt(math.pi) * math.exp(logs) * float(area))


def _clustered_mean(values: Tensor, prompts: Tensor) -> tuple[float, float, int]:
    """Mean over pairs, its variance over prompts, and how many prompts there are."""
    number = torch.unique(prompts, return_inverse=True)[1]
    clusters = int(number.max()) + 1
    mean = values.double().mean()
    residuals = torch.zeros(clusters, dtype=torch.float64)
    residuals.index_add_(0, number, values.double() - mean)
    correction = clusters / max(1, clusters - 1)
    return float(mean), float(correction * residuals.square().sum() / len(values) ** 2), clusters


def _ranks(values: Tensor) -> Tensor:
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts.double() - 1) / 2)[place]
