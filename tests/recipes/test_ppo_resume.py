"""PPO goes on from any step of an iteration as if it had never stopped."""

import shutil
from pathlib import Path

import pytest
import torch

from lit_llm.modules.ppo import PPOModule
from tests.recipes.ppo_runs import (
    LORA,
    SHORT,
    TIMINGS,
    arguments,
    checkpoint,
    everything_on,
    learned,
    records,
    trained,
)
from tests.recipes.test_exact_resume import assert_equal

STATE = ("state_dict", "optimizer_states", "lr_schedulers", "rng", "PromptDataModule", "ppo")


def cut(straight: Path, run: Path, step: int) -> None:
    """Leave of a run what it had when it was killed after a step."""
    (run / "checkpoints").mkdir(parents=True)
    name = f"step={step:08d}.ckpt"
    shutil.copy(straight / "checkpoints" / name, run / "checkpoints" / name)
    for name in ("config.yaml", "evaluation.json"):
        shutil.copy(straight / name, run / name)


def assert_same_end(straight: Path, resumed: Path, step: int) -> None:
    """Compare the last checkpoints, all of them, and what was logged on the way there."""
    first, second = (checkpoint(run, 12) for run in (straight, resumed))
    for state in (first, second):
        for name in TIMINGS:
            state["ppo"]["rollout_metrics"].pop(name, None)
    for part in STATE:
        assert_equal(first[part], second[part], part)
    assert first["global_step"] == second["global_step"] == 12
    # The measures of an iteration are logged at its last step, even where that one was saved.
    assert learned(resumed, step) == learned(straight, step)
    tests = [records(run / "test_responses.jsonl") for run in (straight, resumed)]
    assert [row for row in tests[0] if row["step"] == 12] == tests[1][-8:]


@pytest.mark.parametrize(
    ("kind", "steps"), [("full", (2, 4, 7)), ("early", (7,)), ("lora", (6, 8)), ("rloo", (5,))]
)
def test_a_run_resumes_from_any_step(
    kind: str, steps: tuple[int, ...], tiny: Path, tiny_ppo: Path, tmp_path: Path
) -> None:
    """Within an iteration, and at its end, where nothing of it is left to do."""
    extra = {
        "full": everything_on(tiny),
        "early": (*everything_on(tiny), "--model.ppo.target_approxkl=1e-9"),
        "lora": (*LORA, "--model.ppo.normalise_scores=running", "--model.ppo.kl_target=0.01"),
        "rloo": ("--model.ppo.group_size=2", "--model.ppo.advantage=rloo"),
    }[kind]
    trained(arguments(tiny_ppo, tmp_path / "straight", *extra))
    if kind == "early":
        assert list(learned(tmp_path / "straight")["policy/skipped"].values()) == [2, 2, 2]
    for step in steps:
        run = tmp_path / f"resumed{step}"
        cut(tmp_path / "straight", run, step)
        torch.manual_seed(step)  # what the process did before must not show
        trained(arguments(tiny_ppo, run, *extra))
        assert_same_end(tmp_path / "straight", run, step)


def test_an_iteration_goes_on_in_other_micro_batches(tiny_ppo: Path, tmp_path: Path) -> None:
    """On other devices, say: no row of it is learned from twice, and none is left out."""
    trained(arguments(tiny_ppo, tmp_path / "straight"))
    states = [checkpoint(tmp_path / "straight", 12)["state_dict"]]
    path = tmp_path / "straight" / "checkpoints" / "step=00000009.ckpt"
    for size in (4, 1):
        args = arguments(tiny_ppo, tmp_path / f"by{size}", f"--resume={path}")
        trained([*args, f"--model.ppo.micro_batch_size={size}"])
        states.append(checkpoint(tmp_path / f"by{size}", 12)["state_dict"])
    for other in states[1:]:
        for name, value in states[0].items():
            torch.testing.assert_close(other[name], value, atol=1e-4, rtol=1e-4, msg=name)


def test_a_checkpoint_loads_whose_critic_is_another_model(
    tiny_ppo: Path, tiny_chat: Path, tmp_path: Path
) -> None:
    """A reward model of its own size reads the same tokens, and no more is asked of a critic."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_chat / "model")
    config = AutoConfig.from_pretrained(
        tiny_chat / "model", num_labels=1, hidden_size=16, pad_token_id=tokenizer.pad_token_id
    )
    config.head_dim = 8
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    args = arguments(tiny_ppo, tmp_path / "run", f"--model.ppo.value_from={tmp_path / 'small'}")
    trained([*args, "--trainer.max_steps=2", "--data.test_prompts=0"])
    module = PPOModule.load_from_checkpoint(
        tmp_path / "run" / "checkpoints" / "step=00000002.ckpt", weights_only=True
    )
    state = checkpoint(tmp_path / "run", 2)["state_dict"]
    assert {name for name in state if name.startswith("value_model.")}
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_finished_run_is_not_begun_again(
    tiny_ppo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = arguments(tiny_ppo, tmp_path, "--trainer.max_epochs=1")
    with caplog.at_level("INFO", "lightning.pytorch"):
        first = trained(args).results
    assert "Checkpoints take 0." in caplog.text
    assert trained(args).results == first


def test_the_critics_rate_is_a_factor_of_the_policys(tiny_ppo: Path, tmp_path: Path) -> None:
    extra = (*SHORT, *LORA, "--model.ppo.value_lr_factor=10", "--trainer.max_steps=1")
    cli = trained(arguments(tiny_ppo, tmp_path, *extra, "--model.schedule.name=constant"))
    rates = {
        id(parameter): group["lr"]
        for group in cli.trainer.optimizers[0].param_groups
        for parameter in group["params"]
    }
    for name, parameter in cli.model.named_parameters():
        if parameter.requires_grad:
            of_critic = "value" in name.split(".") or name.startswith("value_head")
            assert rates[id(parameter)] == pytest.approx(0.03 if of_critic else 0.003), name
