"""The acceptance report of a reward model: may PPO follow its scores, and why."""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llm.evaluation.intervals import Band, Rate, rates_by
from lit_llm.evaluation.preference_measures import PairMeasures, ScoredPairs, Spread
from lit_llm.evaluation.reward_plots import plot_reward_report
from lit_llm.evaluation.reward_verdict import Verdict, judge, out_of_distribution, percent
from lit_llm.strategies.checkpoint_io import write_text

if TYPE_CHECKING:
    from lit_llm.models.reward import RewardStatistics

About = Callable[[int, int], dict[str, Any]]
"""What source and row give: ``prompt``, ``answers``, ``pairs``, and ``kinds`` or None."""

_CHARACTERS = 400
_KINDS_SHOWN = 20
_LENGTH_NOTE = (
    "The length-only judge always takes the {} answer, as was right more often in the training "
    "data. A model that is no better has not shown that it reads the answers."
)
_READING = """\
- Accuracy: share of pairs in which the better answer has the higher score; ties count one half.
- Intervals: 95 %, by Wilson, with the effective number of pairs where several belong to one prompt.
- Confidence: sigmoid of the difference of the scores, the probability that the Bradley-Terry model
  gives to the answer with the higher score. ECE: mean distance of confidence and accuracy.
- Lengths are tokens of the answer; correlations are over all answers of the pairs."""


def write_reward_report(
    folder: Path,
    scored: dict[str, ScoredPairs],
    measures: dict[str, PairMeasures],
    about: About,
    labels: Sequence[str],
    statistics: "RewardStatistics | None" = None,
    reference_answers: int | None = None,
    mistakes: int = 10,
    held_out: int | None = None,
) -> Verdict:
    """Write ``reward_report.md``, ``reward_report.png`` and ``reward_report.json``.

    Args:
        folder: Where to write them.
        scored: Pairs of the sets ``test`` and, where there is one, ``ood`` (out of distribution).
        measures: What ``measure_pairs`` says of each.
        about: The texts of a prompt.
        labels: Names of the sources.
        statistics: Mean and standard deviation of the scores as stored with the model.
        reference_answers: How many answers they were measured on; None when it is not known.
        mistakes: How many of the most confident mistakes to show.
        held_out: How many held-out pairs there are; ``None`` when ``scored`` has them all.

    Returns:
        The verdict.
    """
    pairs, test, ood = scored["test"], measures["test"], measures.get("ood")
    wrong = _mistakes(pairs, about, labels, mistakes)
    named = {name: _kinds(one, about) for name, one in scored.items()}
    kinds = {n: rates_by(one.correct, one.prompts, named[n]) for n, one in scored.items()}
    verdict = judge(
        test, ood, kinds["test"], has_statistics=statistics is not None, held_out=held_out
    )
    groups = _groups(test, ood, {n: _kind_rows(one, named[n]) for n, one in scored.items()})
    plot_reward_report(
        folder / "reward_report.png",
        verdict.headline,
        verdict.fit,
        pairs,
        test,
        groups,
        scored.get("ood"),
    )
    parts = [
        f"# {verdict.headline}",
        *_verdict(verdict),
        "![measures](reward_report.png)",
        "## Accuracy on held-out pairs",
        _rates(groups),
        _LENGTH_NOTE.format(test.length.judge),
        "## Accuracy by the difference of the scores",
        _bands("size of the difference", test.by_difference),
        *_margins(test),
        "## Calibration",
        *_calibration(test),
        "## Length",
        *_length(test),
        "## Scores",
        _scores(test, ood),
        *_heads(test),
        "## Statistics stored with the model",
        _statistics(statistics, reference_answers),
        f"## The {len(wrong)} most confident mistakes" if wrong else "## Mistakes",
        *(_mistake(number, one) for number, one in enumerate(wrong, start=1)),
        *([] if wrong else ["There are none."]),
        "## How to read this",
        _READING,
    ]
    numbers = {
        "verdict": dataclasses.asdict(verdict),
        "measures": {name: dataclasses.asdict(one) for name, one in measures.items()},
        "by_kind": {
            name: {kind: dataclasses.asdict(rate) for kind, rate in rates.items()}
            for name, rates in kinds.items()
        },
        "statistics": None if statistics is None else dataclasses.asdict(statistics),
        "reference_answers": reference_answers,
        "mistakes": [{k: v for k, v in one.items() if k not in _TEXTS} for one in wrong],
    }
    write_text(folder / "reward_report.json", json.dumps(_finite(numbers), indent=1) + "\n")
    write_text(folder / "reward_report.md", "\n\n".join(parts) + "\n")
    return verdict


