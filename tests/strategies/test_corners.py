"""What of a recipe only some strategies, ranks or settings bring to light."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_llm.errors import UserError
from lit_llm.strategies.resume import check_settings
from tests.recipes.ppo_runs import checkpoint, logged
from tests.strategies.frozen_models import reward_folder
from tests.strategies.recipe_cases import BF16, DICTATED, LORA, arguments
from tests.strategies.test_parity import needed
from tests.strategies.world import World

on_two_ranks = pytest.mark.xdist_group("two_ranks")
ONE_ITERATION = (
    "--trainer.max_epochs=1",
    "--data.test_prompts=2",
    "--model.ppo.rollout_batch_size=8",
    "--model.ppo.minibatch_size=4",
)
MISTAKE = "rank 1 has no score"


@pytest.fixture(scope="module")
def judge(parity_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a reward model."""
    return reward_folder(parity_folder, tmp_path_factory.mktemp("corners") / "judge")


# ----- jobs of the ranks --------------------------------------------------------------------------


def fails_on_rank_1(samples: Any) -> list[float]:
    """A reward that one rank's samples are too much for."""
    if samples and os.environ["RANK"] == "1":
        raise UserError(MISTAKE)
    return [1.0] * len(samples)


def told(args: list[str]) -> str:
    """What a run ends with."""
    from lit_llm.cli import RecipeCLI

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RecipeCLI, "report", lambda self, *_: None)
            importlib.import_module("ppo").main(args)
    except UserError as error:
        return str(error)
    return ""


def reward_types(args: list[str]) -> set[torch.dtype]:
    """Train, and tell what the reward models' weights are held in."""
    from lit_llm.cli import RecipeCLI

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecipeCLI, "report", lambda self, *_: None)
        module = importlib.import_module("ppo").main(args).model
    return {parameter.dtype for parameter in module.rewards.parameters()}


# ----- what they come to --------------------------------------------------------------------------


@on_two_ranks
@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("rule", ["rewards", "judges"])
def test_a_reward_that_fails_on_one_rank_ends_all_with_its_sentence(
    rule: str, judge: str, parity_folder: Path, two_ranks: World, tmp_path: Path
) -> None:
    """Though a sharded model has still to score, which the ranks do together."""
    broken = f"{{function: '{__name__}:fails_on_rank_1'}}"
    rewards = [broken, judge] if rule == "rewards" else [broken]
    given = [f"--model.rewards=[{', '.join(rewards)}]"]
    if rule == "judges":
        given.append(f"--model.judges=[{judge}]")
    args = arguments(parity_folder, "ppo", tmp_path, "fsdp2", *ONE_ITERATION, *given)
    found = two_ranks.run(f"{__name__}:told", args, timeout=120.0)
    assert all(MISTAKE in sentence for sentence in found), found


@on_two_ranks
@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("strategy", [needed("deepspeed_zero3")])
def test_reward_models_stay_in_half_precision_beside_float32_weights(
    strategy: str, judge: str, parity_folder: Path, two_ranks: World, tmp_path: Path
) -> None:
    """As under every other strategy with bf16-mixed."""
    given = (*ONE_ITERATION, *BF16, *DICTATED, f"--model.rewards=[{judge}]")
    args = arguments(parity_folder, "ppo", tmp_path, strategy, *given)
    assert two_ranks.run(f"{__name__}:reward_types", args) == [{torch.bfloat16}] * 2
    state = checkpoint(tmp_path, 4)["state_dict"]
    assert {value.dtype for value in state.values()} == {torch.float32}


@on_two_ranks
@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("strategy", [needed("deepspeed_zero2")])
def test_a_skipped_step_has_no_gradient_norm(
    strategy: str, parity_folder: Path, two_ranks: World, tmp_path: Path
) -> None:
    """Lightning would log that of the step before again."""
    given = (*ONE_ITERATION, "--model.ppo.target_approxkl=1e-6")
    args = arguments(parity_folder, "ppo", tmp_path, strategy, *given)
    two_ranks.run("tests.strategies.recipe_cases:run", "ppo", args)
    norms = list(logged(tmp_path)["train/grad_norm"].values())
    assert len(norms) == 4
    assert min(norms[:2]) > 0 and norms[2:] == [0, 0]


@on_two_ranks
@pytest.mark.thorough
@pytest.mark.slow
def test_adapters_learned_with_noise_are_merged(
    parity_folder: Path, two_ranks: World, tmp_path: Path
) -> None:
    """NEFTune's hook is copied with the model, and must not bring the sharded module along."""
    short = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--data.test_fraction=0")
    given = (*short, *LORA, "--model.neftune_alpha=5", f"--export_dir={tmp_path / 'model'}")
    args = arguments(parity_folder, "sft", tmp_path, "fsdp2", *given)
    two_ranks.run("tests.strategies.recipe_cases:run", "sft", args, timeout=120.0)
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_devices_of_a_tensor_parallel_node_read_the_same(tmp_path: Path) -> None:
    """``auto`` is all devices of a node, so a step has the samples of two nodes' groups."""

    def settings(size: int | str, devices: int, accumulate: int) -> dict[str, Any]:
        strategy = {"class_path": "x", "init_args": {"tensor_parallel_size": size}}
        trainer = {"strategy": strategy, "devices": devices, "num_nodes": 2}
        trainer["accumulate_grad_batches"] = accumulate
        return {"data": {"micro_batch_size": 3}, "trainer": trainer}

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings("auto", 4, 2)))
    check_settings(path, settings("auto", 8, 2))
    check_settings(path, settings(2, 2, 2))
    check_settings(path, settings(2, 4, 1))
    with pytest.raises(UserError, match="accumulate_grad_batches"):
        check_settings(path, settings(2, 4, 3))
