"""Whether two models differ: intervals, p-values, their correction, and what is said of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lit_llm.evaluation.comparison import (
    ModelChanges,
    compare,
    compare_with,
    holm,
    number,
    regressions,
    student_p,
)
from lit_llm.evaluation.results import Items, Measurement, measure


def shares(values, keys=None, **changes):
    keys = keys or [str(n) for n in range(len(values))]
    items = Items(keys, [float(value) for value in values], [1.0] * len(values))
    return measure("task", "acc", items, **changes)


def ratios(above, below, metric="perplexity", keys=None, **changes):
    keys = keys or [str(n) for n in range(len(above))]
    items = Items(keys, [float(one) for one in above], [float(one) for one in below])
    return measure("wiki", metric, items, better="lower", **changes)


def without_items(value, low, high, **changes):
    return Measurement("task", "acc", value, low, high, 100, **changes)


def test_right_and_wrong_items_are_compared_by_mcnemar():
    before = shares([1] * 40 + [0] * 60)
    after = shares([1] * 35 + [0] * 5 + [1] * 20 + [0] * 40)  # 5 lost, 20 won
    change = compare(before, after)
    assert change.p_value == pytest.approx(stats.binomtest(5, 25, 0.5).pvalue, rel=1e-9)
    assert (change.before, change.after) == (0.4, 0.55)
    assert change.difference == pytest.approx(0.15)
    assert change.paired and change.count == 100 and change.verdict == "better"
    # A resample's difference has the mean and standard deviation of 100 draws of -1, 0 and 1.
    spread = math.sqrt((0.25 - 0.15**2) / 100)
    assert change.low == pytest.approx(0.15 - 1.96 * spread, abs=0.015)
    assert change.high == pytest.approx(0.15 + 1.96 * spread, abs=0.015)
    back = compare(after, before)
    assert back.verdict == "worse" and back.p_value == change.p_value
    assert compare(replace(before, better="lower"), replace(after, better="lower")).verdict == (
        "worse"
    )
    assert compare(replace(before, better=None), replace(after, better=None)).verdict == "differs"


def test_many_items_do_not_overflow():
    before, after = shares([1] * 9_000 + [0] * 11_000), shares([0] * 9_000 + [1] * 11_000)
    expected = stats.binomtest(9_000, 20_000, 0.5).pvalue
    assert compare(before, after).p_value == pytest.approx(expected, rel=1e-6)


def test_items_are_matched_by_their_keys():
    keys = [f"item {n}" for n in range(30)]
    values = [n % 3 == 0 for n in range(30)]
    same = compare(shares(values, keys), shares(values[::-1], keys[::-1]))
    assert same.paired and same.p_value == 1 and (same.low, same.high) == (0, 0)
    # Twenty of thirty are shared: only they count. On these, 10 are won and none lost.
    before = shares([0] * 20 + [1] * 10, keys)
    after = shares([1] * 10 + [0] * 10 + [0] * 10, keys[:20] + [f"other {n}" for n in range(10)])
    part = compare(before, after)
    assert part.paired and part.count == 20
    assert (part.before, part.after) == (0.0, 0.5)
    assert part.p_value == pytest.approx(2 * 0.5**10)
    # A key that comes twice stands for two items.
    twice = compare(shares([0, 1], ["a", "a"]), shares([1, 0], ["a", "a"]))
    assert twice.count == 2 and twice.difference == 0 and twice.low < 0 < twice.high


def test_other_numbers_are_compared_by_a_paired_t_test():
    generator = np.random.default_rng(1)
    hard = generator.normal(size=40)
    first, second = hard, hard + 0.1 + 0.3 * generator.normal(size=40)
    change = compare(shares(first), shares(second))
    assert change.p_value == pytest.approx(stats.ttest_rel(second, first).pvalue, rel=1e-6)
    drawn = stats.bootstrap((second - first,), np.mean, method="percentile", n_resamples=4000)
    assert change.low == pytest.approx(drawn.confidence_interval.low, abs=0.02)
    assert change.high == pytest.approx(drawn.confidence_interval.high, abs=0.02)
    # What is hard for both is not noise: as sets of their own, nothing could be said.
    apart = compare(shares(first), shares(second, [f"x{n}" for n in range(40)]))
    assert not apart.paired
    assert apart.high - apart.low > 3 * (change.high - change.low)


@pytest.mark.parametrize(
    ("t", "freedom"), [(0.3, 1), (2.5, 1), (2.0, 3), (-4.0, 29), (2.1, 40_000)]
)
def test_the_t_distribution(t, freedom):
    assert student_p(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=1e-3)


def test_perplexities_are_compared_by_document():
    generator = np.random.default_rng(2)
    tokens = generator.integers(20, 400, size=60)
    rate = generator.normal(3, 0.5, size=60)
    before = ratios(rate * tokens, tokens, scale="exp")
    after = ratios((rate - 0.02 + 0.01 * generator.normal(size=60)) * tokens, tokens, scale="exp")
    change = compare(before, after)
    assert change.verdict == "better" and change.paired
    mean = (rate * tokens).sum() / tokens.sum()
    assert change.before == pytest.approx(math.exp(mean))
    # Each perplexity alone is known to some percent only; their ratio to a fraction of one.
    assert before.high - before.low > 10 * (change.high - change.low)
    ratio = 1 + change.difference / change.before
    assert change.low / change.before == pytest.approx(ratio - 1 - 0.003, abs=0.002)


def test_other_tokens_make_perplexities_incomparable():
    keys = ["a", "b", "c"]
    before = ratios([30, 60, 90], [10, 20, 30], keys=keys, scale="exp")
    after = ratios([30, 60, 90], [12, 24, 30], keys=keys, scale="exp")
    change = compare(before, after)
    assert change.verdict == "not comparable" and math.isnan(change.p_value)
    assert change.note == "they cut the text into other tokens (60 and 66): compare bits_per_byte"
    # Windows cut in other places are other items of the same text.
    cut = compare(before, ratios([30, 60, 90], [15, 20, 25], keys=keys, scale="exp"))
    assert not cut.paired and cut.note is None
    # A model's own answers have lengths of their own, and are still its answers to the same items.
    own = [
        ratios([30, 60, 90], sizes, "self_perplexity", keys, scale="exp")
        for sizes in ([10, 20, 30], [12, 24, 30])
    ]
    assert compare(*own).paired


def test_two_intervals_give_newcombes():
    # Newcombe 1998, "Interval estimation for the difference between independent proportions",
    # table II, method 10, case (a): 56 of 70 against 48 of 80 is 0.0524 to 0.3339.
    before, after = (
        shares([1] * 48 + [0] * 32),
        shares([1] * 56 + [0] * 14, [f"x{n}" for n in range(70)]),
    )
    change = compare(before, after)
    assert not change.paired and change.count == 70
    assert change.low == pytest.approx(0.0524, abs=5e-5)
    assert change.high == pytest.approx(0.3339, abs=5e-5)
    assert change.p_value < 0.05 and change.verdict == "better"
    # The p-value crosses 0.05 exactly where the interval reaches 0.
    for high, certain in ((0.5999, True), (0.6001, False)):
        found = compare(without_items(0.5, 0.4, high), without_items(0.6, 0.6, 0.6))
        assert (found.low > 0) == certain == (found.p_value < 0.05)


def test_what_counts_may_be_the_distance_to_an_ideal():
    keyed = {"better": "ideal", "ideal": 0.5}
    closer = compare(shares([1] * 90 + [0] * 10, **keyed), shares([1] * 60 + [0] * 40, **keyed))
    assert closer.difference == pytest.approx(-0.3) and closer.verdict == "better"
    assert closer.high < 0
    # From 0.9 to 0.1 is a large difference, and no step towards 0.5.
    across = compare(shares([1] * 90 + [0] * 10, **keyed), shares([1] * 10 + [0] * 90, **keyed))
    assert across.difference == pytest.approx(0) and across.verdict == "no certain difference"
    # From 0.55 to 0.1: on the other side, and farther.
    farther = compare(shares([1] * 55 + [0] * 45, **keyed), shares([1] * 10 + [0] * 90, **keyed))
    assert farther.difference == pytest.approx(0.35) and farther.verdict == "worse"
    assert "(distance to 0.5 +0.350, " in str(farther)
    apart = compare(without_items(0.55, 0.5, 0.6, **keyed), without_items(0.1, 0.05, 0.15, **keyed))
    assert apart.difference == pytest.approx(0.35) and apart.verdict == "worse"
    assert (apart.low, apart.high) == pytest.approx((0.35 - 0.0707, 0.35 + 0.0707), abs=1e-3)


def test_too_little_is_never_certain():
    # A constant difference has no variance; of four items even that is 1 in 8 by chance.
    four = compare(shares([0.1, 0.2, 0.3, 0.4]), shares([0.2, 0.3, 0.4, 0.5]))
    assert four.p_value == pytest.approx(2**-3) and four.verdict == "no certain difference"
    one = compare(shares([0]), shares([1]))
    assert one.verdict == "no certain difference"
    single = compare(ratios([3], [1]), ratios([2], [1]))
    assert single.note == "one of the two has no interval"
    rounding = compare(shares([0.1, 0.2, 0.3] * 9), shares([0.1 + 1e-13, 0.2, 0.3] * 9))
    assert rounding.p_value == 1


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_number_that_is_none_is_not_compared(lost):
    items = Items(["a", "b"], [lost, 1.0], [1.0, 1.0])
    broken = Measurement("task", "acc", lost, lost, lost, 2, items=items)
    for pair in ((broken, shares([1, 0])), (shares([1, 0]), broken)):
        change = compare(*pair)
        assert change.verdict == "not comparable"
        assert change.note == "one of the two has no finite value"


def test_a_win_rate_is_compared_with_one_half():
    won = compare_with(0.5, shares([1] * 30 + [0.5] * 10 + [0] * 10))
    assert won.difference == pytest.approx(0.2) and won.verdict == "better" and won.paired
    values = [1] * 30 + [0.5] * 10 + [0] * 10
    assert won.p_value == pytest.approx(stats.ttest_1samp(values, 0.5).pvalue, rel=1e-6)
    controlled = compare_with(0.5, without_items(0.45, 0.39, 0.52))
    assert controlled.verdict == "no certain difference"


def test_holm():
    # Holm's own procedure, step by step: of 0.01, 0.03, 0.04 and 0.02 only 4 · 0.01 is below 0.05.
    change = compare(shares([1, 0]), shares([0, 1]))
    given = (0.01, 0.03, 0.04, 0.02, math.nan)
    found = holm([replace(change, p_value=p, adjusted=p) for p in given])
    assert [one.adjusted for one in found[:4]] == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert math.isnan(found[4].adjusted), "what has no p-value does not count"
    assert [one.adjusted for one in holm([replace(change, p_value=0.9)] * 2)] == [1.0, 1.0]


def test_regressions_are_sentences():
    before, after = shares([1] * 80 + [0] * 20), shares([1] * 40 + [0] * 60)
    worse = compare(before, after)
    whole = ModelChanges("sft", "ppo", [worse, compare(before, before)])
    (sentence,) = regressions([whole])
    interval = f"95 % interval {worse.low:+.3f} to {worse.high:+.3f}"
    assert sentence == (f"ppo is worse than sft on task acc: 0.800 → 0.400 (-0.400, {interval}).")
    fine = ModelChanges("pretrain", "sft", [compare(after, before)])
    assert regressions([fine, whole]) == [
        "sft is not certainly worse than pretrain on any number, of 1 compared.",
        sentence,
    ]
    assert regressions([]) == []
    lost = compare(before, shares([math.nan] * 100))
    assert regressions([ModelChanges("sft", "ppo", [worse, lost])]) == [
        sentence,
        "ppo has no finite value where sft has: task acc.",
    ]
    assert regressions([ModelChanges("sft", "ppo", [lost])])[0].startswith("ppo has no finite")
    doubtful = replace(worse, adjusted=0.06)
    assert "not certainly worse" in regressions([ModelChanges("a", "b", [doubtful])])[0]


@pytest.mark.parametrize(
    ("value", "sign", "shown"),
    [
        (0.5234, "", "0.523"),
        (0.00512, "+", "+0.0051"),
        (12.345, "", "12.35"),
        (-1234.56, "", "-1,234.6"),
        (2.5e7, "", "2.50e+07"),
        (0.0, "+", "+0.000"),
        (math.nan, "+", "-"),
        (math.inf, "", "inf"),
    ],
)
def test_numbers_for_people(value, sign, shown):
    assert number(value, sign) == shown


def test_the_ends_of_an_interval_have_the_decimals_of_their_number():
    assert number(0.0098, "+", 0.017) == "+0.010"
    assert number(101.26, "", 98.3) == "101.26"
