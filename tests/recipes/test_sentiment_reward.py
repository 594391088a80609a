"""The example of a reward function: a judge that learns which words are positive."""

import gzip
import json
import math
from pathlib import Path

import pytest
from rewards.sentiment import Judge, positive, read_labelled, trained_judge

from lit_llm.data.splits import split_position
from lit_llm.errors import UserError
from lit_llm.rollout.rewards import RewardSample, load_reward_function, score_samples

GOOD, BAD = ["fine", "warm", "funny", "moving"], ["dull", "cold", "stale", "boring"]
THINGS = ["plot", "cast", "score", "ending", "camera", "story", "script", "pace", "mood", "joke"]
RECIPE = str(Path(__file__).parents[2] / "recipes" / "rewards" / "sentiment.py")


def records() -> list[dict]:
    """Each text says two things with words of one mood, so no text is in the other half."""
    return [
        {"text": f"The {a} is {mood[i % 4]}, and the {b} {mood[(i + j) % 4]}.", "label": label}
        for label, mood in enumerate((BAD, GOOD))
        for i, a in enumerate(THINGS)
        for j, b in enumerate(THINGS)
    ]


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "reviews.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records())
    return str(path)


def sample(response: str, prompt: str = "The plot is", messages=None) -> RewardSample:
    return RewardSample(prompt, response, [1], [2], True, messages)


def test_what_sounds_positive_scores_higher(data: str) -> None:
    function = load_reward_function(f"{RECIPE}:positive", {"data": data})
    samples = [sample(f" {word} and {word}.") for word in [*BAD, *GOOD]]
    scores = score_samples("mood", function, samples).tolist()
    assert max(scores[:4]) < -0.5 and min(scores[4:]) > 0.5
    neutral = score_samples("mood", function, [sample(""), sample("", ""), sample(" zyx")])
    assert neutral.abs().max() < 0.3


def test_the_optimum_is_that_of_the_penalised_likelihood() -> None:
    some = records()[::7]
    texts, labels = [one["text"] for one in some], [one["label"] for one in some]
    judge = Judge(texts, labels, decay=1.0)
    # At the optimum the gradient is zero: decay * w = sum of (label - probability) * feature.
    errors = []
    for text, label in zip(texts, labels, strict=True):
        errors.append(label - 1 / (1 + math.exp(-judge.log_odds(text))))
    assert sum(errors) == pytest.approx(0, abs=1e-3)
    for word in ("fine", "cold", "the plot"):
        pull = 0.0
        for text, error in zip(texts, errors, strict=True):
            words = "".join(c for c in text.lower() if c not in ",.").split()
            pairs = {f"{a} {b}" for a, b in zip(["<", *words], [*words, ">"], strict=True)}
            known = [feature for feature in {*words, *pairs} if feature in judge.numbers]
            if word in known:
                pull += error / math.sqrt(len(known))
        assert judge.weights[judge.numbers[word]] == pytest.approx(pull, abs=1e-3)
    assert Judge(texts, labels, decay=1.0).weights.tolist() == judge.weights.tolist()


def test_the_two_judges_learn_from_other_texts_and_are_told_once(data: str, monkeypatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("rewards.sentiment.rank_zero_info", lines.append)
    seen: dict[str, list[str]] = {}
    build = Judge.__init__
    monkeypatch.setattr(
        Judge,
        "__init__",
        lambda self, *a: (seen.setdefault("texts", []).append(a[0]), build(self, *a))[1],
    )
    trained_judge.cache_clear()
    for _ in range(2):
        for part in ("reward", "judge"):
            positive([sample(" fine")], data=data, part=part)
    first, second = map(set, seen["texts"])
    assert not first & second
    assert first | second == {record["text"] for record in records()}
    assert min(len(first), len(second)) > 70
    # By chance, and another chance than that of the splits.
    for half in (first, second):
        assert {len(text) % 2 for text in half} == {0, 1}
        assert {split_position(text) < 0.5 for text in half} == {True, False}
    assert len(lines) == 2
    assert f"the reward half ({len(first):,} texts)" in lines[0]
    # The words of either mood are in both halves.
    assert f"100.0% of the other half ({len(second):,} texts)" in lines[0]
    assert "the judge half" in lines[1]


def test_accuracy_is_that_of_texts_it_has_not_seen() -> None:
    judge = Judge(["good one", "good two", "bad one", "bad two"] * 5, [1, 1, 0, 0] * 5)
    assert judge.accuracy(["good three", "bad four", "bad good bad", "good"], [1, 0, 0, 0]) == 0.75


def test_what_is_told_is_the_accuracy_on_the_other_half(tmp_path: Path, monkeypatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("rewards.sentiment.rank_zero_info", lines.append)
    path = tmp_path / "noise.jsonl"
    # Words known by heart in one half, and unknown in the other: right by chance only.
    path.write_text(
        "\n".join(
            json.dumps({"text": f"w{i} w{i}x", "label": i % 2}) for i in range(400) for _ in "ab"
        ),
        encoding="utf-8",
    )
    trained_judge(str(path), "reward")
    assert "100.0%" not in lines[0]
    assert 30 < float(lines[0].partition("is right about ")[2].partition("%")[0]) < 70


def test_scores_are_clipped(data: str) -> None:
    samples = [sample(" fine, warm and funny."), sample(" dull, cold and stale.")]
    high, low = positive(samples, data=data, clip=0.25)
    assert (high, low) == (0.25, -0.25)


def test_of_a_conversation_the_response_is_judged(data: str) -> None:
    chat = [{"role": "user", "content": "so dull, cold and stale?"}]
    plain, asked, alone = positive(
        [
            sample(" fine", "so dull, cold and stale?"),
            sample(" fine", "so dull, cold and stale?", chat),
            sample(" fine", ""),
        ],
        data=data,
    )
    assert asked == alone > 0.5
    assert plain < 0


@pytest.mark.parametrize("label", ["good", 2, None, 0.5])
def test_labels_are_0_or_1(tmp_path: Path, label) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps({"text": "a", "label": label}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"labels.jsonl:1: the label must be 0 or 1"):
        list(read_labelled(str(path)))


def test_labels_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("text,label\nfine,1\ndull,0\n", encoding="utf-8")
    assert list(read_labelled(str(path))) == [("fine", 1), ("dull", 0)]


def test_mistakes_are_told_when_the_function_is_loaded(data: str, tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text('{"text": "fine", "label": 1}\n', encoding="utf-8")
    for options, words in (
        ({}, "missing a required argument: 'data'"),
        ({"data": str(tmp_path / "no.jsonl")}, "no such file"),
        ({"data": str(tmp_path / "few.jsonl")}, "either half needs texts of both labels"),
        ({"data": data, "part": "third"}, "part must be one of reward, judge, got 'third'"),
        ({"data": data, "clip": 0}, "clip must be above 0"),
    ):
        with pytest.raises(UserError, match=words):
            load_reward_function(f"{RECIPE}:positive", options)
