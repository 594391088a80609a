"""Decay groups and the exactness of clipping."""

import math

import pytest
import torch
from torch import nn

from lit_llm.modules.base import decay_groups
from lit_llm.strategies.clipping import clip_grad_norm_


class Tied(nn.Module):
    """An embedding tied to a head, a norm and a linear layer with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight


def test_only_matrices_decay_and_tied_weights_count_once() -> None:
    model = Tied()
    decayed, kept = decay_groups(model)
    assert [id(p) for p in decayed["params"]] == [id(model.linear.weight)]
    assert {id(p) for p in kept["params"]} == {
        id(p)
        for p in (
            model.embedding.weight,
            model.norm.weight,
            model.norm.bias,
            model.linear.bias,
        )
    }
    assert len(kept["params"]) == 4
    assert "weight_decay" not in decayed
    assert kept["weight_decay"] == 0.0


def test_groups_without_parameters_are_left_out() -> None:
    assert len(decay_groups(nn.LayerNorm(3))) == 1


def _with_grads(*grads: list[float]) -> list[nn.Parameter]:
    parameters = []
    for grad in grads:
        parameter = nn.Parameter(torch.zeros(len(grad)))
        parameter.grad = torch.tensor(grad)
        parameters.append(parameter)
    return [*parameters, nn.Parameter(torch.zeros(2))]  # the last has no gradient


def test_clipping_scales_the_joint_norm() -> None:
    parameters = _with_grads([3.0, 0.0], [0.0, 4.0, 12.0])
    assert float(clip_grad_norm_(parameters, 6.5)) == pytest.approx(13.0)
    assert parameters[0].grad is not None
    assert parameters[1].grad is not None
    assert parameters[0].grad.tolist() == pytest.approx([1.5, 0.0])
    assert parameters[1].grad.tolist() == pytest.approx([0.0, 2.0, 6.0])


@pytest.mark.parametrize("limit", [None, 13.5])
def test_a_small_norm_is_measured_and_left_alone(limit: float | None) -> None:
    parameters = _with_grads([3.0, 0.0], [0.0, 4.0, 12.0])
    assert float(clip_grad_norm_(iter(parameters), limit)) == pytest.approx(13.0)
    assert parameters[0].grad is not None
    assert parameters[0].grad.tolist() == [3.0, 0.0]


def test_no_gradients_have_norm_zero() -> None:
    assert float(clip_grad_norm_([nn.Parameter(torch.ones(1))], 1.0)) == 0.0


def test_a_nan_is_not_hidden() -> None:
    assert math.isnan(float(clip_grad_norm_(_with_grads([float("nan")]), 1.0)))
