"""Every pair once, in one order, whatever the batches; what fills up batches left out."""

import pytest
import torch

from lit_llm.evaluation.pair_metrics import PairMetrics


def batch_of(prompts, weight=1.0):
    """Prompts (row, scores of its answers), of which the first answer is the best."""
    rows, pairs, first = [], [], 0
    for row, scores in prompts:
        for index in range(1, len(scores)):
            pairs.append((first, first + index, row, index - 1, weight / (len(scores) - 1)))
        rows += scores
        first += len(scores)
    labels = torch.full((len(rows), 6), -100)
    for number in range(len(rows)):
        labels[number, : 1 + number % 5] = 7
    columns = list(zip(*pairs, strict=True))
    batch = {
        "labels": labels,
        "pairs": torch.tensor(columns[:2]).T,
        "pair_row": torch.tensor(columns[2]),
        "pair_index": torch.tensor(columns[3]),
        "pair_source": torch.zeros(len(pairs), dtype=torch.long),
        "pair_group": torch.tensor(columns[2]),
        "pair_weights": torch.tensor(columns[4]),
        "margins": torch.zeros(len(pairs)),
    }
    return torch.tensor(rows), batch


def add(metric, prompts, loss=1.0, weight=1.0, agreement=None):
    values, batch = batch_of(prompts, weight)
    details = {"logps": values * 10}
    metric.update(torch.tensor(loss), values, details, batch, agreement)


def test_means_and_pairs_by_hand():
    metric = PairMetrics()
    add(metric, [(1, [2.0, 1.0, 3.0])], loss=0.5)
    add(metric, [(0, [4.0, 4.0])], loss=1.5)
    means, pairs = metric.judged()
    assert pairs.row.tolist() == [0, 1, 1]
    assert pairs.index.tolist() == [0, 0, 1]
    assert pairs.better.tolist() == [4.0, 2.0, 2.0]
    assert pairs.worse.tolist() == [4.0, 1.0, 3.0]
    assert pairs.better_length.tolist() == [1, 1, 1]
    assert pairs.worse_length.tolist() == [2, 2, 3]
    assert pairs.agreement is None
    assert means["loss"] == 1.0  # two prompts
    assert means["accuracy"] == 0.5  # a tie, one right, one wrong
    assert means["margin"] == pytest.approx(0.0)
    assert means["values/better"] == pytest.approx(8 / 3)
    assert means["logps/worse"] == pytest.approx(80 / 3)


def test_what_fills_up_a_batch_is_left_out():
    metric = PairMetrics()
    add(metric, [(0, [1.0, 0.0])], agreement=torch.tensor([0.5]))
    add(metric, [(0, [0.0, 9.0])], loss=0.0, weight=0.0, agreement=torch.tensor([0.0]))
    means, pairs = metric.judged()
    assert len(pairs) == 1 and means["accuracy"] == 1.0 and means["loss"] == 1.0
    assert pairs.agreement.tolist() == [0.5]


def test_nothing_but_filler_and_nothing_at_all_are_no_pairs():
    metric = PairMetrics()
    assert metric.judged() == ({}, None)
    add(metric, [(0, [0.0, 9.0])], loss=0.0, weight=0.0)
    assert metric.judged() == ({}, None)


def test_reset_begins_anew():
    metric = PairMetrics()
    add(metric, [(0, [1.0, 0.0])])
    assert len(metric.judged()[1]) == 1
    metric.reset()
    assert metric.judged() == ({}, None)
