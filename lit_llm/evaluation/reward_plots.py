"""The picture of a reward model's report: what a reader has to see at a glance."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lit_llm.evaluation.intervals import Rate
from lit_llm.evaluation.preference_measures import PairMeasures, ScoredPairs

# Okabe and Ito's colours, which the colour-blind can tell apart.
_BETTER, _WORSE, _OTHER, _GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
_MOST_ROWS = 14
_MOST_POINTS = 2000


def plot_reward_report(
    path: Path,
    headline: str,
    fit: bool,
    pairs: ScoredPairs,
    measures: PairMeasures,
    groups: dict[str, Rate],
    ood_pairs: ScoredPairs | None = None,
) -> None:
    """Draw a reward model's measures into one PNG, written whole or not at all.

    Args:
        path: The file.
        headline: The verdict in a few words.
        fit: Whether it is good.
        pairs: The held-out pairs.
        measures: Their measures.
        groups: Accuracies to compare, in order, the first at the top.
        ood_pairs: A second set, out of distribution.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7.4), layout="constrained")
    FigureCanvasAgg(figure)
    colour = _OTHER if fit else _WORSE
    figure.suptitle(headline, fontsize=14, fontweight="bold", color=colour)
    panels = figure.subplot_mosaic(
        [["groups", "scores", "calibration"], ["groups", "difference", "length"]],
        width_ratios=[1.15, 1, 1],
    )
    _draw_groups(panels["groups"], groups)
    _draw_scores(panels["scores"], pairs, ood_pairs)
    _draw_calibration(panels["calibration"], measures)
    _draw_difference(panels["difference"], measures)
    _draw_length(panels["length"], pairs, measures)
    for axes in panels.values():
        axes.tick_params(labelsize=8)
        axes.title.set_fontsize(10)
        axes.xaxis.label.set_fontsize(8)
        axes.yaxis.label.set_fontsize(8)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=110, format="png")
    os.replace(partial, path)


def _draw_groups(axes: Any, groups: dict[str, Rate]) -> None:
    shown = list(groups.items())[:_MOST_ROWS]
    places = range(len(shown), 0, -1)
    for place, (name, rate) in zip(places, shown, strict=True):
        judge = name.startswith("always the")
        colour = _GREY if judge else _WORSE if rate.low <= 0.5 else _BETTER
        axes.errorbar(
            rate.value,
            place,
            xerr=_ends([rate]),
            fmt="s" if judge else "o",
            color=colour,
            capsize=3,
            markersize=6,
        )
        axes.annotate(
            f"{100 * rate.value:.0f} %",
            (rate.value, place),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=colour,
        )
    axes.axvline(0.5, color="black", linewidth=1, linestyle="--")
    labels = [f"{_short(name)}\n{rate.pairs:,} pairs" for name, rate in shown]
    axes.set_yticks(list(places), labels)
    axes.set_ylim(0.4, len(shown) + 0.7)
    axes.set_xlim(min([0.4, *(rate.low - 0.03 for _, rate in shown)]), 1.04)
    left = len(groups) - len(shown)
    axes.set_title("accuracy with 95 % interval" + (f" ({left} more in the text)" if left else ""))
    axes.set_xlabel("share of the pairs; orange: not certainly above a coin (dashed)")


def _draw_scores(axes: Any, pairs: ScoredPairs, ood: ScoredPairs | None) -> None:
    drawn = [("better", pairs.better, _BETTER), ("worse", pairs.worse, _WORSE)]
    drawn = [(name, scores[scores.isfinite()], colour) for name, scores, colour in drawn]
    everything = [scores for _, scores, _ in drawn]
    second = torch.zeros(0)
    if ood is not None:
        second = torch.cat([ood.better, ood.worse])
        second = second[second.isfinite()]
    values = torch.cat([*everything, second])
    if len(values):
        low, high = float(values.min()), float(values.max())
        if low == high:
            low, high = low - 0.5, high + 0.5
        for name, scores, colour in drawn:
            mean = f", mean {float(scores.mean()):.2f}" if len(scores) else ""
            _histogram(axes, scores, low, high, color=colour, alpha=0.5, label=f"{name}{mean}")
        if len(second):
            label = f"out of distribution, mean {float(second.mean()):.2f}"
            _histogram(
                axes, second, low, high, color="black", histtype="step", linestyle=":", label=label
            )
        axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the legend
        axes.legend(fontsize=7, loc="upper left")
    axes.set_title("scores of the better and the worse answers")
    axes.set_xlabel("score")
    axes.set_ylabel("share of answers")


