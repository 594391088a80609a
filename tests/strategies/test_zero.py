"""ZeRO on two ranks against one process: the same training, and checkpoints that each can read."""

import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.strategies import zero_worker
from tests.strategies.zero_worker import LENGTH, Toy

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.xdist_group("two_ranks"),
    pytest.mark.skipif(
        find_spec("deepspeed") is None,
        reason="needs deepspeed, which is not installed; pip install 'deepspeed>=0.19.8'",
    ),
]

LEFT_OUT = {"reference.weight", "reference.bias"}
Results = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def one(folder: Path) -> Results:
    """What one process does; its checkpoints are in ``folder / "one"``."""
    run = zero_worker.run
    return {
        "fit": run(folder / "one"),
        "unclipped": run(None, max_epochs=1, gradient_clip_val=None),
        "seldom": run(None, toy=Toy(seldom=True)),
        "skip": run(None, toy=Toy(skip=1)),
        "twice": run(None, steps="test fit test"),
        "mixed": run(None, precision="bf16-mixed"),
        "true": run(None, precision="bf16-true"),
    }


@pytest.fixture(scope="module")
def two(folder: Path, one: Results) -> Results:
    """What two ranks do, all cases in one start of the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        environment = {
            "TORCHELASTIC_RUN_ID": "zero",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
        with (folder / f"log{rank}").open("wb") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, zero_worker.__file__, str(folder)],
                    env=os.environ | environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        for rank in ranks:
            rank.wait(timeout=400)
    finally:
        for rank in ranks:
            rank.kill()
    logs = "\n".join((folder / f"log{rank}").read_text()[-3000:] for rank in range(2))
    assert (folder / "results.pt").exists(), logs
    return torch.load(folder / "results.pt", weights_only=False)


def close(found: Results, expected: Results, *, last: int | None = None) -> None:
    """The same losses, norms, learning rates and weights, but for rounding."""
    assert "error" not in found, found["error"]
    for what, tolerance in (("losses", 1e-5), ("norms", 1e-4), ("rates", 0.0)):
        values = expected[what] if last is None else expected[what][-len(found[what]) :]
        assert len(found[what]) > 0, what
        assert found[what] == pytest.approx(values, rel=tolerance, abs=tolerance), what
    same_weights(found, expected, 1e-5)


def same_weights(found: Results, expected: Results, tolerance: float) -> None:
    weights = expected["weights"]
    assert found["weights"].keys() == weights.keys() - LEFT_OUT
    for name, value in found["weights"].items():
        torch.testing.assert_close(value, weights[name], atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_training_is_that_of_one_process(one: Results, two: Results, stage: int) -> None:
    """Two decay groups, warmup, clipping, and a last accumulation window that is shorter."""
    close(two[f"fit{stage}"], one["fit"])
    assert two[f"fit{stage}"]["loaders"] == 1
    assert len(one["fit"]["losses"]) == 10 and len(one["fit"]["norms"]) == 6


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_norms_are_known_without_clipping(one: Results, two: Results, stage: int) -> None:
    close(two[f"unclipped{stage}"], one["unclipped"])
    assert one["unclipped"]["norms"][2] > 0.6  # clipping at 0.5 would show


@pytest.mark.parametrize("case", ["seldom1", "seldom2", "seldom3"])
def test_a_parameter_unused_in_a_step_has_no_gradient_of_an_earlier_one(
    one: Results, two: Results, case: str
) -> None:
    close(two[case], one["seldom"])
    assert (one["seldom"]["weights"]["rare.weight"] != one["fit"]["weights"]["rare.weight"]).any()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_skipped_step_changes_nothing(one: Results, two: Results, stage: int) -> None:
    found = two[f"skip{stage}"]
    assert found["losses"] == pytest.approx(one["skip"]["losses"], rel=1e-5)
    same_weights(found, one["skip"], 1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_tests_before_and_after_training(one: Results, two: Results, stage: int) -> None:
    """With one module: the evaluation leaves nothing behind that the training would stumble on."""
    close(two[f"twice{stage}"], one["twice"])
    assert two[f"twice{stage}"]["tested"] == pytest.approx(one["twice"]["tested"], rel=1e-5)
    assert len(one["twice"]["tested"]) == 10


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_file_is_that_of_one_process(
    folder: Path, one: Results, two: Results, stage: int
) -> None:
    found, expected = (
        torch.load(folder / name / "epoch=0.ckpt", weights_only=True)
        for name in (f"zero{stage}", "one")
    )
    assert found["state_dict"].keys() == expected["state_dict"].keys() - LEFT_OUT
    states = [checkpoint["optimizer_states"][0] for checkpoint in (found, expected)]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for number, state in states[1]["state"].items():
        assert states[0]["state"][number].keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(states[0]["state"][number][key], value, atol=1e-6, rtol=1e-4)
    size = (folder / f"zero{stage}" / "epoch=0.ckpt").stat().st_size
    assert size < 1.2 * (folder / "one" / "epoch=0.ckpt").stat().st_size
    assert not list(folder.rglob("*.partial"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resuming_gives_the_weights_of_the_straight_run(
    one: Results, two: Results, stage: int
) -> None:
    close(two[f"resumed{stage}"], one["fit"], last=3)
    straight = two[f"fit{stage}"]["weights"]
    for name, value in two[f"resumed{stage}"]["weights"].items():
        assert torch.equal(value, straight[name]), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_go_on_from_the_file_of_one_process(one: Results, two: Results, stage: int) -> None:
    close(two[f"from_one{stage}"], one["fit"], last=3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_process_goes_on_from_the_file_of_ranks(
    folder: Path, one: Results, two: Results, stage: int
) -> None:
    toy = Toy(9)
    found = zero_worker.run(None, toy=toy, resume=folder / f"zero{stage}" / "epoch=0.ckpt")
    assert found["losses"] == pytest.approx(one["fit"]["losses"][5:], rel=1e-5)
    for name in found["weights"].keys() - LEFT_OUT:
        expected = one["fit"]["weights"][name]
        torch.testing.assert_close(found["weights"][name], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_test_loads_a_file(folder: Path, one: Results, two: Results, stage: int) -> None:
    found = two[f"tested{stage}"]["tested"]
    resume = folder / "one" / "epoch=0.ckpt"
    expected = zero_worker.run(None, toy=Toy(9), resume=resume, steps="test")["tested"]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_offloading_computes_the_same(one: Results, two: Results, stage: int) -> None:
    close(two[f"offload{stage}"], one["fit"])
    close(two[f"offload_seldom{stage}"], one["seldom"])


@pytest.mark.parametrize("stage", [2, 3])
def test_folders_of_deepspeed(folder: Path, one: Results, two: Results, stage: int) -> None:
    close(two[f"sharded{stage}"], one["fit"])
    close(two[f"from_sharded{stage}"], one["fit"], last=3)
    written = folder / f"sharded{stage}" / "epoch=0.ckpt"
    assert (written / "meta.pt").exists() and (written / "checkpoint").is_dir()
    tested = two[f"test_sharded{stage}"]
    assert "error" not in tested, tested["error"]
    assert len(tested["tested"]) == 5


@pytest.mark.parametrize("stage", [2, 3])
def test_mixed_precision_is_that_of_one_process(one: Results, two: Results, stage: int) -> None:
    """float32 weights and products in bfloat16, and floats in the batch as they were."""
    found = two[f"mixed{stage}"]
    assert found["losses"] == pytest.approx(one["mixed"]["losses"], rel=2e-3)
    assert found["losses"] != pytest.approx(one["fit"]["losses"], rel=1e-6)
    assert found["margins"] == {"torch.float32"}


@pytest.mark.parametrize("kind", ["gather2", "gather3", "true2", "true3"])
def test_half_precision_keeps_exact_weights(one: Results, two: Results, kind: str) -> None:
    """The checkpoint holds what the optimizer steps, and a resumed run is the straight one."""
    found, resumed = two[kind], two[f"re_{kind}"]
    expected = one["mixed" if kind.startswith("gather") else "true"]["losses"]
    assert found["losses"] == pytest.approx(expected, rel=1e-2)
    assert found["margins"] == {"torch.float32"}
    same_weights(resumed, found, 0.0)
    weight = found["weights"]["model.lm_head.weight"]
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())
    exact = kind.startswith("gather")  # bf16-true rounds what is built
    frozen = found["weights"]["shift"]
    assert torch.equal(frozen, frozen.bfloat16().float()) != exact


def test_what_is_compared_is_hard() -> None:
    """Rows of a window have other numbers of targets, and no number of ranks divides the sizes."""
    counts = [zero_worker.rows(i)[1][:, 1:].sum(1) for i in range(zero_worker.MICRO_BATCHES)]
    assert any(len(set(count.tolist())) > 1 for count in counts)
    assert max(int(count.max()) for count in counts) < LENGTH
    assert zero_worker.VOCAB % 2
