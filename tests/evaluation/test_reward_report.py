"""The report of a reward model: a page that text cannot break, numbers, a picture."""

import json
import math
from dataclasses import replace

import pytest
import torch

from lit_llm.evaluation.preference_measures import ScoredPairs, measure_pairs
from lit_llm.evaluation.reward_report import fenced, write_reward_report
from lit_llm.models.reward import RewardStatistics

LABELS = ["docs", "a|b_c"]


def pairs_of(count=120, source=0, **changes):
    """Every fourth pair is judged wrongly, the later the more confidently; calibrated."""
    number = torch.arange(count)
    gap = (1.2 + 0.001 * number) * torch.where(number % 4 == 3, -1, 1)
    lengths = 5 + number % 7
    return replace(
        ScoredPairs(
            better=gap,
            worse=torch.zeros(count),
            better_length=lengths,
            worse_length=lengths.flip(0),
            source=torch.full((count,), source),
            row=number // 2,
            index=number % 2,
            margin=torch.zeros(count),
        ),
        **changes,
    )


def about(source, row):
    return {
        "prompt": f"question {source}.{row}",
        "answers": ["worst", f"best of {row}", "second"],
        "pairs": [[1, 0], [1, 2]],
        "kinds": ["shuffled", "off|topic"] if source == 0 else None,
    }


