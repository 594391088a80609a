"""Whether a reward model is fit to drive PPO, and why, in sentences with their numbers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lit_llm.evaluation.intervals import Rate
from lit_llm.evaluation.preference_measures import PairMeasures

# The interval of fewer pairs is wider than ± 10 points: it does not tell 60 % from chance.
FEWEST_PAIRS = 100
# What a coin gets: PPO would maximise noise, and below it the opposite of what is wanted.
CHANCE = 0.5
# PPO maximises differences of scores, so their size has to mean something. With 100 pairs in ten
# bins a perfectly calibrated model shows an ECE of 0.1, and of more than 0.15 once in fifty times.
LARGEST_ECE = 0.15
# A quarter of the variance of the ranks: beyond it PPO finds length before it finds quality
# (Singhal et al. 2023, "A Long Way to Go", https://arxiv.org/abs/2310.03716).
LARGEST_LENGTH_CORRELATION = 0.5
# An interval from the variance over prompts needs so many of them before it can be trusted.
FEWEST_PROMPTS = 30
# Of fewer pairs of a kind the interval nearly always reaches the coin, which says nothing of it.
FEWEST_OF_KIND = 30
# Scores whose standard deviation is so small a part of their size differ by rounding only.
SMALLEST_SPREAD = 1e-6


@dataclass(frozen=True)
class Verdict:
    """Whether a reward model is fit to drive PPO.

    Attributes:
        fit: Whether it is.
        reasons: Why it is, or what keeps it from being: one sentence each.
        cautions: What else to know before it is used: one sentence each.
    """

    fit: bool
    reasons: list[str]
    cautions: list[str]

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        return f"Reward model: {'fit' if self.fit else 'NOT fit'} to drive PPO"


@dataclass(frozen=True)
class _Finding:
    text: str
    passed: bool | None  # None: a caution


def judge(
    test: PairMeasures,
    ood: PairMeasures | None = None,
    kinds: Mapping[str, Rate] | None = None,
    *,
    has_statistics: bool = True,
    held_out: int | None = None,
) -> Verdict:
    """Judge a reward model by its measures.

    Args:
        test: Measures on held-out pairs.
        ood: Measures on a second set, of another distribution; None when there is none.
        kinds: Accuracy of each kind of held-out pairs, where the data name kinds.
        has_statistics: Whether mean and standard deviation of the scores are kept with the model.
        held_out: How many held-out pairs there are, of which ``test`` may be a part; ``None`` when
            it is all of them.

    Returns:
        The verdict: fit only when every check is passed.
    """
    findings = [
        *_accuracy(test),
        *_part(test, held_out),
        *_kinds(kinds or {}),
        *_length(test),
        *_scores(test),
        *_calibration(test),
        *_ood(ood),
        *_statistics(has_statistics),
    ]
    failed = [one.text for one in findings if one.passed is False]
    passed = [one.text for one in findings if one.passed]
    cautions = [one.text for one in findings if one.passed is None]
    return Verdict(not failed, failed or passed, cautions)


def percent(share: float) -> str:
    """A share for people: ``71.3 %``."""
    return f"{100 * share:.1f} %"


def out_of_distribution(ood: PairMeasures) -> str:
    """What to call the second set: by its sources, for it may be nearer than the word says."""
    return f"out of distribution ({', '.join(ood.by_source)})"


def between(rate: Rate) -> str:
    """A share and its interval for people."""
    return f"{percent(rate.value)} (95 % interval {percent(rate.low)} to {percent(rate.high)})"


def _accuracy(test: PairMeasures) -> Iterator[_Finding]:
    right = test.accuracy
    if right.pairs < FEWEST_PAIRS:
        text = f"There are {right.pairs} held-out pairs; at least {FEWEST_PAIRS} are needed."
        yield _Finding(text, False)
    if right.low > CHANCE:
        yield _Finding(f"It is right in {between(right)} of {right.pairs:,} held-out pairs.", True)
    else:
        yield _Finding(
            f"It is right in {between(right)} of {right.pairs:,} held-out pairs: "
            "not certainly more often than a coin.",
            False,
        )
    if right.prompts < FEWEST_PROMPTS:
        yield _Finding(
            f"The held-out pairs belong to {right.prompts} prompts only; "
            f"intervals over fewer than {FEWEST_PROMPTS} are rough.",
            None,
        )
    yield from _sources(test, "chosen and rejected may be swapped in this source")


def _part(test: PairMeasures, held_out: int | None) -> Iterator[_Finding]:
    scored = test.accuracy.pairs
    if held_out is not None and scored < held_out:
        yield _Finding(f"Only {scored:,} of {held_out:,} held-out pairs were scored.", None)


def _sources(measures: PairMeasures, suspicion: str) -> Iterator[_Finding]:
    for name, rate in measures.by_source.items():
        if rate.high < CHANCE:
            text = f"In {name} it is right in {between(rate)} of {rate.pairs:,} pairs: {suspicion}."
            yield _Finding(text, False)
        elif rate.low <= CHANCE and len(measures.by_source) > 1:  # one source is all pairs
            yield _Finding(
                f"In {name} it is right in {between(rate)} of {rate.pairs:,} pairs: there it is "
                "not certainly better than a coin.",
                None,
            )


def _kinds(kinds: Mapping[str, Rate]) -> Iterator[_Finding]:
    # A caution only: a kind is a part of a source, and a model may be of use without it.
    for name, rate in kinds.items():
        if rate.pairs < FEWEST_OF_KIND:
            continue
        if rate.high < CHANCE:
            yield _Finding(
                f"In pairs of kind {name} it is right in {between(rate)} of {rate.pairs:,}: "
                "there it prefers the worse answer, and PPO would too.",
                None,
            )
        elif rate.low <= CHANCE:
            yield _Finding(
                f"In pairs of kind {name} it is right in {between(rate)} of {rate.pairs:,}: "
                "there it is not certainly better than a coin.",
                None,
            )


def _length(test: PairMeasures) -> Iterator[_Finding]:
    length = test.length
    lead = length.advantage
    told = (
        f"{100 * lead.value:+.1f} points (95 % interval {100 * lead.low:+.1f} to "
        f"{100 * lead.high:+.1f}) against always taking the {length.judge} answer, "
        f"which is right in {percent(length.judge_accuracy.value)}"
    )
    if lead.low > 0:
        yield _Finding(f"It is better than length alone: {told}.", True)
    else:
        yield _Finding(f"It is not certainly better than length alone: {told}.", False)
    if abs(length.spearman) <= LARGEST_LENGTH_CORRELATION:
        text = f"Scores follow length little: Spearman's correlation is {length.spearman:+.2f}."
        yield _Finding(text, True)
        return
    longer = length.spearman > 0
    model, data = (
        share if longer else 1 - share for share in (length.longer_by_model, length.longer_by_data)
    )
    # Explained: the data certainly lean the same way, and the model not certainly more than they.
    side = "longer" if longer else "shorter"
    taste = length.judge == side and length.judge_accuracy.low > CHANCE
    more = length.lean.low > 0 if longer else length.lean.high < 0
    told = (
        f"Spearman's correlation of score and length is {length.spearman:+.2f}; of two answers "
        f"the {side} is the better one with {percent(model)} by the "
        f"scores and {percent(data)} by the data"
    )
    if taste and not more:
        yield _Finding(f"{told}: PPO will follow the data's own taste for length.", None)
    else:
        yield _Finding(
            f"{told}: the scores follow length more than ± {LARGEST_LENGTH_CORRELATION}, "
            "which the data's own taste for length does not explain.",
            False,
        )


def _scores(test: PairMeasures) -> Iterator[_Finding]:
    scores = test.scores
    if scores.not_finite:
        yield _Finding(f"{scores.not_finite:,} scores are not finite.", False)
    elif scores.std <= SMALLEST_SPREAD * max(1.0, abs(scores.mean)):
        yield _Finding(f"All scores are the same, {scores.mean:.4g}.", False)
    else:
        yield _Finding(
            f"Scores are finite and differ: mean {scores.mean:.3g}, "
            f"standard deviation {scores.std:.3g}.",
            True,
        )


def _calibration(test: PairMeasures) -> Iterator[_Finding]:
    found = test.calibration
    if not found.bins:  # no finite score, which is said elsewhere
        return
    told = (
        f"ECE is {found.ece:.3f}: the differences of the scores say {percent(found.confidence)}, "
        f"{percent(found.accuracy)} are right"
    )
    if found.ece <= LARGEST_ECE:
        yield _Finding(f"{told}.", True)
    else:
        yield _Finding(f"{told}; at most {LARGEST_ECE} is allowed.", False)


def _ood(ood: PairMeasures | None) -> Iterator[_Finding]:
    if ood is None:
        text = "Accuracy on a second set, out of distribution, was not checked."
        yield _Finding(text, None)
        return
    right = ood.accuracy
    name = out_of_distribution(ood)
    told = f"O{name[1:]} it is right in {between(right)} of {right.pairs:,} pairs"
    if right.low > CHANCE:
        yield _Finding(f"{told}.", True)
    else:
        yield _Finding(f"{told}: not certainly more often than a coin.", False)
    if ood.scores.not_finite:
        text = f"{ood.scores.not_finite:,} scores out of distribution are not finite."
        yield _Finding(text, False)
    yield from _sources(
        ood, "chosen and rejected may be swapped there, or what was learned turns round"
    )


def _statistics(known: bool) -> Iterator[_Finding]:
    if not known:
        yield _Finding(
            "Mean and standard deviation of the scores are not known: PPO would get raw scores.",
            None,
        )
