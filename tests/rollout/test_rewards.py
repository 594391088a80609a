"""Reward functions: found, given their options, and held to one finite number a sample."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lit_llm.errors import UserError
from lit_llm.rollout.rewards import (
    RewardSample,
    checked_scores,
    load_reward_function,
    rule_names,
    score_samples,
)


def sample(response="yes", prompt="Is it?"):
    return RewardSample(prompt, response, [1, 2], [3, 4], True)


SAMPLES = [sample("a"), sample("bb"), sample("ccc")]


def write(folder: Path, text: str, name: str = "own.py") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def sentence(path, options=None) -> str:
    with pytest.raises(UserError) as caught:
        load_reward_function(path, options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----- what a function gives ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores",
    [
        [1, 2.5, -3],
        (1.0, 2.5, -3.0),
        (value for value in (1, 2.5, -3)),
        torch.tensor([1, 2.5, -3], dtype=torch.float64, requires_grad=True),
        np.array([1, 2.5, -3]),
        [np.float32(1), torch.tensor(2.5), -3],
    ],
)
def test_numbers_of_any_kind_are_scores(scores) -> None:
    found = checked_scores("own", scores, SAMPLES)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert found.tolist() == [1.0, 2.5, -3.0]


def test_truth_counts_as_one() -> None:
    assert checked_scores("own", [True, False, np.True_], SAMPLES).tolist() == [1, 0, 1]
    assert checked_scores("own", torch.tensor([True, False, True]), SAMPLES).tolist() == [1, 0, 1]
    assert checked_scores("own", [], []).shape == (0,)


@pytest.mark.parametrize(
    ("scores", "words", "culprit"),
    [
        ([1.0, math.nan, math.inf], "reward own: gave nan, where one finite", "'bb'"),
        ([1.0, 2.0, -math.inf], "gave -inf", "'ccc'"),
        ([1.0, 1e39, 0.0], "gave 1e+39", "'bb'"),  # infinite in float32
        ([1.0, 10**400, 0.0], "gave 1000", "'bb'"),
        ([1.0, None, 0.0], "gave None", "'bb'"),
        (["1.0", 2.0, 0.0], "gave '1.0'", "'a'"),
        ([1.0, 2.0, 1j], "gave 1j", "'ccc'"),
        (torch.zeros(3, 1), "gave [0.0]", "'a'"),
        (torch.zeros(3, 2), "gave [0.0, 0.0]", "'a'"),
        ([1.0, 2.0], "gave 2 scores for 3 samples", "'a'"),
        ([1.0] * 4, "gave 4 scores for 3 samples", "'a'"),
        ([], "gave 0 scores for 3 samples", "'a'"),
        (0.5, "gave 0.5", "'a'"),
        (torch.tensor(0.5), "gave 0.5", "'a'"),
        (None, "gave None", "'a'"),
        ("abc", "gave 'abc'", "'a'"),
        ({1.0, 2.0, 3.0}, "gave {1.0", "'a'"),  # no order
        ({"x": 1, "y": 2, "z": 3}, "gave {'x'", "'a'"),
    ],
)
def test_anything_else_is_told_with_the_sample(scores, words: str, culprit: str) -> None:
    with pytest.raises(UserError) as caught:
        checked_scores("own", scores, SAMPLES)
    assert words in str(caught.value)
    assert str(caught.value).endswith(f"the prompt is 'Is it?' and the response {culprit}.")


def test_a_message_shows_beginning_and_end_of_long_texts_on_one_line() -> None:
    long = "begin\n" + "x" * 5000 + "\nend"
    with pytest.raises(UserError) as caught:
        checked_scores("own", [math.nan], [sample(long, prompt=long)])
    text = str(caught.value)
    assert len(text) < 500 and "\n" not in text
    assert text.count("'begin\\n") == text.count("x\\nend'") == 2


def test_a_function_that_fails_is_told_with_the_sample_that_it_fails_on(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "def lengths(samples):\n    return [1 / (len(one.response) - 2) for one in samples]\n",
    )
    function = load_reward_function(f"{path}:lengths")
    assert score_samples("short", function, [SAMPLES[0], SAMPLES[2]]).tolist() == [-1.0, 1.0]
    with pytest.raises(UserError) as caught:
        score_samples("short", function, SAMPLES)
    text = str(caught.value)
    where = f"reward short: failed with ZeroDivisionError in {path}:2: "
    assert text.startswith(where) and "the response 'bb'." in text
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_failure_of_all_samples_together_only_is_told_without_one() -> None:
    def few(samples):
        if len(samples) > 1:
            raise MemoryError
        return [0.0]

    with pytest.raises(UserError, match=r"^reward few: failed with MemoryError in .*:\d+\.$"):
        score_samples("few", few, SAMPLES)


def test_the_line_told_is_the_users_own(tmp_path: Path) -> None:
    code = "import torch\ndef f(samples):\n    return torch.nn.Linear(2, 1)(torch.ones(3))"
    path = write(tmp_path, code)
    with pytest.raises(UserError, match=rf"RuntimeError in {path}:3: "):
        score_samples("f", load_reward_function(f"{path}:f"), SAMPLES)


# ----- where functions come from ------------------------------------------------------------------


def test_rules_are_known_by_name() -> None:
    assert rule_names() == ["exact_match", "length_window", "regex"]
    function = load_reward_function("length_window", {"longest": 2, "unit": "words"})
    assert score_samples("short", function, [sample("a b"), sample("a b c")]).tolist() == [1.0, 0.0]
    text = sentence("exact_mach")
    assert "no such rule; use one of exact_match, length_window, regex" in text
    assert "file.py:function" in text
    for hidden in ("_value", "Decimal", "UserError"):
        assert "no such rule" in sentence(hidden)


def test_functions_of_a_file_and_of_a_module(tmp_path: Path, monkeypatch) -> None:
    code = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Constant:\n    value: float\n"
        "    def __call__(self, samples): return [self.value] * len(samples)\n"
        "def scaled(samples, *, factor=2.0): return [factor * len(s.response) for s in samples]\n"
        "three = Constant(3.0)\n"
    )
    path = write(tmp_path, code)
    monkeypatch.syspath_prepend(tmp_path)
    for place in (path, "own"):
        plain = load_reward_function(f"{place}:scaled")
        assert list(plain(SAMPLES)) == [2.0, 4.0, 6.0]
        assert list(load_reward_function(f"{place}:scaled", {"factor": -1})(SAMPLES)) == [
            -1,
            -2,
            -3,
        ]
        assert list(load_reward_function(f"{place}:three")(SAMPLES)) == [3.0, 3.0, 3.0]
        assert "has no function 'scale'; it has: scaled" in sentence(f"{place}:scale")
        assert "has no function 'Constant'" in sentence(f"{place}:Constant")
        assert "has no function ''" in sentence(f"{place}:")


def test_a_file_does_not_take_the_place_of_a_module(tmp_path: Path) -> None:
    import statistics

    path = write(tmp_path, "def f(samples): return [0.0] * len(samples)", "statistics.py")
    load_reward_function(f"{path}:f")
    assert sys.modules["statistics"] is statistics


def test_places_that_lead_nowhere(tmp_path: Path, monkeypatch) -> None:
    assert "there is no file" in sentence(f"{tmp_path}/absent.py:f")
    assert "no module 'no_such_module' to import; name its file" in sentence("no_such_module:f")
    assert "no module 'torch.no_such' to import" in sentence("torch.no_such:f")
    assert "no module '' to import" in sentence(":f")
    broken = write(tmp_path, "def f(samples:\n    pass")
    assert f"{broken} cannot be imported: SyntaxError" in sentence(f"{broken}:f")
    lacking = write(tmp_path, "import not_installed_here\n", "lacking.py")
    text = sentence(f"{lacking}:f")
    assert f"ModuleNotFoundError in {lacking}:1: No module named 'not_installed_here'" in text
    monkeypatch.syspath_prepend(tmp_path)
    assert "lacking cannot be imported: ModuleNotFoundError" in sentence("lacking:f")


def test_options_are_checked_against_the_signature(tmp_path: Path) -> None:
    path = write(tmp_path, "def f(samples, data, clip=1.0): return [clip for _ in samples]")
    known = "it takes the samples, and the options: data, clip."
    for options, words in (
        ({}, "missing a required argument: 'data'"),
        ({"data": "x", "clop": 2}, "unexpected keyword argument 'clop'"),
        ({"data": "x", "samples": 2}, "multiple values for argument 'samples'"),
    ):
        text = sentence(f"{path}:f", options)
        assert words in text and text.endswith(known)
    assert list(load_reward_function(f"{path}:f", {"data": "x", "clip": 3})(SAMPLES)) == [3, 3, 3]


def test_functions_are_tried_without_samples(tmp_path: Path, monkeypatch) -> None:
    calls: list[int] = []
    monkeypatch.setitem(sys.modules, "spy", SimpleNamespace(calls=calls))
    path = write(
        tmp_path,
        "import spy\nfrom lit_llm.errors import UserError\n"
        "def f(samples, wrong=None):\n"
        "    spy.calls.append(len(samples))\n"
        "    if wrong == 'option': raise UserError('wrong must be right')\n"
        "    if wrong == 'file': open('/no/such/file')\n"
        "    if wrong == 'package': import not_installed_here\n"
        "    return [max(len(sample.response) for sample in samples)] * len(samples)\n",
    )
    function = load_reward_function(f"{path}:f")  # max() of nothing is not the user's mistake
    assert calls == [0]
    assert list(function(SAMPLES)) == [3, 3, 3]
    text = sentence(f"{path}:f", {"wrong": "option"})
    assert text == f"reward function {path}:f: wrong must be right."
    assert f"fails with FileNotFoundError in {path}:6: " in sentence(f"{path}:f", {"wrong": "file"})
    assert "fails with ModuleNotFoundError" in sentence(f"{path}:f", {"wrong": "package"})
    assert "pattern '(' is no regular" in sentence("regex", {"pattern": "("})