# ----- what is shown ------------------------------------------------------------------------------

_TEXTS = ("prompt", "better", "worse")


def _kinds(pairs: ScoredPairs, about: About) -> list[str]:
    """The kind of each pair; empty when none has one."""
    known: dict[tuple[int, int], Any] = {}
    kinds = []
    for source, row, index in _places(pairs):
        if (source, row) not in known:
            known[source, row] = about(source, row)["kinds"]
        found = known[source, row]
        kinds.append("" if found is None else found[index])
    return [kind or "of no kind" for kind in kinds] if any(kinds) else []


def _kind_rows(pairs: ScoredPairs, kinds: list[str]) -> dict[str, Rate]:
    """Accuracy of the largest kinds, and of all others together."""
    largest = {name for name, _ in Counter(kinds).most_common(_KINDS_SHOWN)}
    rows = [f"kind {name}" if name in largest else "other kinds" for name in kinds]
    return rates_by(pairs.correct, pairs.prompts, rows)  # by name: the others come last


def _places(pairs: ScoredPairs) -> list[tuple[int, int, int]]:
    columns = (pairs.source.tolist(), pairs.row.tolist(), pairs.index.tolist())
    return list(zip(*columns, strict=True))


def _groups(
    test: PairMeasures, ood: PairMeasures | None, kinds: dict[str, dict[str, Rate]]
) -> dict[str, Rate]:
    """Accuracies to compare, the most important first."""
    groups = {
        "all held-out pairs": test.accuracy,
        f"always the {test.length.judge} answer": test.length.judge_accuracy,
    }
    if ood is not None:
        groups[out_of_distribution(ood)] = ood.accuracy
    if len(test.by_source) > 1:
        groups |= {f"source {name}": rate for name, rate in test.by_source.items()}
    groups |= kinds["test"] | test.by_length
    if ood is not None:
        if len(ood.by_source) > 1:
            groups |= {f"OOD, source {name}": rate for name, rate in ood.by_source.items()}
        groups |= {f"OOD, {name}": rate for name, rate in kinds["ood"].items()}
    return groups


def _mistakes(
    pairs: ScoredPairs, about: About, labels: Sequence[str], count: int
) -> list[dict[str, Any]]:
    """The pairs in which the worse answer has the higher score, by how much."""
    excess = (pairs.worse - pairs.better).double().nan_to_num(0.0)
    order = excess.argsort(descending=True, stable=True)[:count].tolist()
    places = _places(pairs)
    found = []
    for number in order:
        if float(excess[number]) <= 0:
            break
        source, row, index = places[number]
        texts = about(source, row)
        better, worse = texts["pairs"][index]
        found.append(
            {
                "source": labels[source],
                "row": row,
                "pair": index,
                "kind": texts["kinds"][index] if texts["kinds"] else None,
                "better_score": float(pairs.better[number]),
                "worse_score": float(pairs.worse[number]),
                "prompt": texts["prompt"],
                "better": texts["answers"][better],
                "worse": texts["answers"][worse],
            }
        )
    return found


def _verdict(verdict: Verdict) -> list[str]:
    word = "fit" if verdict.fit else "**not** fit"
    parts = [f"This model is {word} to drive PPO:", _bullets(verdict.reasons)]
    if verdict.cautions:
        parts += ["Take care:", _bullets(verdict.cautions)]
    return parts


def _bullets(sentences: list[str]) -> str:
    return "\n".join(f"- {_inline(sentence)}" for sentence in sentences)


def _rates(groups: dict[str, Rate]) -> str:
    lines = ["| pairs | accuracy | 95 % interval | pairs | prompts |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {_inline(name)} | {percent(one.value)} | {percent(one.low)} to {percent(one.high)} "
        f"| {one.pairs:,} | {one.prompts:,} |"
        for name, one in groups.items()
    ]
    return "\n".join(lines)


def _bands(name: str, bands: list[Band]) -> str:
    lines = [f"| {name} | accuracy | 95 % interval | pairs |", "|---|---:|---:|---:|"]
    lines += [
        f"| {band.low:.3g} to {band.high:.3g} | {percent(one.value)} "
        f"| {percent(one.low)} to {percent(one.high)} | {one.pairs:,} |"
        for band in bands
        for one in [band.accuracy]
    ]
    return "\n".join(lines)


