"""Random states go through a checkpoint and come back as they were."""

import random
from pathlib import Path

import numpy as np
import torch

from lit_llm.callbacks.exact_resume import ExactResume, rng_state, set_rng_state


def draw() -> list[float]:
    """Numbers of all generators, a normal one too: numpy and Python keep half of a pair."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.standard_normal()),
        float(torch.rand(())),
        float(torch.randn(())),
    ]


def test_states_survive_a_weights_only_checkpoint(tmp_path: Path) -> None:
    draw()
    torch.save(rng_state(), tmp_path / "rng")
    expected = draw()
    set_rng_state(torch.load(tmp_path / "rng", weights_only=True))
    assert draw() == expected


def test_validation_leaves_the_training_state_alone() -> None:
    callback = ExactResume()
    state = rng_state()
    expected = draw()
    set_rng_state(state)
    callback.on_validation_start(None, None)  # type: ignore[arg-type]
    draw()
    callback.on_validation_end(None, None)  # type: ignore[arg-type]
    assert draw() == expected
