"""The report of an evaluation: what it says of several models, as Markdown and as numbers."""

import json
import math
from dataclasses import replace

import pytest

from lit_llm.errors import UserError
from lit_llm.evaluation.evaluation_page import visible
from lit_llm.evaluation.evaluation_report import compare_models, write_report
from lit_llm.evaluation.results import (
    Answer,
    Items,
    Measurement,
    ModelResults,
    TaskResult,
    measure,
)
from lit_llm.evaluation.win_rate import Judgement, WinRate

COMMAND = "python recipes/evaluate.py base --compare sft"
COUNT = 80


def accuracy(task, right, metric="acc", **changes):
    """A measurement of 80 items of which the first ones are right, in two halves."""
    values = [float(n < right) for n in range(COUNT)]
    parts = ["history" if n % 2 else "law" for n in range(COUNT)]
    keys = [f"{task}-{n}" for n in range(COUNT)]
    items = Items(keys, values, [1.0] * COUNT, changes.pop("parts", parts))
    return measure(task, metric, items, **changes)


def perplexity(task, nats):
    items = Items([f"{task}-{n}" for n in range(COUNT)], [nats * 9.0] * COUNT, [9.0] * COUNT)
    return measure(task, "perplexity", items, better="lower", scale="exp")


def answer(task, item, text, right=1.0, **changes):
    return Answer(task, item, f"What is {item}?", text, "42", {"acc": right}, **changes)


def result(task, category, *measured, answers=(), **changes):
    return TaskResult(
        task, category, list(measured), list(answers), settings={"limit": COUNT}, **changes
    )


def model(name, nats=2.0, mmlu=40, gsm8k=10, text="42", **changes):
    answers = [answer("gsm8k", f"q{n}", text, float(text == "42")) for n in range(6)]
    tasks = [
        result("wiki", "perplexity", perplexity("wiki", nats), seconds=1.5),
        result("mmlu", "facts", accuracy("mmlu", mmlu, chance=0.25), seconds=2.0),
        result("gsm8k", "reasoning", accuracy("gsm8k", gsm8k, parts=[]), answers=answers),
        TaskResult("bbh", "reasoning", skipped="there is no bbh in /data, and no network"),
    ]
    return ModelResults(name, f"/runs/{name}", tasks, {"parameters": 1_234_567, **changes})


def page_of(folder, models, **changes):
    path = write_report(folder, models, **{"command": COMMAND, **changes})
    assert path == folder / "evaluation.md"
    assert sorted(one.name for one in folder.iterdir()) == [
        "evaluation.html",
        "evaluation.json",
        "evaluation.md",
    ]
    return path.read_text(encoding="utf-8")


def section(page, title):
    return page.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_the_verdict_comes_first_and_says_it_plainly(tmp_path):
    page = page_of(tmp_path, [model("base"), model("sft", nats=2.1, mmlu=20, gsm8k=60)])
    assert page.startswith("# Evaluation\n\n## What can be said\n\n")
    said = section(page, "What can be said")
    # Every document lost the same 0.1 nats a token; 20 of 80 answers were lost, 50 of 80 won.
    assert "sft against base: 1 better, 2 worse, 0 without a certain difference." in said
    worse, better = said.index("**sft is worse than base on**"), said.index("**sft is better than")
    assert worse < said.index("- wiki perplexity: 7.389 → 8.166 (+0.777, ") < better
    assert worse < said.index("- mmlu acc: 0.500 → 0.250 (-0.250, ") < better
    assert better < said.index("- gsm8k acc: 0.125 → 0.750 (+0.625, ")
    assert "**Not run**\n\n- bbh: there is no bbh in /data, and no network" in said


def test_nothing_is_claimed_of_equal_models(tmp_path):
    page = page_of(tmp_path, [model("base"), model("twin")])
    said = section(page, "What can be said")
    assert "0 better, 0 worse, 3 without a certain difference." in said
    assert "twin is not certainly worse than base on any number, of 3 compared." in said
    assert "wiki perplexity, mmlu acc, gsm8k acc." in said
    alone = page_of(tmp_path / "alone", [model("base")])
    assert "base is the only model: nothing is compared." in alone
    assert "(baseline)" not in alone
    with pytest.raises(UserError, match="no model was evaluated"):
        write_report(tmp_path, [], command=COMMAND)


def test_tables_hold_values_intervals_chance_and_marks(tmp_path):
    page = page_of(tmp_path, [model("base"), model("sft", mmlu=20, gsm8k=14)])
    summary = section(page, "Summary").strip().splitlines()
    assert summary[0] == "| number | base (baseline) | sft |"
    assert summary[1] == "|---|---:|---:|"
    # Wilson's interval of 40, 20, 10 and 14 of 80, as in any table of it.
    assert summary[3:] == [
        "| mmlu acc (higher is better, chance 0.250) | 0.500 (0.393 to 0.607) "
        "| 0.250 (0.168 to 0.355) ▼ worse -0.250 |",
        "| gsm8k acc (higher is better) | 0.125 (0.069 to 0.215) | 0.175 (0.107 to 0.273) +0.050 |",
    ]
    assert section(page, "Facts").strip().splitlines()[2] == summary[3]
    parts = section(page, "Facts").split("### mmlu acc by part (2)")[1].strip().splitlines()
    assert parts[0] == "| part | items | base | sft |"
    # Even numbers are law: of the first 40 or 20 items, half.
    assert parts[2] == "| history | 40 | 0.500 (0.352 to 0.648) | 0.250 (0.142 to 0.402) |"
    assert "by part" not in section(page, "Reasoning"), "gsm8k has no parts"


