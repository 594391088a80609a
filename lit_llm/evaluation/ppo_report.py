"""What a report says of PPO: its diagnoses, who wins, and responses before and after."""

from collections.abc import Mapping, Sequence
from typing import Any

from lit_llm.evaluation.reward_report import fenced
from lit_llm.evaluation.reward_verdict import percent

_SHOWN = 8
_WON = {"policy": "the response after is better", "reference": "the response before is better"}


def health_section(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tell each diagnosis once: when it was told, and what was said last.

    Args:
        rows: Those of ``health.jsonl``, in order.
    """
    if not rows:
        found = "Nothing of what usually goes wrong in PPO was found."
        return ["## Health", f"{found} Most of it takes ten iterations and more to be seen."]
    lines = []
    for name in sorted({row["name"] for row in rows}, key=lambda name: _place(rows, name)):
        told = [row for row in rows if row["name"] == name]
        when = ", ".join(str(row["iteration"]) for row in told)
        plural = "s" if len(told) > 1 else ""
        lines.append(
            f"- **{name}** ({told[-1]['severity']}, told after iteration{plural} {when}): "
            f"{told[-1]['text']}"
        )
    return ["## Health", "\n".join(lines)]


def _place(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[bool, int]:
    """Errors before warnings, each in the order in which they came up."""
    own = [row for row in rows if row["name"] == name]
    return all(row["severity"] != "error" for row in own), rows.index(own[0])


def responses_section(
    rows: Sequence[Mapping[str, Any]], measured: Mapping[str, float] | None = None
) -> list[str]:
    """Show who wins, and the first held-out prompts with the responses before and after.

    Args:
        rows: The last step's of ``test_responses.jsonl``.
        measured: The test's measures
            (:func:`lit_llm.evaluation.responses.response_measures`).
    """
    if not rows:
        return []
    parts = ["## Responses to held-out prompts", *_win_rates(rows, measured or {})]
    shown = rows[:_SHOWN]
    if len(shown) < len(rows):
        parts.append(f"The first {len(shown)} of {len(rows)}; `test_responses.jsonl` has them all.")
    return parts + [_shown(number, row) for number, row in enumerate(shown, start=1)]


def _win_rates(rows: Sequence[Mapping[str, Any]], measured: Mapping[str, float]) -> list[str]:
    names = [name for name in measured if name == "win_rate" or name.startswith("win_rate/")]
    count = sum(row["winner"] is not None for row in rows)
    if not names or not count:
        return []
    lines = ["| judged by | win rate | 95 % interval |", "|---|---:|---:|"]
    for name in names:
        suffix = name.removeprefix("win_rate")
        low, high = (measured[f"win_rate_{end}{suffix}"] for end in ("low", "high"))
        judge = suffix[1:].replace("|", "\\|") or "sum of the rewards"
        lines.append(f"| {judge} | {percent(measured[name])} | {percent(low)} to {percent(high)} |")
    return [
        f"Share of {count} held-out prompts to which the model answers better after training than "
        "before; ties count half. By a reward that it was trained on this says how far PPO got; "
        "only by a judge that it never saw, whether its answers are better.",
        "\n".join(lines),
    ]


def _shown(number: int, row: Mapping[str, Any]) -> str:
    parts = [f"### {number}. {_WON.get(row['winner'], 'a tie') if row['winner'] else 'Prompt'}"]
    parts.append(fenced(row["prompt"]))
    if row["baseline"] is not None:
        told = _scores(row["baseline_score"], row["baseline_scores"])
        parts += [f"Before ({told}):", fenced(row["baseline"])]
    cut = "" if row["stopped"] else ", cut off"
    told = _scores(row["score"], row["scores"])
    parts += [f"After ({told}; KL {row['kl']:.2f} nats{cut}):", fenced(row["response"])]
    return "\n\n".join(parts)


def _scores(score: float, scores: Mapping[str, float]) -> str:
    own = [f"{name} {value:.3f}" for name, value in scores.items()]
    return f"score {score:.3f}" + (f": {', '.join(own)}" if own else "")
