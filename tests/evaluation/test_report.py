"""The report: curves across a resume, the table, the picture."""

import csv
import json

import pytest

from lit_llm.evaluation import curves
from lit_llm.evaluation.curves import matching, plot_curves, read_metrics
from lit_llm.evaluation.ppo_report import health_section, responses_section
from lit_llm.evaluation.report import results_table, write_report


def write_csv(folder, version, rows):
    path = folder / "metrics" / f"version_{version}" / "metrics.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def test_a_resumed_run_replaces_what_it_did_again(tmp_path):
    write_csv(
        tmp_path,
        0,
        [
            {"step": 1, "train/loss": 5.0},
            {"step": 2, "train/loss": 4.0, "val/loss": 4.5},
            {"step": 3, "train/loss": 3.9},
            {"step": 4, "train/loss": 9.0, "val/loss": 9.5},
        ],
    )
    write_csv(tmp_path, 10, [{"step": 3, "train/loss": 3.0}])
    (tmp_path / "metrics" / "version_11").mkdir()
    (tmp_path / "metrics" / "version_11" / "metrics.csv").write_text("")
    assert read_metrics(tmp_path) == {
        "train/loss": [(1, 5.0), (2, 4.0), (3, 3.0)],
        "val/loss": [(2, 4.5)],
    }


def test_a_continuation_may_hold_any_character(tmp_path):
    """Some of them end a line for Python, though not for JSON."""
    row = {"step": 3, "prompt": "a", "continuation": "one\u2028two\x85three"}
    text = json.dumps(row, ensure_ascii=False) + "\n"
    (tmp_path / "samples.jsonl").write_text(text, encoding="utf-8")
    assert "one\u2028two\x85three" in write_report(tmp_path, {}, {}, {}).read_text("utf-8")


def test_the_table_leaves_out_what_nobody_measured():
    table = results_table({"after": {"perplexity": 12.3456}, "gzip": {"bits_per_byte": 2.5}})
    assert table.splitlines() == [
        "| held-out text | perplexity | bits per byte |",
        "|---|---:|---:|",
        "| after | 12.346 |  |",
        "| gzip |  | 2.500 |",
    ]


def test_a_report_of_nothing_still_stands(tmp_path):
    plot_curves({}, tmp_path / "empty.png")
    path = write_report(tmp_path, {"seed": 1}, {}, {})
    assert "## Versions" in path.read_text()


def test_the_verdict_is_linked_where_there_is_one(tmp_path):
    assert "reward_report.md" not in write_report(tmp_path, {}, {}, {}).read_text()
    (tmp_path / "reward_report.md").write_text("# Reward model: NOT fit to drive PPO\n\nFor...\n")
    page = write_report(tmp_path, {}, {}, {}).read_text()
    assert "[Reward model: NOT fit to drive PPO](reward_report.md)" in page


def test_the_second_set_of_dpo_is_in_the_table():
    row = {"rewards/accuracies": 0.75, "ood/rewards/accuracies": 0.625}
    assert results_table({"after": row}).splitlines()[-1] == "| after | 0.750 | 0.625 |"


# ----- PPO ----------------------------------------------------------------------------------------


def test_a_resumed_ppo_run_replaces_what_it_did_again(tmp_path):
    name = "loss/policy"
    write_csv(
        tmp_path, 0, [{"step": 4, name: 0.4}, {"step": 8, name: 0.8}, {"step": 12, name: 9.0}]
    )
    write_csv(tmp_path, 1, [{"step": 8, name: 0.7}])
    assert read_metrics(tmp_path) == {name: [(4, 0.4), (8, 0.7)]}


def test_names_that_end_with_a_stroke_stand_for_all_below_them():
    names = ["win_rate", "win_rate_low", "win_rate/b", "win_rate/a", "val/win_rate/a"]
    assert matching("win_rate", names) == ["win_rate"]
    assert matching("win_rate/", names) == ["win_rate/b", "win_rate/a"]
    assert matching("none/", names) == []