def _margins(test: PairMeasures) -> list[str]:
    if not test.by_margin:
        return []
    return ["## Accuracy by annotated margin", _bands("margin", test.by_margin)]


def _calibration(test: PairMeasures) -> list[str]:
    found = test.calibration
    if not found.bins:
        return ["No score is finite."]
    lines = ["| confidence | mean confidence | accuracy | pairs |", "|---|---:|---:|---:|"]
    lines += [
        f"| {percent(one.low)} to {percent(one.high)} | {percent(one.confidence)} "
        f"| {percent(one.accuracy.value)} | {one.accuracy.pairs:,} |"
        for one in found.bins
    ]
    return [
        f"Expected calibration error (ECE): {found.ece:.3f}. Mean confidence is "
        f"{percent(found.confidence)}, accuracy {percent(found.accuracy)}.",
        "\n".join(lines),
    ]


def _length(test: PairMeasures) -> list[str]:
    found = test.length
    lead = found.advantage
    side = "better" if lead.value >= 0 else "worse"
    return [
        f"Correlation of score and length: Pearson {found.pearson:+.3f}, "
        f"Spearman {found.spearman:+.3f}.",
        f"Of two answers of different length the longer is the better one with a mean probability "
        f"of {percent(found.longer_by_model)} by the scores, and in "
        f"{percent(found.longer_by_data)} of the pairs.",
        f"The model is {abs(100 * lead.value):.1f} points {side} than the length-only judge "
        f"(95 % interval of the paired difference {100 * lead.low:+.1f} to "
        f"{100 * lead.high:+.1f}).",
    ]


def _scores(test: PairMeasures, ood: PairMeasures | None) -> str:
    rows: dict[str, Spread] = {
        "all held-out answers": test.scores,
        "better answers": test.better,
        "worse answers": test.worse,
    }
    if ood is not None:
        rows[_inline(out_of_distribution(ood))] = ood.scores
    lines = [
        "| scores | mean | standard deviation | least | most | not finite |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {name} | {one.mean:.3f} | {one.std:.3f} | {one.least:.3f} | {one.most:.3f} "
        f"| {one.not_finite:,} |"
        for name, one in rows.items()
    ]
    return "\n".join(lines)


def _heads(test: PairMeasures) -> list[str]:
    if test.heads_disagree is None:
        return []
    return [f"The heads do not agree on {percent(test.heads_disagree)} of the held-out pairs."]


def _statistics(statistics: "RewardStatistics | None", count: int | None) -> str:
    if statistics is None:
        return "There are none: PPO would get raw scores."
    lines = ["| head | mean | standard deviation |", "|---|---:|---:|"]
    rows = enumerate(zip(statistics.mean, statistics.std, strict=True), start=1)
    lines += [f"| {n} | {mean:.4f} | {std:.4f} |" for n, (mean, std) in rows]
    measured = f"Measured on {count:,} reference answers. " if count is not None else ""
    return f"{measured}Aggregation over heads: {statistics.aggregation}.\n\n" + "\n".join(lines)


def _mistake(number: int, one: dict[str, Any]) -> str:
    name = _inline(", ".join(filter(None, [one["source"], one["kind"]])))
    return (
        f"### {number}. {name}\n\n"
        f"Prompt:\n\n{fenced(one['prompt'])}\n\n"
        f"Better, scored {one['better_score']:.3f}:\n\n{fenced(one['better'])}\n\n"
        f"Worse, scored {one['worse_score']:.3f}:\n\n{fenced(one['worse'])}"
    )


# ----- text that cannot break the page ------------------------------------------------------------


def fenced(text: str) -> str:
    """A text in a fence that is longer than any in the text; of a long one both ends."""
    # Lone surrogates, which a record may hold, cannot be written.
    text = text.encode("utf-8", "replace").decode()
    if len(text) > _CHARACTERS:
        half = _CHARACTERS // 2
        text = f"{text[:half]} […] {text[-half:]}"
    runs = [len(run) for run in re.findall(r"`+", text)]
    fence = "`" * max(3, 1 + max(runs, default=0))
    return f"{fence}text\n{text}\n{fence}"


def _inline(text: str) -> str:
    """A name or sentence that may hold a name from the data, for a table or a list."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)


def _finite(value: Any) -> Any:
    """Plain data with None in place of numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
