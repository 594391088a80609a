"""FSDP2, alone and over tensor parallel groups, beside one process that does the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.strategies import fsdp2_worker
from tests.strategies.world import World

pytestmark = [pytest.mark.xdist_group("two_ranks"), pytest.mark.thorough]

TP = {"tensor_parallel_size": 2}
HALF = fsdp2_worker.STEPS // 2  # an epoch
RUN = "tests.strategies.fsdp2_worker:run"
REFUSED = "tests.strategies.fsdp2_worker:refused"


@functools.cache
def _one_process(case: str) -> dict[str, Any]:
    return fsdp2_worker.run(eval(case))


def one_process(**case: Any) -> dict[str, Any]:
    """The run of one process, made once for each case."""
    torch.set_num_threads(1)
    return _one_process(repr({"strategy": None, **case}))


def differences(result: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The largest differences of losses, norms (relative) and whole trained weights."""
    assert len(result["losses"]) == len(expected["losses"])
    own, weights = (  # one process tells the frozen ones too
        {n: v for n, v in r["weights"].items() if not n.startswith("reference.")}
        for r in (result, expected)
    )
    assert own.keys() == weights.keys()
    norms = np.array(expected["norms"][-len(result["norms"]) :])
    return {
        "losses": float(np.abs(np.subtract(result["losses"], expected["losses"])).max()),
        "norms": float(np.abs(np.array(result["norms"]) / norms - 1).max()),
        "weights": max(float(np.abs(own[name] - weights[name]).max()) for name in own),
    }


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fsdp2": ({}, {"fused": True}),
    # The head is whole, and in one group of the optimizer with divided layers.
    "tensor parallel": (TP, {"fused": True, "config": {"tie_word_embeddings": False}}),
    "adapters": ({}, {"lora": "lora"}),
    "divided adapters": (TP, {"lora": "lora"}),
    "head norms": (TP, {"config": {"model_type": "qwen3", "head_dim": 8}}),
}
SLOW_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one by one": (TP, {}),
    "biases": (TP, {"config": {"attention_bias": True, "mlp_bias": True}}),
    "whole products": (TP, {"config": {"model_type": "phi3", "pad_token_id": 0}}),
    "compiled": ({}, {"compile": True}),
}


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)]
)
def test_trains_as_one_process(two_ranks: World, name: str) -> None:
    """Two epochs: clipped, accumulated, the last window of an epoch shorter."""
    strategy, case = (CASES | SLOW_CASES)[name]
    expected = one_process(**{k: v for k, v in case.items() if k != "compile"})
    assert len(expected["losses"]) == fsdp2_worker.STEPS
    assert expected["losses"][-1] < expected["losses"][0]
    assert min(expected["norms"]) > 0.5  # the clipping is at work in every step
    result, other = two_ranks.run(RUN, {**case, "strategy": strategy})
    assert max(differences(result, expected).values()) < 1e-5
    assert other["weights"] == {}  # rank 0 keeps them
    assert result["class"] == "Toy"


@pytest.mark.parametrize("strategy", [{}, TP], ids=["fsdp2", "tensor parallel"])
def test_test_fit_test(two_ranks: World, strategy: dict[str, Any]) -> None:
    """A module is tested, trained and tested again, with gradient checkpointing."""
    phases = {"phases": ["test", "fit", "test"]}
    expected = one_process(**phases)
    result, _ = two_ranks.run(RUN, {**phases, "checkpointing": True, "strategy": strategy})
    assert max(differences(result, expected).values()) < 1e-5
    np.testing.assert_allclose(result["tested"], expected["tested"], rtol=1e-6)
    assert expected["tested"][1] < expected["tested"][0]


