"""The report of a training run: what went in, how it went, what came out."""

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from lit_llm.evaluation.curves import matching, plot_curves, read_metrics
from lit_llm.evaluation.ppo_report import health_section, responses_section
from lit_llm.strategies.checkpoint_io import write_text

_PACKAGES = ("lit_llm", "torch", "lightning", "transformers", "datasets", "tokenizers", "peft")
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
    "objective/scores",
    "scores/",
    "win_rate",
    "win_rate_low",
    "win_rate_high",
    "win_rate/",
    "objective/kl",
    "rollout/response_length",
    "rollout/eos_rate",
    "rollout/repetition",
)  # a name that ends with / stands for all that begin with it
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
    "objective/scores": "objective/scores: mean score of a response, the weighted sum of the "
    "rewards; scores/NAME: by each reward and judge",
    "win_rate": "win rate: share of held-out prompts to which the model answers better than the "
    "model that training began from, by the sum of the rewards, ties half, with its 95 % interval "
    "(low, high); win rate/NAME: by each reward and judge",
    "rollout/response_length": "rollout/response length: tokens of a response",
    "rollout/eos_rate": "rollout/eos rate: share of responses that end by themselves",
    "rollout/repetition": "rollout/repetition: share of its n-grams that a response has said "
    "before",
    "objective/kl": "objective/kl: KL(policy || reference) of a sampled answer, in nats",
    "stop_rate": "stop rate: share of generated answers that end by themselves",
    "well_formed_rate": "well formed: those that also have the form of the trained answers",
    "rouge_l": "rouge l: overlap of the answers with the references "
    "(longest common subsequence, F-measure)",
}


def results_table(rows: dict[str, dict[str, float]]) -> str:
    """Lay out measures as a Markdown table; columns that no row has are left out."""
    measured = sorted({name for row in rows.values() for name in row})
    present = [name for column in _COLUMNS for name in matching(column, measured)]
    titles = [name.replace("_", " ").replace("|", "\\|") for name in present]
    lines = ["| held-out text | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(present)]
    for name, row in rows.items():
        cells = [f"{row[c]:,.3f}" if c in row else "" for c in present]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
    if (folder / "health.jsonl").exists():
        parts += health_section(_rows(folder / "health.jsonl"))
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
    parts += responses_section(_last_samples(folder / "test_responses.jsonl"), results.get("after"))
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
    rows = _rows(path)
    return [row for row in rows if row["step"] == rows[-1]["step"]]


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    # Not splitlines: an answer may hold other characters that end a line to it, such as U+2028.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _versions() -> list[str]:
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    for name in _PACKAGES:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return lines
