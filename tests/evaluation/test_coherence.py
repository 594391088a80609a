"""Measures of written answers, each counted by hand."""

import math

import pytest

from lit_llm.evaluation.coherence import coherence_measurements
from lit_llm.evaluation.results import Answer

TEXTS = {
    "plain": "The fox jumps over the dog.",  # the fox jumps over the dog .
    "loop": "no no no no no",
    "short": "Yes",
    "empty": " \n",
}
STOPPED = {"plain": True, "loop": False, "short": None, "empty": True}


def answers(texts=TEXTS):
    return [
        Answer("ask", item, f"about {item}?", text, stopped=STOPPED[item])
        for item, text in texts.items()
    ]


def by_metric(found):
    return {one.metric: one for one in found}


def values(one):
    return dict(zip(one.items.keys, one.items.numerators, strict=True))


def test_every_measure_is_what_is_counted_by_hand() -> None:
    found = by_metric(coherence_measurements("ask", answers()))
    assert values(found["repetition"]) == pytest.approx(
        {"plain": 0, "loop": 2 / 3, "short": 0, "empty": 0}
    )
    assert values(found["distinct_1"]) == pytest.approx(
        {"plain": 6 / 7, "loop": 1 / 5, "short": 1.0}
    )
    assert values(found["distinct_2"]) == pytest.approx({"plain": 1.0, "loop": 1 / 4})
    assert values(found["words"]) == {"plain": 6, "loop": 5, "short": 1, "empty": 0}
    assert values(found["stop_rate"]) == {"plain": 1, "loop": 0, "empty": 1}
    assert values(found["empty_rate"]) == {"plain": 0, "loop": 0, "short": 0, "empty": 1}
    assert found["words"].value == 3.0
    assert found["stop_rate"].value == pytest.approx(2 / 3)
    assert found["distinct_2"].value == pytest.approx(5 / 8)
    assert "self_perplexity" not in found
    assert all(one.task == "ask" for one in found.values())


def test_the_directions() -> None:
    own = [(1.0, 1)] * 4
    found = by_metric(coherence_measurements("ask", answers(), own))
    assert {name: one.better for name, one in found.items()} == {
        "repetition": "lower",
        "distinct_1": "higher",
        "distinct_2": "higher",
        "corpus_distinct_1": None,
        "corpus_distinct_2": None,
        "self_perplexity": None,
        "words": None,
        "stop_rate": "higher",
        "empty_rate": "lower",
    }


def test_the_same_answer_to_everything_shows_over_all_of_them() -> None:
    same = [Answer("ask", str(n), "?", "it is so") for n in range(10)]
    found = by_metric(coherence_measurements("ask", same))
    assert found["distinct_1"].value == found["distinct_2"].value == 1
    assert found["corpus_distinct_1"].value == pytest.approx(3 / 30)
    assert found["corpus_distinct_2"].value == pytest.approx(2 / 20)
    assert math.isnan(found["corpus_distinct_2"].low)
    assert found["corpus_distinct_2"].items is None


def test_case_and_punctuation() -> None:
    found = by_metric(coherence_measurements("ask", [Answer("ask", "1", "?", "No, NO, no!")]))
    assert found["distinct_1"].value == pytest.approx(3 / 6)  # no , no , no !
    assert found["words"].value == 3
    dots = by_metric(coherence_measurements("ask", [Answer("ask", "1", "?", "." * 12)]))
    assert dots["repetition"].value == pytest.approx(9 / 10)


def test_self_perplexity_weighs_tokens() -> None:
    own = [(7.0, 7), (1.0, 10), (4.0, 2), (0.0, 0)]
    found = by_metric(coherence_measurements("ask", answers(), own))["self_perplexity"]
    assert found.value == pytest.approx(math.exp(12 / 19))
    assert found.low < found.value < found.high
    assert values(found) == {"plain": 7, "loop": 1, "short": 4}
    assert found.items.denominators == [7, 10, 2]


def test_nothing_is_made_up() -> None:
    assert coherence_measurements("ask", [], []) == []
    unknown = coherence_measurements("ask", [Answer("ask", "1", "?", "")], [(0.0, 0)])
    assert {one.metric for one in unknown} == {"repetition", "words", "empty_rate"}
    with pytest.raises(ValueError, match="2 scores for 4 answers"):
        coherence_measurements("ask", answers(), [(1.0, 1)] * 2)