@pytest.mark.parametrize("strategy", [{}, TP], ids=["fsdp2", "tensor parallel"])
def test_ranks_that_built_different_weights_take_those_of_rank_0(
    two_ranks: World, strategy: dict[str, Any]
) -> None:
    """Without a seed every rank builds other weights."""
    result, _ = two_ranks.run(RUN, {"fused": True, "seed_by_rank": True, "strategy": strategy})
    assert max(differences(result, one_process(fused=True)).values()) < 1e-5


@pytest.mark.parametrize(
    ("strategy", "precision", "tolerance"),
    [
        ({}, "bf16-mixed", 1e-5),  # float32 weights are gathered: the arithmetic of one process
        (TP, "bf16-mixed", 0.01),  # half a product is rounded before it is added to the other
        ({"half_gather": True}, "bf16-mixed", 0.01),
        ({}, "bf16-true", 0.02),
    ],
)
def test_half_precision(
    two_ranks: World, strategy: dict[str, Any], precision: str, tolerance: float
) -> None:
    """The arithmetic stays that of one process, or near it."""
    result, _ = two_ranks.run(RUN, {"precision": precision, "strategy": strategy})
    assert max(differences(result, one_process(precision=precision)).values()) < tolerance


@pytest.mark.parametrize(("strategy", "equal"), [({}, False), (TP, True)])
def test_random_numbers_follow_the_data(
    two_ranks: World, strategy: dict[str, Any], equal: bool
) -> None:
    """Ranks that read the same data drop the same units, others do not."""
    case = {"config": {"attention_dropout": 0.1}, "exact_resume": True, "epochs": 1}
    first, second = two_ranks.run(RUN, {**case, "strategy": strategy})
    assert (first["random"] == second["random"]) is equal


# ----- checkpoints ------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any] | None] = {
    "one": None,
    "fsdp2": {},
    "tp": TP,
    "fsdp2 folder": {"sharded_checkpoints": True},
    "tp folder": {"sharded_checkpoints": True, **TP},
}


@pytest.fixture(scope="module")
def saved(two_ranks: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints after the first of two epochs, by the kind of run."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def save(kind: str) -> Path:
        path = folder / f"{kind}.ckpt"
        if not path.exists():
            case = {"strategy": KINDS[kind], "epochs": 1, "fused": True, "save": str(path)}
            if KINDS[kind] is None:
                fsdp2_worker.run(case)
            else:
                two_ranks.run(RUN, case)
        return path

    return save


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("fsdp2", "fsdp2"),
        ("tp", "tp"),
        pytest.param("fsdp2 folder", "fsdp2 folder", marks=pytest.mark.slow),
        ("tp folder", "tp folder"),
        pytest.param("fsdp2", "one", marks=pytest.mark.slow),
        ("tp", "one"),
        pytest.param("one", "fsdp2", marks=pytest.mark.slow),
        pytest.param("one", "tp", marks=pytest.mark.slow),
        ("tp", "fsdp2"),
        pytest.param("fsdp2 folder", "tp", marks=pytest.mark.slow),
        ("tp folder", "fsdp2"),
    ],
)
def test_resumes(two_ranks: World, saved: Callable[[str], Path], before: str, after: str) -> None:
    """The second epoch of a run that was saved after the first: the same run, exactly."""
    case = {"fused": True, "resume": str(saved(before))}
    if KINDS[after] is None:
        result = fsdp2_worker.run({**case, "strategy": None})
        straight = one_process(fused=True)
    else:
        result, _ = two_ranks.run(RUN, {**case, "strategy": KINDS[after]})
        straight, _ = two_ranks.run(RUN, {"fused": True, "strategy": KINDS[after]})
    straight = {**straight, "losses": straight["losses"][HALF:]}
    found = max(differences(result, straight).values())
    assert found == 0 if before == after else found < 1e-5


