"""The report: curves across a resume, the table, the picture."""

import csv

from lit_llm.evaluation.report import plot_curves, read_metrics, results_table, write_report


def write_csv(folder, version, rows):
    path = folder / "metrics" / f"version_{version}" / "metrics.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "train/loss", "val/loss"])
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