def test_stages_are_compared_with_the_one_before(tmp_path):
    models = [model("pretrain", mmlu=20), model("sft", mmlu=60), model("ppo", mmlu=40)]
    stages = page_of(tmp_path / "stages", models, stages=True, title="Life cycle")
    assert stages.startswith("# Life cycle\n")
    assert "**ppo is worse than sft on**\n\n- mmlu acc: 0.750 → 0.500" in stages
    assert "| number | pretrain | sft (against pretrain) | ppo (against sft) |" in stages
    first = page_of(tmp_path / "first", models)
    assert "**ppo is better than pretrain on**\n\n- mmlu acc: 0.250 → 0.500" in first
    numbers = json.loads((tmp_path / "stages" / "evaluation.json").read_text())
    assert [(one["before"], one["after"]) for one in numbers["comparisons"]] == [
        ("pretrain", "sft"),
        ("sft", "ppo"),
    ]
    assert numbers["regressions"][0].startswith("sft is not certainly worse than pretrain")
    assert numbers["regressions"][1].startswith("ppo is worse than sft on mmlu acc: 0.750 → 0.500")


def test_many_comparisons_are_corrected_together():
    # 8 of 80 items won and 1 lost: p is 0.039 by itself, and certain among few only.
    def one(name, count):
        tasks = []
        for n in range(count):
            values = [float(i < 40) for i in range(COUNT)]
            if name == "b" and n == 0:
                values[40:48], values[0] = [1.0] * 8, 0.0
            items = Items([str(i) for i in range(COUNT)], values, [1.0] * COUNT)
            tasks.append(result(f"t{n}", "facts", measure(f"t{n}", "acc", items)))
        return ModelResults(name, name, tasks)

    for count, verdict in ((1, "better"), (2, "no certain difference")):
        (found,) = compare_models([one("a", count), one("b", count)])
        assert found.changes[0].p_value == pytest.approx(20 / 512)
        assert found.changes[0].adjusted == pytest.approx(count * 20 / 512)
        assert found.changes[0].verdict == verdict


def test_win_rates_are_shown_and_judged(tmp_path):
    won = measure(
        "open",
        "win_rate",
        Items([str(n) for n in range(50)], [1.0] * 40 + [0.5] * 4 + [0.0] * 6, [1.0] * 50),
        chance=0.5,
    )
    even = Measurement("open", "length_controlled_win_rate", 0.55, 0.44, 0.66, 50, chance=0.5)
    kept = [Judgement("open", "1", "either", 1.0, "secret reply")]
    rate = WinRate("base", "sft", "file.py:longer", won, even, 40, 4, 6, 0.08, (20.0, 31.5), kept)
    models = [model("base"), model("sft", mmlu=20)]
    page = page_of(tmp_path, models, win_rates=[rate])
    assert section(page, "Whose answers are better").strip().splitlines()[-1] == (
        "| sft against base (judge: file.py:longer) | 0.840 (0.715 to 0.917) "
        "| 0.550 (0.440 to 0.660) | 40 / 4 / 6 | 0.080 | 31.5 / 20.0 |"
    )
    assert "- open win rate by file.py:longer: 0.500 → 0.840 (+0.340, " in page
    assert "sft against base: 1 better, 1 worse, 2 without" in page
    numbers = json.loads((tmp_path / "evaluation.json").read_text())
    assert numbers["win_rates"][0]["judgements"] == 1
    assert numbers["win_rates"][0]["measurement"]["value"] == pytest.approx(0.84)
    assert "secret reply" not in json.dumps(numbers)


