"""Two ranks sample and learn what one does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.recipes.ppo_runs import (
    arguments,
    checkpoint,
    everything_on,
    learned,
    records,
    trained,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.thorough  # the parity of strategies looks at two ranks too
@pytest.mark.slow
def test_two_ranks_learn_what_one_does(tiny: Path, tiny_ppo: Path, tmp_path: Path) -> None:
    """2 x 2 responses a minibatch on two ranks, 2 x 2 accumulated on one; both stop early."""
    one, two = tmp_path / "one", tmp_path / "two"
    extra = (
        *everything_on(tiny),
        "--model.ppo.target_approxkl=1e-7",
        "--model.optimizer.class_path=torch.optim.SGD",
        "--model.optimizer.init_args.lr=0.05",
    )
    trained(arguments(tiny_ppo, one, *extra))
    cache = f"--data.cache_dir={tmp_path / 'cache'}"
    ranks = ("--trainer.devices=2", "--trainer.strategy=ddp", cache)
    command = [sys.executable, str(ROOT / "recipes" / "ppo.py")]
    command += arguments(tiny_ppo, two, *extra, *ranks)
    done = subprocess.run(command, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()

    found = [learned(run) for run in (one, two)]
    assert found[0]["policy/skipped"][11] > 0
    assert found[0].keys() == found[1].keys()
    for name, values in found[0].items():
        assert values.keys() == found[1][name].keys(), name
        for step, value in values.items():
            assert found[1][name][step] == pytest.approx(value, abs=1e-5, rel=1e-5), (name, step)
    states = [checkpoint(run, 12) for run in (one, two)]
    for name, value in states[0]["state_dict"].items():
        torch.testing.assert_close(states[1]["state_dict"][name], value, atol=1e-5, rtol=1e-5)
    for step in (4, 8, 12):  # of each iteration
        kept = [checkpoint(run, step)["ppo"]["experience"] for run in (one, two)]
        for part in ("input_ids", "attention_mask", "response_mask", "order"):
            assert torch.equal(kept[0][part], kept[1][part]), (step, part)
        torch.testing.assert_close(kept[0]["advantages"], kept[1]["advantages"], atol=1e-4, rtol=0)
    for name in ("test_responses", "responses"):
        rows = [records(run / f"{name}.jsonl") for run in (one, two)]
        assert [row["response"] for row in rows[0]] == [row["response"] for row in rows[1]]
    results = [json.loads((run / "evaluation.json").read_text()) for run in (one, two)]
    for measure, value in results[0]["after"].items():
        assert results[1]["after"][measure] == pytest.approx(value, abs=1e-4), measure
