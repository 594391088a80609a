"""The curves of a run: read from its CSV files, drawn into one picture."""

import csv
import math
from collections.abc import Iterable
from pathlib import Path

_TRAINED = ("train/loss", "loss/policy")  # logged by training alone
_INTERVAL = {"val/win_rate": ("val/win_rate_low", "val/win_rate_high")}
_CURVES = (
    ("loss (nats)", ("train/loss", "val/loss")),
    ("bits per byte", ("val/bits_per_byte",)),
    ("accuracy", ("train/accuracy", "val/accuracy", "val/accuracy/")),
    ("margin (score of the better answer less the worse)", ("train/margin", "val/margin")),
    ("rewards/accuracies", ("train/rewards/accuracies", "val/rewards/accuracies")),
    ("rewards/margins", ("train/rewards/margins", "val/rewards/margins")),
    ("log-probability of answers (nats)", ("train/logps/", "val/logps/")),
    ("score of a response", ("objective/scores", "objective/rlhf_reward", "val/objective/scores")),
    ("scores by each reward and judge", ("scores/", "judge/", "val/scores/")),
    ("KL from the reference (nats an answer)", ("objective/kl", "val/objective/kl")),
    ("win rate against the start, with its interval", ("val/win_rate", "val/win_rate/")),
    ("entropy (nats a token)", ("objective/entropy",)),
    ("tokens a response", ("rollout/response_length", "val/rollout/response_length")),
    ("responses that end by themselves", ("rollout/eos_rate", "val/rollout/eos_rate")),
    ("repeated n-grams", ("rollout/repetition", "val/rollout/repetition")),
    ("approximate KL of an iteration (nats a token)", ("policy/approxkl",)),
    ("share of clipped tokens", ("policy/clipfrac", "value/clipfrac")),
    ("largest ratio", ("policy/ratio_max",)),
    ("critic: explained variance", ("value/explained_variance",)),
    ("policy loss", ("loss/policy",)),
    ("value loss", ("loss/value",)),
    ("price of the KL (kl_coef)", ("objective/kl_coef",)),
    ("answers", ("val/stop_rate", "val/well_formed_rate", "val/rouge_l")),
    ("learning rate", ("train/lr",)),
    ("gradient norm", ("train/grad_norm",)),
    ("tokens a second", ("perf/tokens_per_s", "rollout/tokens_per_s")),
    ("tokens seen", ("data/tokens/",)),
)


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a pattern stands for, in their order.

    Args:
        pattern: A name; one that ends with ``/`` stands for all names that begin with it.
        names: The names there are.
    """
    return [
        name
        for name in names
        if name == pattern or (pattern.endswith("/") and name.startswith(pattern))
    ]


def read_metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Collect the curves of a run from its CSV files.

    A resumed run starts a new file; from its first step on, it counts instead of the older one.

    Args:
        folder: The run's folder, with ``metrics/version_*/metrics.csv``.

    Returns:
        Metric name to (step, value) pairs in order of step.
    """
    curves: dict[str, dict[int, float]] = {}
    files = sorted(
        folder.glob("metrics/version_*/metrics.csv"), key=lambda p: int(p.parent.name[8:])
    )
    for file in files:
        with file.open(newline="", encoding="utf-8") as handle:
            rows = [row for row in csv.DictReader(handle) if row.get("step")]
        steps = [int(row["step"]) for row in rows if any(row.get(name) for name in _TRAINED)]
        if steps:
            for curve in curves.values():
                for step in [step for step in curve if step >= min(steps)]:
                    del curve[step]
        for row in rows:
            for name, value in row.items():
                if name not in ("step", "epoch") and value:
                    curves.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: sorted(points.items()) for name, points in curves.items() if points}


def plot_curves(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Draw the curves of a run into one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = []
    for title, names in _CURVES:
        chosen = {found for name in names for found in matching(name, curves)}
        if chosen:
            panels.append((title, sorted(chosen)))
    columns = min(3, max(1, len(panels)))
    rows = -(-max(1, len(panels)) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.1 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (title, drawn) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        for name in drawn:
            steps, values = zip(*curves[name], strict=True)
            marker = "o" if len(steps) < 12 else None
            axes.plot(steps, values, label=name, linewidth=1.3, marker=marker, markersize=3)
            ends = [dict(curves[end]) for end in _INTERVAL.get(name, ()) if end in curves]
            if len(ends) == 2:
                low, high = ([end.get(step, math.nan) for step in steps] for end in ends)
                axes.fill_between(steps, low, high, alpha=0.2, linewidth=0)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimizer step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        if len(drawn) > 1:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