def test_json_holds_numbers_and_no_items(tmp_path):
    broken = Measurement("odd", "gap", math.nan, math.nan, math.nan, 0)
    models = [model("base", dtype=float), model("sft", mmlu=20)]
    models[1] = replace(models[1], tasks=[*models[1].tasks, result("odd", "other", broken)])
    page = page_of(tmp_path, models)
    numbers = json.loads(
        (tmp_path / "evaluation.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    mmlu = numbers["models"][1]["tasks"][1]
    assert mmlu["measurements"][0] == {
        "task": "mmlu",
        "metric": "acc",
        "value": 0.25,
        "low": pytest.approx(0.168, abs=1e-3),
        "high": pytest.approx(0.355, abs=1e-3),
        "count": COUNT,
        "better": "higher",
        "ideal": None,
        "chance": 0.25,
        "scale": "mean",
    }
    assert numbers["models"][1]["tasks"][2]["answers"] == 6
    assert numbers["models"][1]["tasks"][-1]["measurements"][0]["value"] is None
    assert numbers["command"] == COMMAND
    change = numbers["comparisons"][0]["changes"][1]
    assert change["verdict"] == "worse" and change["paired"] and change["count"] == COUNT
    # 20 items lost and none won.
    assert change["p_value"] == pytest.approx(2 * 0.5**20)
    assert "| odd gap (higher is better) | - | - |" in page


def test_the_same_input_gives_the_same_files(tmp_path):
    for name in ("a", "b"):
        page_of(tmp_path / name, [model("base"), model("sft", mmlu=20)])
    for name in ("evaluation.md", "evaluation.html", "evaluation.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_samples_show_first_what_models_differ_on(tmp_path):
    def one(name, texts):
        answers = [answer("t", f"q{n}", text, float(text == "42")) for n, text in enumerate(texts)]
        return ModelResults(name, name, [result("t", "facts", accuracy("t", 1), answers=answers)])

    same = ["42", "7", "42", "42", "42", "42"]
    page = page_of(tmp_path, [one("base", same), one("sft", [*same[:4], "13", "41"])])
    shown = section(page, "Samples")
    assert [line for line in shown.splitlines() if line.startswith("**t, item")] == [
        "**t, item q4**",
        "**t, item q5**",
        "**t, item q0**",
    ]
    assert "### t (4 of 6 items)" in shown, "the HTML page shows four"
    first = shown.split("**t, item q5**")[0]
    assert "Prompt:\n\n```text\nWhat is q4?\n```" in first
    assert "Right answer:\n\n```text\n42\n```" in first
    assert "base (acc 1.000):\n\n```text\n42\n```" in first
    assert "sft (acc 0.000):\n\n```text\n13\n```" in first


def test_a_model_without_an_answer_is_told(tmp_path):
    late = answer("gsm8k", "q9", "", 0.0, stopped=False, generated=True)
    chosen = answer("gsm8k", "q9", "B", 0.0, generated=False)
    models = [model("base"), model("sft"), model("ppo")]
    for place, own in ((1, [late]), (2, [chosen])):
        task = result("gsm8k", "reasoning", accuracy("gsm8k", 5), answers=own)
        models[place] = replace(models[place], tasks=[task])
    shown = section(page_of(tmp_path, models), "Samples")
    assert "base (no answer to this item):" in shown
    assert "sft (acc 0.000, empty, cut off):" in shown
    assert "ppo (acc 0.000, chosen from several):" in shown


def test_lengths_count_what_was_written(tmp_path):
    texts = [("one two three", True), ("one two three", False), ("", True), ("a b c d e f", None)]
    written = [
        answer("t", str(n), text, stopped=stopped) for n, (text, stopped) in enumerate(texts)
    ]
    chosen = answer("t", "9", "a very long choice that nobody wrote at all", generated=False)
    tasks = [
        result("t", "facts", accuracy("t", 1), answers=[*written, chosen]),
        result("u", "facts", accuracy("u", 1), answers=[replace(chosen, task="u")]),
    ]
    page = page_of(tmp_path, [ModelResults("base", "base", tasks)])
    assert section(page, "Length of answers").strip().splitlines()[2:] == [
        "| task | base |",
        "|---|---:|",
        "| t | 3 (mean 3.0, longest 6, 1 of 4 empty, 67 % end by themselves) |",
    ]


def test_no_name_or_answer_breaks_the_page(tmp_path):
    nasty = "a|b\n# no heading\n```\n</script><b>bold</b> \u202egnp.exe \x1b[31m \ud800"
    name = "x_ _y_ | <b>`z`</b>\n- [l](m) &amp;"
    answers = [Answer("t|u", "1\n2", nasty, nasty, nasty, {"a|b": 1.0})]
    task = result("t|u", "facts", accuracy("t|u", 3), answers=answers)
    page = page_of(tmp_path, [ModelResults(name, "so|urce", [task]), model("sft")])
    shown = nasty.replace("\u202e", "⟨U+202E⟩").replace("\x1b", "⟨U+001B⟩").replace("\ud800", "�")
    assert page.count(f"````text\n{shown}\n````") == 3, "in a longer fence than its own"
    outside = page.replace(shown, "")
    assert "<b>" not in outside.replace("\\<b\\>", "")
    assert (
        "| number | x\\_ \\_y\\_ \\| \\<b\\>\\`z\\`\\</b\\> - \\[l\\](m) \\&amp; (baseline) |"
        in page
    )
    rows = [line for line in section(page, "Summary").splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {4}
    assert "python recipes/evaluate.py base" in page


def test_what_cannot_be_seen_is_written_out():
    assert visible("a\tb\nc\r\nd") == "a\tb\nc\nd"
    assert visible("\x00\x85\x7f\r\u2028") == "⟨U+0000⟩⟨U+0085⟩⟨U+007F⟩⟨U+000D⟩⟨U+2028⟩"
    turning = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    assert visible(turning) == "".join(f"⟨U+{ord(one):04X}⟩" for one in turning)
    assert visible("\udfff") == "\N{REPLACEMENT CHARACTER}"
    family = "مرحبا \U0001f469\u200d\U0001f4bb é"
    assert visible(family) == family, "right-to-left text and emoji are text"