def test_the_table_of_ppo_has_every_reward_and_judge():
    before = {"objective/scores": -0.5, "scores/rule": 0.25, "rollout/eos_rate": 0.5}
    after = {
        "rollout/response_length": 31.5,
        "win_rate/rule": 0.625,
        "win_rate_low/rule": 0.5,
        "win_rate/a|b": 0.75,
        "win_rate": 0.7,
        "win_rate_low": 0.6,
        "win_rate_high": 0.8,
        "objective/kl": 4.0,
    }
    assert results_table({"before": before, "after": before | after}).splitlines() == [
        "| held-out text | objective/scores | scores/rule | win rate | win rate low "
        "| win rate high | win rate/a\\|b | win rate/rule | objective/kl "
        "| rollout/response length | rollout/eos rate |",
        "|---|" + "---:|" * 10,
        "| before | -0.500 | 0.250 |  |  |  |  |  |  |  | 0.500 |",
        "| after | -0.500 | 0.250 | 0.700 | 0.600 | 0.800 | 0.750 | 0.625 | 4.000 | 31.500 "
        "| 0.500 |",
    ]


def test_the_legend_explains_what_the_table_has(tmp_path):
    page = write_report(tmp_path, {}, {"after": {"win_rate": 0.7}}, {}).read_text()
    assert "win rate: share of held-out prompts" in page and "rollout/eos rate:" not in page


def told(iteration, name, severity="warning", text="It is so."):
    return {"iteration": iteration, "severity": severity, "name": name, "text": text}


def test_health_tells_each_diagnosis_once_errors_first():
    rows = [told(3, "clipping"), told(4, "nan", "error"), told(13, "clipping", text="Still so.")]
    title, text = health_section(rows)
    assert title == "## Health"
    assert text.splitlines() == [
        "- **nan** (error, told after iteration 4): It is so.",
        "- **clipping** (warning, told after iterations 3, 13): Still so.",
    ]


def test_health_is_in_the_report_of_a_run_that_was_watched(tmp_path):
    assert "## Health" not in write_report(tmp_path, {}, {}, {}).read_text()
    path = tmp_path / "health.jsonl"
    path.write_text("")
    page = write_report(tmp_path, {}, {}, {}).read_text()
    assert "Nothing of what usually goes wrong in PPO was found." in page
    path.write_text(json.dumps(told(3, "no_stop")) + "\n")
    page = write_report(tmp_path, {}, {}, {}).read_text()
    assert "**no_stop** (warning, told after iteration 3)" in page and "Nothing of" not in page


def compared(index, winner="policy", **changes):
    return {
        "step": 40,
        "index": index,
        "prompt": f"ask {index}",
        "response": f"after {index}",
        "score": 1.5,
        "kl": 3.25,
        "length": 7,
        "stopped": True,
        "repetition": 0.0,
        "scores": {"rule": 1.0, "judge": 0.5},
        "baseline": f"before {index}",
        "baseline_score": -0.5,
        "baseline_scores": {"rule": 0.0, "judge": -0.25},
        "winner": winner,
    } | changes


def test_responses_stand_beside_those_before_with_their_scores():
    rows = [compared(0), compared(1, "reference", stopped=False), compared(2, "tie")]
    title, first, second, third = responses_section(rows)
    assert title == "## Responses to held-out prompts"
    assert first == (
        "### 1. the response after is better\n\n```text\nask 0\n```\n\n"
        "Before (score -0.500: rule 0.000, judge -0.250):\n\n```text\nbefore 0\n```\n\n"
        "After (score 1.500: rule 1.000, judge 0.500; KL 3.25 nats):\n\n```text\nafter 0\n```"
    )
    assert second.startswith("### 2. the response before is better") and "cut off" in second
    assert third.startswith("### 3. a tie") and "cut off" not in third
    assert responses_section([]) == []


