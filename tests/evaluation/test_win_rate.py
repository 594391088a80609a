"""Win rates with judges whose verdicts are known, and the fit against scipy's optimiser."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import binomtest

from lit_llm.errors import UserError
from lit_llm.evaluation.judges import Verdict
from lit_llm.evaluation.results import Answer
from lit_llm.evaluation.win_rate import compare_answers


class Rule:
    """A judge by a function of the pair."""

    name = "rule"

    def __init__(self, rule, sees_order=True):
        self.rule = rule
        self.sees_order = sees_order
        self.asked = []

    def judge(self, pairs):
        self.asked += pairs
        given = [self.rule(pair) for pair in pairs]
        return [one if isinstance(one, Verdict) else Verdict(float(one), "said") for one in given]


def longer(pair):
    first, second = len(pair.first), len(pair.second)
    return 0.5 if first == second else first > second


def best(pair):
    """The answer with more "x" in it."""
    first, second = pair.first.count("x"), pair.second.count("x")
    return 0.5 if first == second else first > second


def wrote(*texts, task="ask", **more):
    return [Answer(task, f"i{n}", f"question {n}", text, **more) for n, text in enumerate(texts)]


def test_wins_of_the_second_model_are_counted() -> None:
    found = compare_answers(
        wrote("a", "a b x", "ab", "same"),
        wrote("a x", "a", "ba", "same"),
        Rule(best),
        names=("sft", "ppo"),
    )
    assert (found.first, found.second, found.judge) == ("sft", "ppo", "rule")
    assert (found.wins, found.ties, found.losses) == (1, 2, 1)
    assert found.measurement.value == 0.5
    assert found.measurement.items.numerators == [1.0, 0.0, 0.5, 0.5]
    assert found.measurement.items.keys == ["i0", "i1", "i2", "i3"]
    assert (found.measurement.metric, found.measurement.chance) == ("win_rate", 0.5)
    assert (found.measurement.task, found.measurement.better) == ("ask", "higher")
    assert found.position_bias == 0
    assert found.mean_words == (6 / 4, 5 / 4)
    assert (found.unreadable, found.unmatched) == (0, 0)


@pytest.mark.parametrize("favourite", [1.0, 0.0])
def test_a_judge_that_looks_at_the_place_only_decides_nothing(favourite) -> None:
    judge = Rule(lambda pair: favourite)
    found = compare_answers(wrote("a", "b", "c"), wrote("d", "e", "c"), judge)
    assert (found.wins, found.ties, found.losses) == (0, 3, 0)
    assert found.position_bias == 1.0
    assert found.measurement.value == 0.5


def test_a_verdict_in_one_order_only_is_a_tie() -> None:
    # Decides where the second model's answer "b" is shown first, and sees a tie otherwise.
    found = compare_answers(
        wrote("a", "x"), wrote("b", "y"), Rule(lambda p: 1.0 if p.first == "b" else 0.5)
    )
    assert (found.wins, found.ties, found.losses) == (0, 2, 0)
    assert found.position_bias == 0.5


def test_pairs_are_shown_in_both_orders_and_kept() -> None:
    judge = Rule(best)
    first = wrote("a", "same text", stopped=False)
    second = wrote("x", " same text\n", stopped=True)
    found = compare_answers(first, second, judge)
    shown = [(pair.first, pair.second, pair.stopped) for pair in judge.asked]
    assert shown == [("a", "x", (False, True)), ("x", "a", (True, False))]
    assert [(j.item, j.order, j.verdict, j.raw) for j in found.judgements] == [
        ("i0", "first-second", 1.0, "said"),
        ("i0", "second-first", 1.0, "said"),
        ("i1", "equal", 0.5, ""),
    ]
    assert json.loads(json.dumps(asdict(found)))["judgements"][0]["task"] == "ask"


def test_a_judge_without_an_order_is_asked_once() -> None:
    judge = Rule(best, sees_order=False)
    found = compare_answers(wrote("a", "xx"), wrote("x", "b"), judge)
    assert len(judge.asked) == 2
    assert [(j.order, j.verdict) for j in found.judgements] == [("either", 1.0), ("either", 0.0)]
    assert found.position_bias is None


def test_nothing_is_asked_about_equal_answers() -> None:
    judge = Rule(best)
    found = compare_answers(wrote("a", "b"), wrote("a", "b"), judge)
    assert judge.asked == []
    assert (found.ties, found.position_bias) == (2, None)
    assert found.length_controlled.value == pytest.approx(0.5)


def test_answers_are_matched_by_task_and_item() -> None:
    first = [
        *wrote("a", "b", "c"),
        *wrote("other", task="more"),
        Answer("ask", "twice", "q", "1"),
        Answer("ask", "twice", "q", "2x"),
        Answer("ask", "choice", "q", "chosen", generated=False),
    ]
    second = [
        Answer("ask", "choice", "q", "chosen x", generated=False),
        *wrote("x", task="more"),
        Answer("ask", "twice", "q", "1x"),
        Answer("ask", "twice", "q", "2"),
        *wrote("", "xb")[::-1],
        Answer("ask", "alone", "q", "x"),
    ]
    found = compare_answers(first, second, Rule(best))
    own = found.measurement.items
    rows = list(zip(own.subsets, own.keys, own.numerators, strict=True))
    assert sorted(rows) == [
        ("ask", "i0", 0.5),
        ("ask", "i1", 1.0),
        ("ask", "twice", 0.0),
        ("ask", "twice", 1.0),
        ("more", "i0", 1.0),
    ]
    assert found.measurement.task == "all"
    assert found.unmatched == 2  # "c", and "alone"
    with pytest.raises(UserError, match="ppo against sft: .* no item in common"):
        compare_answers(first[:1], second[:1], Rule(best), names=("sft", "ppo"))


def test_replies_that_cannot_be_read_are_ties_and_counted() -> None:
    def rule(pair):
        return Verdict(0.5, "hm", readable=False) if pair.first == "x" else best(pair)

    found = compare_answers(wrote("a", "b"), wrote("x", "xb"), Rule(rule))
    assert (found.wins, found.ties) == (1, 1)
    assert found.unreadable == 1
    assert found.position_bias == 0  # of the one pair that was judged twice


def test_what_was_asked() -> None:
    judge = Rule(best, sees_order=False)
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    first = wrote("a", "a", "a", reference="so")
    compare_answers(first, wrote("x", "x", "x"), judge, asked={"i0": chat, "i1": "Once"})
    told = [(pair.prompt, pair.messages, pair.reference) for pair in judge.asked]
    assert told == [
        ("three", chat, "so"),
        ("Once", None, "so"),
        ("question 2", [{"role": "user", "content": "question 2"}], "so"),
    ]


def test_the_interval_is_wilsons() -> None:
    first = wrote(*["a"] * 40)
    second = wrote(*["x"] * 30, *["b"] * 10)
    found = compare_answers(first, second, Rule(best))
    assert found.measurement.value == 35 / 40
    expected = binomtest(35, 40).proportion_ci(method="wilson")
    assert found.measurement.low == pytest.approx(expected.low, abs=1e-6)
    assert found.measurement.high == pytest.approx(expected.high, abs=1e-6)


# ----- at equal length ----------------------------------------------------------------------------


def controlled(outcomes, lengths):
    """Compares answers of given lengths with given outcomes."""
    first = wrote(*["a" * mine for mine, _ in lengths])
    second = wrote(*["b" * its for _, its in lengths])
    by_item = dict(zip([a.prompt for a in first], outcomes, strict=True))
    rule = Rule(lambda pair: 1 - by_item[pair.prompt], sees_order=False)
    return compare_answers(first, second, rule)


def by_optimiser(outcomes, lengths) -> float:
    """The paper's regression, minimised by scipy."""
    delta = np.array([its - mine for mine, its in lengths], dtype=float)
    x = np.tanh(delta / delta.std())
    y = np.array(outcomes)

    def loss(weights):
        z = weights[0] + weights[1] * x
        nll = np.logaddexp(0, z) - y * z
        return nll.sum() + 0.5e-6 * weights[0] ** 2 + 0.05 * weights[1] ** 2

    found = minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9,
                     "fatol": 1e-12, "maxiter": 4000})  # fmt: skip
    return 1 / (1 + math.exp(-found.x[0]))