@pytest.mark.parametrize("kind", ["fsdp2", "tp"])
def test_file_is_that_of_one_process(saved: Callable[[str], Path], kind: str) -> None:
    """Names, order, types, the tie and the optimizer's numbering; nothing of the frozen model."""
    ours, theirs = (torch.load(saved(k), weights_only=True) for k in (kind, "one"))
    assert ours.keys() == theirs.keys()
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    head, embedding = (
        ours["state_dict"][f"model.{n}.weight"] for n in ("lm_head", "model.embed_tokens")
    )
    assert head.data_ptr() == embedding.data_ptr()
    for own, other in zip(ours["optimizer_states"], theirs["optimizer_states"], strict=True):
        assert own["param_groups"] == other["param_groups"]
        assert list(own["state"]) == list(other["state"])
        for index, values in own["state"].items():
            assert values.keys() == other["state"][index].keys()
            for key, value in values.items():
                assert type(value) is torch.Tensor
                torch.testing.assert_close(value, other["state"][index][key], atol=1e-6, rtol=1e-4)


def test_file_into_a_sharded_module(two_ranks: World, saved: Callable[[str], Path]) -> None:
    """After a test the module is divided already when the file is read."""
    case = {"fused": True, "resume": str(saved("tp")), "phases": ["test", "fit"], "strategy": TP}
    result, _ = two_ranks.run(RUN, case)
    straight, _ = two_ranks.run(RUN, {"fused": True, "strategy": TP})
    straight["losses"] = straight["losses"][HALF:]
    assert max(differences(result, straight).values()) == 0


# ----- two dimensions ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[World]:
    """Four processes."""
    world = World(4)
    yield world
    world.close()


@pytest.mark.slow
def test_two_by_two(four_ranks: World, tmp_path: Path) -> None:
    """Two groups of two, widths that the groups divide unevenly; a file and a folder resume."""
    odd = {"hidden_size": 36, "intermediate_size": 30, "head_dim": 6, "num_attention_heads": 6}
    case = {"fused": True, "config": odd}
    expected = one_process(**case)
    straight, *_ = four_ranks.run(RUN, {**case, "strategy": TP})
    assert max(differences(straight, expected).values()) < 1e-5
    straight["losses"], expected = straight["losses"][HALF:], {**expected}
    for sharded in (False, True):
        strategy, path = {"sharded_checkpoints": sharded, **TP}, str(tmp_path / f"{sharded}.ckpt")
        four_ranks.run(RUN, {**case, "strategy": strategy, "epochs": 1, "save": path})
        resumed, *_ = four_ranks.run(RUN, {**case, "strategy": strategy, "resume": path})
        assert max(differences(resumed, straight).values()) == 0
    alone = fsdp2_worker.run({**case, "strategy": None, "resume": str(tmp_path / "False.ckpt")})
    expected["losses"] = expected["losses"][HALF:]
    assert max(differences(alone, expected).values()) < 1e-5


# ----- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "case", "words"),
    [
        ({"half_gather": True}, {}, "half_gather"),
        ({"tensor_parallel_size": 3}, {}, "is not the number of devices"),
        ({"data_parallel_size": 4}, {}, "is not the number of devices"),
        ({"data_parallel_size": 0}, {}, "at least 1"),
        (TP, {"lora": "dora"}, "DoRA"),
        (TP, {"compile": True}, "compile"),
        (TP, {"config": {"model_type": "gpt2", "n_embd": 32, "n_head": 4}}, "has no tensor par"),
        (TP, {"config": {"num_attention_heads": 3, "num_key_value_heads": 3}}, "3 attention heads"),
        (TP, {"config": {"num_key_value_heads": 1}}, "1 key value heads"),
        (TP, {"config": {"intermediate_size": 47}}, "width 47"),
    ],
)
def test_refuses(
    two_ranks: World, strategy: dict[str, Any], case: dict[str, Any], words: str
) -> None:
    """All ranks end with one sentence."""
    if "config" in case and "num_attention_heads" in case["config"]:
        case["config"]["hidden_size"] = 24
    for told in two_ranks.run(REFUSED, {**case, "strategy": strategy}):
        assert words in told
