"""Rows that begin alike are read once, and score as if they had been read one by one."""

import random

import pytest
import torch

from lit_llm.evaluation import prefixes
from lit_llm.evaluation.windows import Window, score_windows
from tests.evaluation.tiny_models import log_probs, model


def choices(seed=0, questions=4, start=140):
    """Questions of some length with choices of 1 to 6 tokens, and one without company."""
    rng = random.Random(seed)
    windows = []
    for number in range(questions):
        question = [rng.randrange(3, 60) for _ in range(start + number)]
        for length in (1, 1, 3, 6, 2):
            windows.append(
                Window([*question, *(rng.randrange(3, 60) for _ in range(length))], length)
            )
    windows.append(Window([5] * 150, 4))
    windows.append(Window([7, 8, 9], 2))
    rng.shuffle(windows)
    return windows


def by_hand(network, window):
    """Log-probabilities of the targets from one forward of one window."""
    found = log_probs(network, window.ids[:-1])[-window.targets :]
    targets = torch.tensor(window.ids[-window.targets :])
    nll = -found.gather(1, targets[:, None]).sum()
    return float(nll), bool((found.argmax(1) == targets).all())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [4096, 90])
def test_scores_are_those_of_single_forwards(kind, batch_tokens):
    network = model(kind, positions=256)
    windows = choices()
    scores = score_windows(network, windows, pad_token_id=0, batch_tokens=batch_tokens)
    for window, score in zip(windows, scores, strict=True):
        nll, greedy = by_hand(network, window)
        assert score.nll == pytest.approx(nll, abs=1e-4)
        assert score.greedy == greedy


def test_the_common_beginning_is_read_once():
    network = model("llama", positions=256)
    read = []
    hook = lambda module, args, given: read.append(given["input_ids"].shape)  # noqa: E731
    handle = network.register_forward_pre_hook(hook, with_kwargs=True)
    score_windows(network, choices(questions=3), pad_token_id=0)
    handle.remove()
    beginnings = sorted(width for rows, width in read if rows == 1 and width > 100)
    # The last token of a question predicts the first of a choice, so it is read with the choices.
    assert beginnings == [139, 140, 141]
    assert sum(rows * width for rows, width in read if width < 100) <= 3 * 5 * 7


def test_short_beginnings_and_lonely_rows_stay_in_full_batches():
    assert prefixes.common_beginnings({(1,) * 120 + (2,): 1, (1,) * 120 + (3,): 1}) == {}
    assert prefixes.common_beginnings({(1,) * 300: 2}) == {}
    rows = {(1,) * 140 + (2, 5): 2, (1,) * 140 + (3,): 1}
    assert list(prefixes.common_beginnings(rows)) == [(1,) * 140]


def test_an_architecture_without_a_plain_cache_reads_row_by_row(monkeypatch):
    from lit_llm.evaluation import windows as module

    network, windows = model("llama", positions=256), choices()
    expected = score_windows(network, windows, pad_token_id=0)
    monkeypatch.setattr(module, "has_plain_cache", lambda model: False)
    monkeypatch.setattr(prefixes, "rest_statistics", None)
    plain = score_windows(network, windows, pad_token_id=0)
    assert [s.nll for s in plain] == pytest.approx([s.nll for s in expected], abs=1e-4)
