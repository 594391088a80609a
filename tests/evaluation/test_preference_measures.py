"""Intervals against scipy, simulation and hand; calibration, length and the verdict by hand."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from lit_llm.evaluation.intervals import (
    paired_difference,
    pearson,
    rate,
    rates_by,
    rates_by_quantile,
    spearman,
    wilson_interval,
)
from lit_llm.evaluation.preference_measures import (
    ScoredPairs,
    accuracy_interval,
    calibrate,
    measure_pairs,
)
from lit_llm.evaluation.reward_verdict import judge

EVEN = torch.tensor([[5, 3], [3, 5], [9, 2]])  # training pairs in which the longer is better


def scored(better, worse, better_length=None, worse_length=None, rows=None, **more):
    better, worse = torch.tensor(better), torch.tensor(worse)
    count = len(better)
    ones = torch.ones(count, dtype=torch.long)
    rows = torch.arange(count) if rows is None else torch.as_tensor(rows)
    values = {
        "better_length": ones if better_length is None else torch.as_tensor(better_length),
        "worse_length": ones if worse_length is None else torch.as_tensor(worse_length),
        "source": 0 * ones,
        "row": rows,
        "index": 0 * ones,
        "margin": torch.zeros(count),
    }
    return ScoredPairs(better.float(), worse.float(), **values | more)


def good_pairs(count=400, seed=0):
    """Scores whose differences mean what the Bradley-Terry model says, and no length in them."""
    generator = torch.Generator().manual_seed(seed)
    gap = 2 * torch.randn(count, generator=generator)
    right = torch.rand(count, generator=generator) < gap.abs().sigmoid()
    gap = torch.where(right, gap.abs(), -gap.abs())
    lengths = torch.randint(5, 90, (2, count), generator=generator)
    return scored((gap / 2).tolist(), (-gap / 2).tolist(), lengths[0], lengths[1])


# ----- intervals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "count"), [(0, 3), (8, 10), (73, 100), (500, 500), (1, 400)])
def test_one_pair_a_prompt_is_plain_wilson(right, count):
    found = rate(torch.tensor([1.0] * right + [0.0] * (count - right)), torch.arange(count) * 7)
    expected = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert (found.value, found.pairs, found.prompts) == (right / count, count, count)
    assert found.effective == count


def test_effective_pairs_by_hand():
    correct = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0])
    found = rate(correct, torch.tensor([9, 9, 4, 4, 1, 1, 2]))
    # Residuals of the prompts in 7ths: 6, -8, -1, 3; p (1 - p) = 12/49.
    variance = 4 / 3 * (36 + 64 + 1 + 9) / 49 / 49
    assert found.effective == pytest.approx(12 / 49 / variance)
    assert 4 < found.effective < 4.01 and (found.pairs, found.prompts) == (7, 4)
    assert (found.low, found.high) == wilson_interval(4 / 7, found.effective)


def test_copies_of_a_pair_say_nothing_new():
    correct = (torch.arange(50) % 3 > 0).double()
    once = rate(correct, torch.arange(50))
    copied = rate(correct.repeat(5), torch.arange(50).repeat(5))
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high), abs=1e-9)
    all_right = rate(torch.ones(60), torch.arange(60) // 6)
    assert all_right.effective == 10, "no variance to be seen: only prompts count"
    alike = rate(torch.tensor([1.0, 0.0] * 20), torch.arange(40) // 2)
    assert alike.effective == 40, "never more than there are pairs"
    assert rate(torch.tensor([1.0, 0.0, 1.0]), torch.zeros(3)).effective == 1


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = plain = 0
    for _ in range(400):
        shares = np.repeat(rng.beta(1.4, 0.6, 80), 6)  # mean 0.7, prompts differ a lot
        correct = torch.from_numpy((rng.random(480) < shares).astype(float))
        found = rate(correct, torch.arange(480) // 6)
        held += found.low <= 0.7 <= found.high
        low, high = wilson_interval(found.value, 480)
        plain += low <= 0.7 <= high
    assert 0.92 < held / 400 < 0.98
    assert plain / 400 < 0.85, "pairs taken for independent promise too much"


def test_the_paired_difference_is_that_of_a_bootstrap_over_prompts():
    rng = np.random.default_rng(1)
    prompts = rng.integers(0, 150, 400)
    ease = rng.normal(size=150)[prompts]
    first = (ease + rng.normal(size=400) > -0.8).astype(float)
    second = (ease + rng.normal(size=400) > 0).astype(float)
    found = paired_difference(*map(torch.from_numpy, (first, second, prompts)))
    assert found.value == pytest.approx(first.mean() - second.mean())
    sums = np.bincount(prompts, first - second, 150), np.bincount(prompts, minlength=150)
    drawn = rng.integers(0, 150, (4000, 150))
    means = sums[0][drawn].sum(1) / sums[1][drawn].sum(1)
    assert (found.low, found.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)
    one = paired_difference(torch.ones(3), torch.zeros(3), torch.zeros(3))
    assert (one.value, one.low, one.high) == (1, -1, 1)


def test_groups_and_equal_shares():
    correct = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5, 0.0])
    prompts = torch.arange(6)
    groups = rates_by(correct, prompts, ["b", "a", "b", "a", "b", "b"])
    assert {k: (v.value, v.pairs) for k, v in groups.items()} == {"a": (0.5, 2), "b": (0.625, 4)}
    values = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    bands = rates_by_quantile(correct, prompts, values, count=3)
    assert [(b.low, b.high, b.accuracy.value) for b in bands] == [
        (1, 2, 0.25),
        (3, 4, 1),
        (5, 6, 0.5),
    ]
    same = rates_by_quantile(correct, prompts, torch.ones(6))
    assert [(band.low, band.accuracy.pairs) for band in same] == [(1, 6)]
    assert rates_by_quantile(correct[:0], prompts[:0], values[:0]) == []


def test_correlations_are_scipy_s_with_ties():
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 9, 60), rng.normal(size=60).round(1)
    y = y + 0.1 * x
    a, b = torch.from_numpy(x), torch.from_numpy(y)
    assert pearson(a, b) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert spearman(torch.ones(4), torch.arange(4)) == 0 == pearson(torch.arange(0), torch.ones(0))


# ----- measures -----------------------------------------------------------------------------------


def test_accuracy_counts_ties_one_half_and_what_is_no_number_as_wrong():
    nan, inf = math.nan, math.inf
    pairs = scored([1.0, 0.0, 2.0, nan, inf], [0.0, 1.0, 2.0, 0.0, 3.0])
    assert pairs.correct.tolist() == [1, 0, 0.5, 0, 1]
    found = accuracy_interval(pairs)
    assert (found.value, found.pairs) == (0.5, 5)
    part = pairs.select(torch.tensor([True, False, True, False, False]))
    assert len(part) == 2 and accuracy_interval(part).value == 0.75 and part.agreement is None
    # Row 3 of one source is another prompt than row 3 of another.
    twice = scored([1.0] * 3, [0.0] * 3, rows=[3, 3, 3], source=torch.tensor([0, 1, 1]))
    assert accuracy_interval(twice).prompts == 2


def test_calibration_by_hand():
    def gap(confidence):
        return math.log(confidence / (1 - confidence))

    gaps = torch.tensor([gap(0.52), gap(0.58), gap(0.99), gap(0.91)], dtype=torch.float64)
    found = calibrate(gaps, torch.tensor([1.0, 0.0, 1.0, 0.5]), torch.arange(4), bins=5)
    assert [(b.low, b.high, b.accuracy.value) for b in found.bins] == [
        (0.5, 0.6, 0.5),
        (0.9, 1.0, 0.75),
    ]
    assert [b.confidence for b in found.bins] == pytest.approx([0.55, 0.95])
    assert found.ece == pytest.approx((2 * 0.05 + 2 * 0.2) / 4)
    assert (found.confidence, found.accuracy) == pytest.approx((0.75, 0.625))
    sure = calibrate(torch.tensor([0.0, 1e9]), torch.tensor([0.5, 1.0]), torch.arange(2))
    assert sure.ece == 0 and [b.low for b in sure.bins] == pytest.approx([0.5, 0.95])
    assert calibrate(gaps[:0], gaps[:0], gaps[:0]).bins == []


def test_measures_of_a_set():
    pairs = scored(
        [2.0, 1.0, 0.0, 5.0],
        [1.0, 2.0, 0.0, math.nan],
        better_length=[9, 4, 7, 6],
        worse_length=[3, 8, 7, 5],
        rows=[0, 0, 1, 2],
        source=torch.tensor([1, 1, 1, 0]),
        margin=torch.tensor([1.0, 3.0, 1.0, 1.0]),
        agreement=torch.tensor([1.0, 0.5, 0.0, 0.25]),
    )
    found = measure_pairs(pairs, EVEN, ["first", "second"])
    assert (found.accuracy.value, found.accuracy.prompts) == (0.375, 3)
    assert {k: v.value for k, v in found.by_source.items()} == {"first": 0, "second": 0.5}
    assert {k: (v.value, v.pairs) for k, v in found.by_length.items()} == {
        "better is longer": (0.5, 2),
        "better is shorter": (0, 1),
        "both are as long": (0.5, 1),
    }
    assert [(b.low, b.accuracy.pairs) for b in found.by_difference] == [(0, 1), (1, 2)]
    assert [(b.low, b.accuracy.value) for b in found.by_margin] == [(1, 0.5), (3, 0)]
    assert sum(one.accuracy.pairs for one in found.calibration.bins) == 3, "finite ones only"
    values = [2.0, 1.0, 0.0, 5.0, 1.0, 2.0, 0.0]
    assert found.scores.mean == pytest.approx(np.mean(values))
    assert found.scores.std == pytest.approx(np.std(values))
    assert (found.scores.least, found.scores.most, found.scores.not_finite) == (0, 5, 1)
    assert (found.better.mean, found.worse.mean) == (2, 1)
    assert found.heads_disagree == 0.5
    expected = stats.spearmanr(values, [9, 4, 7, 6, 3, 8, 7]).statistic
    assert found.length.spearman == pytest.approx(expected)
    assert measure_pairs(scored([1.0], [0.0]), EVEN, ["a"]).heads_disagree is None


def test_the_length_judge_learns_its_direction_from_training():
    pairs = scored(
        [1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 2.0, 0.0], [5, 5, 2, 4], [9, 2, 6, 4]
    )  # the model is right, right, wrong, right; the better one is shorter, longer, shorter, equal
    longer = measure_pairs(pairs, EVEN, ["a"]).length
    assert (longer.judge, longer.judge_accuracy.value) == ("longer", 0.375)
    assert longer.advantage.value == pytest.approx(0.75 - 0.375)
    shorter = measure_pairs(pairs, EVEN.flip(1), ["a"]).length
    assert (shorter.judge, shorter.judge_accuracy.value) == ("shorter", 0.625)
    assert shorter.advantage.value == pytest.approx(0.125)
    # Of the three with different lengths the scores are for the shorter, the longer, the longer.
    one, two = (1 / (1 + math.exp(-gap)) for gap in (1, 2))
    assert longer.longer_by_model == pytest.approx((1 - one + one + two) / 3)
    assert longer.longer_by_data == pytest.approx(1 / 3)
    assert longer.lean.value == pytest.approx((1 + two) / 3 - 1 / 3)
    same = measure_pairs(scored([1.0], [0.0]), EVEN[:0], ["a"]).length
    assert (same.judge, same.longer_by_model, same.lean.value) == ("longer", 0.5, 0)


# ----- the verdict --------------------------------------------------------------------------------


def verdict_of(pairs, ood=None, lengths=EVEN):
    measures = [measure_pairs(p, lengths, ["docs", "forum"]) for p in (pairs, ood) if p is not None]
    return judge(*measures)


def test_a_good_model_is_fit_and_the_numbers_are_said():
    pairs = good_pairs()
    verdict = verdict_of(pairs, good_pairs(seed=1))
    assert verdict.fit and not verdict.cautions and len(verdict.reasons) == 6
    accuracy = 100 * float((pairs.better > pairs.worse).double().mean())
    assert f"right in {accuracy:.1f} % (95 % interval" in verdict.reasons[0]
    alone = verdict_of(pairs)
    assert alone.fit and alone.cautions == [
        "Accuracy on a second set, out of distribution, was not checked."
    ]


def swapped(pairs, chosen):
    better, worse = pairs.better, pairs.worse
    return replace(pairs, better=better.where(~chosen, worse), worse=worse.where(~chosen, better))


GOOD = good_pairs()
TWO_SOURCES = replace(GOOD, source=(torch.arange(400) % 4 == 0).long())


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (GOOD.select(torch.arange(400) < 99), "There are 99 held-out pairs; at least 100"),
        (swapped(GOOD, torch.arange(400) % 2 == 0), "not certainly more often than a coin"),
        (
            swapped(TWO_SOURCES, TWO_SOURCES.source == 1),
            r"In forum it is right in .* of 100 pairs: chosen and rejected may be swapped",
        ),
        (replace(GOOD, better_length=GOOD.worse_length + 1), "not certainly better than length"),
        (replace(GOOD, worse=GOOD.worse.where(GOOD.row > 0, math.inf)), "1 scores are not finite"),
        (replace(GOOD, better=0 * GOOD.better + 7, worse=0 * GOOD.worse + 7), "are the same, 7"),
        (replace(GOOD, better=9 * GOOD.better, worse=9 * GOOD.worse), "ECE is 0.2.* at most 0.15"),
        (replace(GOOD, better=GOOD.better / 50, worse=GOOD.worse / 50), "say 50.* at most 0.15"),
        (
            replace(
                GOOD,
                better_length=(50 + 40 * GOOD.better.tanh()).long(),
                worse_length=(50 + 40 * GOOD.worse.tanh()).long(),
            ),
            r"not certainly better than length alone: \+0.0 points",  # it is nothing else
        ),
    ],
)
def test_one_failed_check_is_enough(pairs, message):
    verdict = verdict_of(pairs)
    assert not verdict.fit
    assert any(re.search(message, reason) for reason in verdict.reasons), verdict
    assert not any("are finite and differ" in reason for reason in verdict.reasons)


def test_the_second_set_is_a_check_too():
    for ood, message in (
        (good_pairs(20, seed=3), None),
        (swapped(GOOD, torch.arange(400) % 2 == 0), r"Out of distribution \(docs\) .* coin"),
        (swapped(TWO_SOURCES, TWO_SOURCES.source == 1), "In forum .* swapped there, or what was"),
    ):
        verdict = verdict_of(GOOD, ood)
        if message is None:
            assert verdict.fit, "few pairs are enough for the second set if they are certain"
        else:
            assert not verdict.fit
            assert any(re.search(message, reason) for reason in verdict.reasons)


def test_length_that_the_data_want_is_a_caution():
    # People prefer longer answers, among other things, and the model has learned just that.
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 90, (2, 1000), generator=generator)
    scores = 0.05 * lengths + 0.7 * torch.randn(2, 1000, generator=generator)
    first = torch.rand(1000, generator=generator) < (scores[0] - scores[1]).sigmoid()

    def sorted_by(chosen):
        def pick(values):
            return values[0].where(chosen, values[1]), values[1].where(chosen, values[0])

        better, worse = pick(scores)
        return scored(better.tolist(), worse.tolist(), *pick(lengths))

    verdict = verdict_of(sorted_by(first))
    assert verdict.fit, verdict
    assert "PPO will follow the data's own taste for length" in verdict.cautions[0]
    # The same scores where the data want length a little, or not at all.
    quality = scores - 0.05 * lengths
    for taste, longer_wins in ((0.01, True), (-0.01, False)):
        wanted = quality + taste * lengths
        pairs = sorted_by(wanted[0] > wanted[1])
        share = measure_pairs(pairs, EVEN, ["docs"]).length.longer_by_data
        assert (share > 0.55) == longer_wins and (share < 0.45) != longer_wins
        plain = verdict_of(pairs)
        assert any("does not explain" in reason for reason in plain.reasons), plain


def test_length_that_differs_between_prompts_only_is_not_wanted_by_the_data():
    # Some prompts have long answers and high scores, but no pair prefers the longer one.
    quality = good_pairs(400)
    prompt = torch.arange(400)
    long_first = prompt % 2
    pairs = replace(
        quality,
        better=quality.better + 0.05 * prompt,
        worse=quality.worse + 0.05 * prompt,
        better_length=20 + 2 * prompt + long_first,
        worse_length=20 + 2 * prompt + 1 - long_first,
    )
    verdict = verdict_of(pairs)
    assert any("correlation of score and length is +0.9" in text for text in verdict.reasons)


def test_a_kind_that_is_judged_the_wrong_way_is_a_caution():
    measures = measure_pairs(GOOD, EVEN, ["docs"])
    kinds = {"near": rate(torch.zeros(30), torch.arange(30)), "far": measures.accuracy}
    kinds["few"] = rate(torch.zeros(29), torch.arange(29))  # says too little
    kinds["even"] = rate(torch.arange(50) % 2, torch.arange(50))
    verdict = judge(measures, measures, kinds)
    assert verdict.fit and len(verdict.cautions) == 2
    assert verdict.cautions[0].startswith("In pairs of kind near it is right in 0.0 % (95 %")
    assert verdict.cautions[0].endswith("it prefers the worse answer, and PPO would too.")
    assert verdict.cautions[1].startswith("In pairs of kind even it is right in 50.0 %")
    assert verdict.cautions[1].endswith("it is not certainly better than a coin.")


def test_few_prompts_are_a_caution():
    pairs = good_pairs()
    verdict = verdict_of(replace(pairs, row=torch.arange(400) % 29))
    assert any("29 prompts only" in caution for caution in verdict.cautions)


def test_what_was_not_measured_is_a_caution():
    measures = measure_pairs(GOOD, EVEN, ["docs"])
    whole = judge(measures, measures, held_out=400)
    assert whole.fit and not whole.cautions
    verdict = judge(measures, measures, has_statistics=False, held_out=1401)
    assert verdict.fit and verdict.cautions == [
        "Only 400 of 1,401 held-out pairs were scored.",
        "Mean and standard deviation of the scores are not known: PPO would get raw scores.",
    ]


def test_the_interval_holds_with_prompts_of_very_different_sizes():
    """90 prompts with one pair and 10 with 36, all pairs of a prompt alike: the worst case."""
    sizes = torch.tensor([1] * 90 + [36] * 10)
    prompts = torch.arange(100).repeat_interleave(sizes)
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(300):
        right = (torch.rand(100, generator=generator) < 0.7).double()
        found = rate(right.repeat_interleave(sizes), prompts)
        held += found.low <= 0.7 <= found.high
    assert held / 300 > 0.9


def test_a_prompt_that_stands_in_several_rows_is_one_prompt():
    pairs = replace(GOOD, group=torch.zeros(len(GOOD), dtype=torch.long))
    assert GOOD.prompts.unique().numel() > 1
    assert pairs.prompts.unique().numel() == 1
    assert pairs.select(pairs.better > 0).group is not None


def test_a_source_that_is_judged_as_by_a_coin_is_a_caution():
    half = torch.arange(len(TWO_SOURCES)) % 8 == 0  # every second pair of the forum
    verdict = verdict_of(swapped(TWO_SOURCES, half))
    told = [text for text in verdict.cautions if "not certainly better than a coin" in text]
    assert len(told) == 1 and told[0].startswith("In forum it is right in")