def _histogram(axes: Any, scores: torch.Tensor, low: float, high: float, **style: Any) -> None:
    values = scores.double().tolist()
    weights = [1 / len(values) for _ in values]
    axes.hist(values, bins=40, range=(low, high), weights=weights, **style)


def _draw_calibration(axes: Any, measures: PairMeasures) -> None:
    found = measures.calibration
    axes.plot([0.5, 1], [0.5, 1], color="black", linewidth=1, linestyle="--")
    if found.bins:
        total = sum(one.accuracy.pairs for one in found.bins)
        shares = [one.accuracy.pairs / total for one in found.bins]
        # The bars share the axis from 0 to 1; nothing else is below 0.3 in a usable model.
        axes.bar(
            [(one.low + one.high) / 2 for one in found.bins],
            shares,
            width=[0.9 * (one.high - one.low) for one in found.bins],
            color=_GREY,
            alpha=0.35,
            label="share of the pairs",
        )
        axes.errorbar(
            [one.confidence for one in found.bins],
            [one.accuracy.value for one in found.bins],
            yerr=_ends(one.accuracy for one in found.bins),
            fmt="o-",
            color=_BETTER,
            capsize=3,
            markersize=4,
            label="accuracy",
        )
        axes.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 0.15))
        side = "over" if found.confidence > found.accuracy else "under"
        axes.set_title(f"calibration: ECE {found.ece:.3f}, {side}-confident on the whole")
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("confidence: sigmoid of |difference of the scores| (dashed: perfect)")
    axes.set_ylabel("accuracy")


def _draw_difference(axes: Any, measures: PairMeasures) -> None:
    bands = measures.by_difference
    places = range(len(bands))
    axes.bar(places, [band.accuracy.value for band in bands], color=_BETTER, alpha=0.6)
    axes.errorbar(
        list(places),
        [band.accuracy.value for band in bands],
        yerr=_ends(band.accuracy for band in bands),
        fmt="none",
        color="black",
        capsize=3,
        linewidth=1,
    )
    axes.axhline(0.5, color="black", linewidth=1, linestyle="--")
    axes.set_xticks(list(places), [f"{band.low:.2g}\nto {band.high:.2g}" for band in bands])
    axes.set_ylim(0, 1.02)
    axes.set_title("accuracy where the scores differ little … much")
    axes.set_xlabel("|difference of the scores|, equal shares of the pairs")
    axes.set_ylabel("accuracy")


def _draw_length(axes: Any, pairs: ScoredPairs, measures: PairMeasures) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    for name, tokens, scores, colour in (
        ("better", pairs.better_length, pairs.better, _BETTER),
        ("worse", pairs.worse_length, pairs.worse, _WORSE),
    ):
        shown = scores.isfinite().nonzero().flatten()
        shown = shown[:: len(shown) // _MOST_POINTS + 1]
        axes.scatter(
            tokens[shown].tolist(),
            scores[shown].tolist(),
            s=7,
            alpha=0.35,
            color=colour,
            linewidths=0,
            label=name,
        )
    length = measures.length
    if measures.calibration.bins:  # there are finite scores
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=7, markerscale=2)
    axes.set_title(
        f"score against length: Spearman {length.spearman:+.2f}\nthe longer is better: scores "
        f"{100 * length.longer_by_model:.0f} %, data {100 * length.longer_by_data:.0f} %"
    )
    axes.set_xlabel("tokens of the answer")
    axes.set_ylabel("score")


def _ends(rates: Iterable[Rate]) -> list[list[float]]:
    """Lengths of error bars down and up."""
    rates = list(rates)
    down = [max(0.0, rate.value - rate.low) for rate in rates]
    return [down, [max(0.0, rate.high - rate.value) for rate in rates]]


def _short(name: str) -> str:
    # A "$" would begin a formula.
    return (name if len(name) <= 36 else name[:35] + "…").replace("$", r"\$")