def write(folder, scored, texts=about, **options):
    lengths = torch.tensor([[4, 2]])
    measures = {name: measure_pairs(pairs, lengths, LABELS) for name, pairs in scored.items()}
    verdict = write_reward_report(folder, scored, measures, texts, LABELS, **options)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    numbers = json.loads((folder / "reward_report.json").read_text(), parse_constant=refuse)
    assert not list(folder.glob("*.partial"))
    assert (folder / "reward_report.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "reward_report.md").read_text()
    assert page.startswith(f"# {verdict.headline}\n")
    return page, numbers


def test_the_page_says_verdict_accuracy_and_mistakes(tmp_path):
    page, numbers = write(tmp_path, {"test": pairs_of()}, mistakes=3)
    told = page[: page.index("## ")]
    assert r"In pairs of kind off\|topic it is right in 50.0 %" in told
    assert "not certainly better than a coin" in told and "kind shuffled" not in told
    assert page.startswith("# Reward model: fit to drive PPO\n")
    assert "- It is right in 75.0 % (95 % interval" in page
    assert "- Accuracy on a second set, out of distribution, was not checked." in page
    # 120 pairs of 60 prompts: of each prompt's first pairs none is wrong, of its second half.
    assert "| all held-out pairs | 75.0 % |" in page and "| 120 | 60 |" in page
    assert "| kind shuffled | 100.0 % |" in page
    assert r"| kind off\|topic | 50.0 % |" in page
    assert "| source" not in page, "one source needs no row"
    assert "There are none: PPO would get raw scores." in page
    assert "scores are not known: PPO would get raw scores." in told
    turned = pairs_of(index=1 - torch.arange(120) % 2, row=torch.arange(120))
    turned = replace(turned, better=turned.better.where(turned.index == 0, -turned.better))
    other, _ = write(tmp_path, {"test": turned})
    assert r"- In pairs of kind off\|topic it is right in 0.0 %" in other
    # The three most confident mistakes are the last: pairs 119, 115, 111, the second of their rows.
    assert "## The 3 most confident mistakes" in page
    titles = [line for line in page.splitlines() if line.startswith("### ")]
    assert titles == [rf"### {n}. docs, off\|topic" for n in (1, 2, 3)]
    shown = page[page.index("### 1.") : page.index("### 2.")]
    order = ["question 0.59", "scored -1.319", "best of 59", "scored 0.000", "second"]
    assert [shown.index(text) for text in order] == sorted(shown.index(text) for text in order)
    assert [(one["row"], one["pair"]) for one in numbers["mistakes"]] == [(59, 1), (57, 1), (55, 1)]
    assert numbers["mistakes"][0]["better_score"] == pytest.approx(-1.319)
    assert numbers["measures"]["test"]["accuracy"]["value"] == 0.75
    assert numbers["by_kind"]["test"]["off|topic"]["pairs"] == 60
    assert numbers["verdict"]["fit"] is True and numbers["statistics"] is None


def test_a_second_set_several_sources_heads_margins_and_statistics(tmp_path):
    test = pairs_of(source=0)
    source = (torch.arange(120) // 60).long()
    margin = 1.0 + torch.arange(120) % 3
    agreement = (torch.arange(120) % 2).float() / 2
    test = replace(test, source=source, margin=margin, agreement=agreement)
    ood = pairs_of(40, source=1, better=torch.full((40,), 8.0), worse=torch.full((40,), 6.0))
    statistics = RewardStatistics([0.25, 0.5], [1.0, 2.0], "mean_minus_std")
    page, numbers = write(
        tmp_path, {"test": test, "ood": ood}, statistics=statistics, reference_answers=1234
    )
    assert r"Out of distribution (a\|b\_c) it is right in 100.0 % (95 % interval" in page
    assert r"| out of distribution (a\|b\_c) | 100.0 % |" in page
    assert "PPO would get raw scores" not in page
    assert "| source docs | 75.0 % |" in page
    assert r"| source a\|b\_c | 75.0 % |" in page
    assert "| OOD, kind" not in page, "there are no kinds in the second set"
    assert r"| out of distribution (a\|b\_c) | 7.000 | 1.000 | 6.000 | 8.000 | 0 |" in page
    assert "do not agree on 50.0 %" in page
    assert "Measured on 1,234 reference answers. Aggregation over heads: mean_minus_std." in page
    assert "| 2 | 0.5000 | 2.0000 |" in page
    assert "## Accuracy by annotated margin" in page
    assert numbers["statistics"]["std"] == [1, 2]
    assert numbers["measures"]["ood"]["scores"]["mean"] == 7
    assert set(numbers["by_kind"]["test"]) == {"shuffled", "off|topic", "of no kind"}


def test_a_model_without_sense_still_gets_its_report(tmp_path):
    constant = torch.full((120,), 3.0)
    page, _ = write(tmp_path, {"test": pairs_of(better=constant, worse=constant)})
    assert page.startswith("# Reward model: NOT fit to drive PPO\n")
    assert "All scores are the same, 3." in page
    assert "## Mistakes\n\nThere are none." in page, "ties are no mistakes"
    lost = torch.full((120,), math.nan)
    page, numbers = write(tmp_path, {"test": pairs_of(better=lost, worse=lost)})
    assert "240 scores are not finite." in page and "No score is finite." in page
    assert numbers["measures"]["test"]["calibration"]["ece"] is None
    one, _ = write(tmp_path, {"test": pairs_of(1)})
    assert "There are 1 held-out pairs; at least 100 are needed." in one


def test_of_many_kinds_the_largest_are_shown(tmp_path):
    # Kind 0 has 40 pairs and kinds 1 to 24 four or three each, the earlier the more often.
    kinds = ["kind0"] * 40 + [f"small{n % 24 + 1:02}" for n in range(80)]

    def texts(source, row):
        return about(0, row) | {"kinds": kinds[2 * row : 2 * row + 2]}

    page, numbers = write(tmp_path, {"test": pairs_of()}, texts, held_out=130)
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| kind ")]
    assert [(row[0][7:], row[3]) for row in rows] == [
        ("kind0", "40"),
        *((f"small{n:02}", "4" if n <= 8 else "3") for n in range(1, 20)),
    ]
    (others,) = (line.split(" | ") for line in page.splitlines() if "| other kinds |" in line)
    assert others[3] == str(3 * 5)
    assert len(numbers["by_kind"]["test"]) == 25
    assert "Only 120 of 130 held-out pairs were scored." in page


def fences(page):
    """Contents of the fenced blocks by CommonMark: closed by as many backticks or more."""
    blocks, fence = [], None
    for line in page.splitlines():
        ticks = len(line) - len(line.lstrip("`"))
        if fence is None and ticks >= 3 and "`" not in line[ticks:]:
            fence, block = ticks, []
        elif fence is not None and ticks >= fence and not line[ticks:].strip():
            blocks.append("\n".join(block))
            fence = None
        elif fence is not None:
            block.append(line)
    assert fence is None
    return blocks


def test_no_text_breaks_the_page(tmp_path):
    nasty = "```\n# Heading\n`````\n|a|b|\n~~~~\n<script>\ud800 $x$"
    name = "x_y <b> `z` $w$ \n[l](m)"

    def texts(source, row):
        return about(0, row) | {"prompt": nasty, "answers": [nasty] * 3, "kinds": [name] * 2}

    page, _ = write(tmp_path, {"test": pairs_of()}, texts, mistakes=2)
    assert fences(page) == [nasty.replace("\ud800", "?")] * 6
    outside = page
    for block in set(fences(page)):
        outside = outside.replace(block, "")
    assert "<b>" not in outside and "# Heading" not in outside
    assert r"| kind x\_y \<b\> \`z\` $w$ \[l\](m) | 75.0 % |" in page


def test_a_long_text_shows_both_ends():
    text = "a" * 1000 + "b" * 1000
    assert fenced(text) == f"```text\n{'a' * 200} […] {'b' * 200}\n```"
    assert fenced("c" * 400) == f"```text\n{'c' * 400}\n```"