@pytest.mark.parametrize("seed", range(6))
def test_the_fit_is_the_optimum(seed) -> None:
    draws = np.random.default_rng(seed)
    count = [5, 12, 30, 80, 80, 200][seed]
    lengths = draws.integers(1, [9, 50, 50, 400, 3, 50][seed], size=(count, 2))
    slope = [0, 3, 30, 1, 1, -2][seed] * (lengths[:, 1] - lengths[:, 0]) / lengths.std()
    chance = 1 / (1 + np.exp(-(draws.normal() + slope)))
    outcomes = np.where(draws.random(count) < 0.2, 0.5, draws.random(count) < chance)
    found = controlled(outcomes.tolist(), lengths.tolist()).length_controlled
    assert found.value == pytest.approx(by_optimiser(outcomes, lengths.tolist()), abs=1e-5)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert (found.metric, found.chance, found.items) == ("length_controlled_win_rate", 0.5, None)


def test_where_lengths_are_equal_nothing_is_controlled() -> None:
    outcomes = [1.0] * 7 + [0.5] + [0.0] * 2
    for lengths in ([(5, 5)] * 10, [(5, 9)] * 10):  # or differ by the same
        assert controlled(outcomes, lengths).length_controlled.value == pytest.approx(0.75)


def test_a_judge_of_length_is_seen_through() -> None:
    # The second model writes more in most answers, and only the length decides, mostly.
    draws = np.random.default_rng(0)
    mine, its = draws.integers(10, 60, 300), draws.integers(20, 90, 300)
    x = np.tanh((its - mine) / (its - mine).std())
    outcomes = (draws.random(300) < 1 / (1 + np.exp(-4 * x))).astype(float).tolist()
    found = controlled(outcomes, list(zip(mine.tolist(), its.tolist(), strict=True)))
    assert found.measurement.value > 0.68
    assert found.length_controlled.low < 0.5 < found.length_controlled.high
    # Where the length decides nothing, nothing is taken away.
    by_chance = (draws.random(300) < 0.7).astype(float).tolist()
    found = controlled(by_chance, list(zip(mine.tolist(), its.tolist(), strict=True)))
    assert found.length_controlled.value == pytest.approx(0.7, abs=0.06)


def test_winning_always_has_the_interval_of_a_share() -> None:
    found = controlled([1.0] * 12, [(n, 2 * n + 1) for n in range(1, 13)])
    own = found.length_controlled
    assert 0.99 < own.value <= 1
    assert (own.low, own.high) == (found.measurement.low, found.measurement.high)
    assert own.low == pytest.approx(binomtest(12, 12).proportion_ci(method="wilson").low, abs=1e-6)


def test_resamples_are_the_same_every_time() -> None:
    lengths = [(n % 7 + 1, n % 5 + 1) for n in range(40)]
    outcomes = [float(n % 3 == 0) for n in range(40)]
    own, again = (controlled(outcomes, lengths).length_controlled for _ in range(2))
    assert own == again
    assert own.low < own.value < own.high
