"""FSDP1 on two CPU processes beside one process without a strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_llm.strategies.checkpoint_io import read_checkpoint
from lit_llm.strategies.sharded_checkpoint import load_metadata, read_sharded
from tests.strategies.fsdp1_worker import VARIANTS, Toy, one_process, outcome, run
from tests.strategies.world import World

pytestmark = [pytest.mark.xdist_group("two_ranks"), pytest.mark.thorough]

FIRST = "epoch=0.ckpt"
# Halves of a batch are summed in another order; below 16 bits that is seen, and Adam normalises it.
TOLERANCE = {"bf16-mixed": 2e-3, "bf16-true": 2e-2, "half_reference": 1e-4, "half_base": 1e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp1")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return one_process(folder)


@pytest.fixture(scope="module")
def two(one: dict[str, Any], folder: Path, two_ranks: World) -> dict[str, Any]:
    two_ranks.run("tests.strategies.fsdp1_worker:cases", str(folder), timeout=240.0)
    found: dict[str, Any] = torch.load(folder / "two.pt", weights_only=True)
    return found


def compare(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Losses, norms, weights and optimizer; of what was resumed the part after it."""
    close = {"rtol": tolerance, "atol": tolerance}
    for key in ("losses", "norms"):
        torch.testing.assert_close(found[key], expected[key][-len(found[key]) :], **close)
    assert list(found["weights"]) == list(expected["weights"])
    for name, value in expected["weights"].items():
        assert found["weights"][name].dtype == value.dtype, name
        torch.testing.assert_close(found["weights"][name], value, **close)
    assert found["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    assert found["optimizer"]["state"].keys() == expected["optimizer"]["state"].keys()
    for number, state in expected["optimizer"]["state"].items():
        assert found["optimizer"]["state"][number].keys() == state.keys()
        for key, value in state.items():
            mine = found["optimizer"]["state"][number][key]
            torch.testing.assert_close(mine, value, **close)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_it_trains_as_one_process_does(name: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    assert len(one[name]["losses"]) == (8 if name == "skipping" else 10)
    assert one[name]["norms"].max() > 0.5, "clipping has to matter"
    compare(two[name], one[name], TOLERANCE.get(name, 1e-5))


def test_evaluation_before_and_after_training(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert len(one["plain"]["tested"]) == 10
    assert (one["plain"]["tested"][:5] - one["plain"]["tested"][5:]).abs().max() > 0.01
    torch.testing.assert_close(two["plain"]["tested"], one["plain"]["tested"])


def test_a_skipped_step_changes_nothing(one: dict[str, Any], two: dict[str, Any]) -> None:
    steps = {int(state["step"]) for state in two["skipping"]["optimizer"]["state"].values()}
    assert steps == {5}  # of 6


def test_half_gathers_round_a_little_more(one: dict[str, Any], two: dict[str, Any]) -> None:
    exact, half = two["bf16-mixed"], two["half_gather"]
    assert half["weights"]["model.model.norm.weight"].dtype == torch.float32
    assert not torch.equal(exact["losses"], half["losses"])
    torch.testing.assert_close(half["losses"], one["plain"]["losses"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["again", "after_test", "folder", "folder_again"])
def test_resuming_changes_no_bit(name: str, two: dict[str, Any]) -> None:
    compare(two[name], two["plain"], 0.0)


def test_a_test_before_a_sharded_resume_leaves_no_old_weights(two: dict[str, Any]) -> None:
    compare(two["folder_after_test"], two["plain"], 0.0)
    assert torch.equal(two["folder_after_test"]["tested"], two["plain"]["tested"])


def test_a_fused_optimizer_resumes(two: dict[str, Any]) -> None:
    compare(two["again_fused"], two["fused"], 0.0)


def test_files_go_from_one_process_to_two_and_back(
    one: dict[str, Any], two: dict[str, Any], folder: Path
) -> None:
    compare(two["from_one"], one["plain"])
    back = run(folder / "back", resume=folder / "plain" / FIRST)
    compare(outcome(*back), one["plain"])


def test_a_file_is_that_of_one_process(two: dict[str, Any], folder: Path) -> None:
    mine, other = (read_checkpoint(folder / name / FIRST) for name in ("plain", "one-plain"))
    assert mine.keys() == other.keys()
    assert list(mine["state_dict"]) == list(other["state_dict"])
    assert not [name for name in mine["state_dict"] if name.startswith("reference.")]
    tied = [mine["state_dict"][f"model.{n}.weight"] for n in ("model.embed_tokens", "lm_head")]
    assert tied[0].data_ptr() == tied[1].data_ptr()
    for name, value in other["state_dict"].items():
        torch.testing.assert_close(mine["state_dict"][name], value, rtol=1e-5, atol=1e-6)
    size = [(folder / name / FIRST).stat().st_size for name in ("plain", "one-plain")]
    assert abs(size[0] - size[1]) < 0.1 * size[1]


def test_a_folder_of_two_ranks_is_their_file(two: dict[str, Any], folder: Path) -> None:
    whole, file = read_sharded(folder / "folder" / FIRST), read_checkpoint(folder / "plain" / FIRST)
    assert whole.keys() == file.keys()
    assert list(whole["state_dict"]) == list(file["state_dict"])
    for name, value in file["state_dict"].items():
        assert torch.equal(whole["state_dict"][name], value), name
    mine, other = whole["optimizer_states"][0], file["optimizer_states"][0]
    assert mine["param_groups"] == other["param_groups"]
    assert mine["state"].keys() == other["state"].keys()
    for number, state in other["state"].items():
        assert all(torch.equal(mine["state"][number][key], v) for key, v in state.items())
    metadata = load_metadata(folder / "folder" / FIRST)
    assert metadata["optimizer_states"] == [{}]
    assert metadata["loops"]["fit_loop"] == file["loops"]["fit_loop"]


def test_fsdp1_and_fsdp2_read_each_others_folders(two: dict[str, Any]) -> None:
    compare(two["from_fsdp2"], two["plain"])
    compare(two["to_fsdp2"], two["plain"])


def test_types_that_cannot_be_sharded_together_are_named(two: dict[str, Any]) -> None:
    assert "tokens.weight is torch.bfloat16 and trained beside torch.float32" in two["refused"]


def test_the_toy_has_what_sharding_could_get_wrong() -> None:
    module = Toy()
    module.configure_model()
    assert module.head.bias.numel() == 1  # a rank without any of it
    assert module.model.lm_head.weight is module.model.model.embed_tokens.weight
