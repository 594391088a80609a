"""The report of a training run: what went in, how it went, what came out."""

import csv
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from lit_llm.strategies.checkpoint_io import write_text

_PACKAGES = ("lit_llm", "torch", "lightning", "transformers", "datasets", "tokenizers", "peft")
_CURVES = (
    ("loss (nats)", ("train/loss", "val/loss")),
    ("bits per byte", ("val/bits_per_byte",)),
    ("accuracy", ("train/accuracy", "val/accuracy", "val/accuracy/")),
    ("margin (score of the better answer less the worse)", ("train/margin", "val/margin")),
    ("rewards/accuracies", ("train/rewards/accuracies", "val/rewards/accuracies")),
    ("rewards/margins", ("train/rewards/margins", "val/rewards/margins")),
    ("log-probability of answers (nats)", ("train/logps/", "val/logps/")),
    ("KL from the reference (nats an answer)", ("val/objective/kl",)),
    ("answers", ("val/stop_rate", "val/well_formed_rate", "val/rouge_l")),
    ("learning rate", ("train/lr",)),
    ("gradient norm", ("train/grad_norm",)),
    ("tokens a second", ("perf/tokens_per_s",)),
    ("tokens seen", ("data/tokens/",)),
)

_ANSWERS_SHOWN = 12
_COLUMNS = (
    "perplexity",
    "bits_per_byte",
    "loss",
    "token_accuracy",
    "stop_rate",
    "well_formed_rate",
    "rouge_l",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "length_judge",
    "margin",
    "ece",
    "ood/accuracy",
    "rewards/accuracies",
    "rewards/margins",
    "ood/rewards/accuracies",
    "objective/kl",
)
_LEGEND = {
    "before": "before and after: this model, before and after training",
    "unigram": "unigram: token frequencies of the training text, add-one smoothing",
    "gzip": "gzip: the held-out text compressed by `gzip -9`",
    "bits_per_byte": "lower is better, but for accuracy",
    "accuracy": "accuracy: share of held-out pairs in which the better answer has the higher "
    "score, with its 95 % interval (low, high)",
    "length_judge": "length judge: accuracy of preferring the longer (or the shorter) answer",
    "ece": "ece: mean distance of confidence from accuracy",
    "ood/accuracy": "ood: on the second set",
    "rewards/accuracies": "rewards/accuracies: share of held-out pairs in which the better answer "
    "has become likelier by more than the worse one",
    "ood/rewards/accuracies": "ood: on the second set",
    "objective/kl": "objective/kl: KL(policy || reference) of a sampled answer, in nats",
    "stop_rate": "stop rate: share of generated answers that end by themselves",
    "well_formed_rate": "well formed: those that also have the form of the trained answers",
    "rouge_l": "rouge l: overlap of the answers with the references "
    "(longest common subsequence, F-measure)",
}


def results_table(rows: dict[str, dict[str, float]]) -> str:
    """Lay out measures as a Markdown table; columns that no row has are left out."""
    present = [column for column in _COLUMNS if any(column in row for row in rows.values())]
    lines = [
        "| held-out text | " + " | ".join(name.replace("_", " ") for name in present) + " |",
        "|---|" + "---:|" * len(present),
    ]
    for name, row in rows.items():
        cells = [f"{row[c]:,.3f}" if c in row else "" for c in present]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
        steps = [int(row["step"]) for row in rows if row.get("train/loss")]
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
        chosen = [
            name
            for name in curves
            if any(name == n or (n.endswith("/") and name.startswith(n)) for n in names)
        ]
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
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimizer step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        if len(drawn) > 1:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def write_report(
    folder: Path,
    settings: dict[str, Any],
    results: dict[str, dict[str, float]],
    corpus: dict[str, Any],
    resumed_from: Path | None = None,
) -> Path:
    """Write ``report.md`` and ``curves.png`` into a run's folder.

    Args:
        folder: The run's folder.
        settings: The run's whole configuration.
        results: Rows of the table of held-out measures.
        corpus: What the data module says of its data: documents, bytes, tokens, hashes.
        resumed_from: The checkpoint the last part of the run started from.

    Returns:
        The path of ``report.md``.
    """
    curves = read_metrics(folder)
    plot_curves(curves, folder / "curves.png")
    parts = [
        f"# Report of {folder.name}",
        f"`{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`",
        *(["## Held-out text", results_table(results), _legend(results)] if results else []),
        "## Curves",
        "![curves](curves.png)",
    ]
    verdict = folder / "reward_report.md"
    if verdict.is_file():
        headline = verdict.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        parts += ["## Verdict", f"[{headline}]({verdict.name})"]
    if resumed_from is not None:
        parts.append(f"The run was resumed from `{resumed_from}`.")
    samples = _last_samples(folder / "samples.jsonl")
    if samples:
        parts.append("## Samples")
        parts += [
            f"Step {row['step']}:\n\n```text\n{row['prompt']} ⟶ {row['continuation']}\n```"
            for row in samples
        ]
    answers = _last_samples(folder / "test_answers.jsonl")
    if answers:
        parts.append("## Answers to held-out questions")
        parts += [
            f"```text\n{row['question']}\n⟶ {row['answer']}{'' if row['stopped'] else ' …'}\n"
            f"  (reference: {row['reference']})\n```"
            for row in answers[:_ANSWERS_SHOWN]
        ]
    parts += [
        "## Data",
        _fenced(yaml.safe_dump(corpus, sort_keys=False, allow_unicode=True), "yaml"),
        "## Versions",
        _fenced("\n".join(_versions()), "text"),
        "## Settings",
        _fenced(yaml.safe_dump(settings, sort_keys=False), "yaml"),
    ]
    path = folder / "report.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def _legend(results: dict[str, dict[str, float]]) -> str:
    shown = results.keys() | {column for row in results.values() for column in row}
    return "; ".join(text for name, text in _LEGEND.items() if name in shown) + "."


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def _last_samples(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [row for row in rows if row["step"] == rows[-1]["step"]]


def _versions() -> list[str]:
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    for name in _PACKAGES:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return lines