def test_the_win_rate_is_told_by_each_judge_with_its_interval():
    measured = {"objective/kl": 1.0}
    for name, value in (("", 0.7), ("/ru|le", 0.625)):
        measured |= {f"win_rate{name}": value, f"win_rate_low{name}": value - 0.1}
        measured |= {f"win_rate_high{name}": value + 0.1}
    rows = [compared(index) for index in range(30)]
    _, sentence, table, count, *shown = responses_section(rows, measured)
    assert "Share of 30 held-out prompts" in sentence
    assert table.splitlines()[2:] == [
        "| sum of the rewards | 70.0 % | 60.0 % to 80.0 % |",
        "| ru\\|le | 62.5 % | 52.5 % to 72.5 % |",
    ]
    assert count.startswith("The first 8 of 30") and len(shown) == 8


def test_a_test_without_a_reference_shows_responses_alone():
    row = compared(0, None, baseline=None, baseline_score=None, baseline_scores=None)
    _, shown = responses_section([row], {"objective/scores": 1.0})
    assert shown.startswith("### 1. Prompt") and "Before" not in shown and "after 0" in shown


def test_the_report_shows_the_responses_of_the_last_test_and_text_breaks_nothing(tmp_path):
    rows = [compared(0, step=0, response="old"), compared(0, response="```\n# no title\n```")]
    (tmp_path / "test_responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = {"after": {"win_rate": 0.7, "win_rate_low": 0.6, "win_rate_high": 0.8}}
    page = write_report(tmp_path, {}, results, {}).read_text()
    assert "````text\n```\n# no title\n```\n````" in page and "old" not in page
    assert "| sum of the rewards | 70.0 % |" in page


def panels_of(monkeypatch, tmp_path, names):
    """What is drawn: title to the labels of its lines; and how many areas."""
    from matplotlib.figure import Figure

    drawn, areas = {}, []

    def savefig(self, path, **_):
        for axes in self.axes:
            drawn[axes.get_title()] = [line.get_label() for line in axes.lines]
            areas.extend(axes.collections)

    monkeypatch.setattr(Figure, "savefig", savefig)
    plot_curves({name: [(1, 0.5), (2, 0.25)] for name in names}, tmp_path / "curves.png")
    return drawn, len(areas)


def test_every_metric_of_ppo_has_its_panel(monkeypatch, tmp_path):
    names = [
        *("objective/kl", "objective/scores", "objective/rlhf_reward", "objective/entropy"),
        *("objective/kl_coef", "policy/approxkl", "policy/clipfrac", "policy/ratio_max"),
        *("loss/policy", "loss/value", "value/clipfrac", "value/explained_variance"),
        *("rollout/response_length", "rollout/eos_rate", "rollout/repetition"),
        *("rollout/tokens_per_s", "scores/rule", "judge/held out", "val/scores/rule"),
        *("val/objective/kl", "val/objective/scores", "val/rollout/eos_rate", "val/win_rate"),
        *("val/rollout/response_length", "val/rollout/repetition", "val/win_rate/rule"),
    ]
    ends = ["val/win_rate_low", "val/win_rate_high", "val/win_rate_low/rule"]
    drawn, areas = panels_of(monkeypatch, tmp_path, [*names, *ends])
    assert sorted(label for labels in drawn.values() for label in labels) == sorted(names)
    assert areas == 1, "the interval is an area, not a line"
    assert drawn["scores by each reward and judge"] == [
        "judge/held out",
        "scores/rule",
        "val/scores/rule",
    ]


@pytest.mark.parametrize("half", ["val/win_rate_low", "val/win_rate_high"])
def test_half_an_interval_is_none(monkeypatch, tmp_path, half):
    drawn, areas = panels_of(monkeypatch, tmp_path, ["val/win_rate", half])
    assert areas == 0 and len(drawn) == 1


def test_no_curve_stands_in_two_panels():
    names = [name for _, panel in curves._CURVES for name in panel]
    assert len(names) == len(set(names))
