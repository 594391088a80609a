"""What the PPO recipe says of settings that cannot work, before any of the work is done."""

import shutil
from pathlib import Path

import ppo
import pytest

from tests.recipes.ppo_runs import LORA, SHORT, arguments, trained

BAD = {
    "model.rewards is empty": ("--model.rewards=[]",),
    "reward 'exact_mach': there is no such folder of a reward model, and no such rule": (
        "--model.rewards=exact_mach",
    ),
    "has no function 'kind'; it has: spread, broken, nothing": ("--model.rewards=REWARDS:kind",),
    "holds no model that scores texts": ("--model.rewards=POLICY",),
    "temperature is 0": ("--model.generation.temperature=0",),
    "top_k and top_p make what is sampled another policy": ("--model.generation.top_k=5",),
    "rollout_batch_size 8 must be a multiple of minibatch_size 3": (
        "--model.ppo.minibatch_size=3",
    ),
    "must be a multiple of micro_batch_size x devices (3 x 1)": ("--model.ppo.micro_batch_size=3",),
    "micro_batch_size must be at least 1": ("--model.ppo.micro_batch_size=-2",),
    "must be a multiple of group_size 3": ("--model.ppo.group_size=3",),
    "give model.ppo.group_size": ("--model.ppo.advantage=grpo",),
    "data.ptx_sources, or set it to 0": ("--model.ppo.ptx_coef=0.5",),
    "value_from goes with a separate critic": (*LORA, "--model.ppo.value_from=POLICY"),
    "dropout makes the policy": ("--model.base.dropout=0.1",),
    "kl_target moves kl_coef": ("--model.ppo.kl_target=6", "--model.ppo.kl_coef=0"),
    "trainer.accumulate_grad_batches follows": ("--trainer.accumulate_grad_batches=3",),
    "limit_train_batches": ("--trainer.limit_train_batches=3",),
    "rollout_engine 'nowhere:Engine' cannot be loaded": ("--model.rollout_engine=nowhere:Engine",),
    "a reward and a judge are both called 'length_window'": (
        "--model.rewards=[{function: length_window, options: {longest: 2}}]",
        "--model.judges=[{function: length_window, options: {longest: 8}}]",
    ),
    "the run has no end": ("--trainer.max_epochs=-1",),
}


def said(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that a run ends with."""
    with pytest.raises(SystemExit) as caught:
        ppo.main(args)
    assert caught.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


@pytest.mark.parametrize("message", BAD)
def test_a_mistake_is_said_in_one_sentence(
    message: str,
    tiny_ppo: Path,
    tiny_chat: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"REWARDS": str(tiny_ppo / "rewards.py"), "POLICY": str(tiny_chat / "model")}
    extra = list(BAD[message])
    for name, path in places.items():
        extra = [setting.replace(name, path) for setting in extra]
    assert message in said(arguments(tiny_ppo, tmp_path, *extra), capsys)
    assert not (tmp_path / "checkpoints").exists()
    # That there is no end is known when training begins.
    assert message == "the run has no end" or not (tmp_path / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("function", "message"),
    [("broken", "failed with ZeroDivisionError in"), ("nothing", "gave nan, where one finite")],
)
def test_a_reward_that_fails_shows_the_sample(
    function: str, message: str, tiny_ppo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = f"--model.rewards={tiny_ppo / 'rewards.py'}:{function}"
    error = said(arguments(tiny_ppo, tmp_path, reward), capsys)
    assert f"reward {function}: {message}" in error
    assert "the prompt is 'say " in error and "and the response '" in error


@pytest.mark.parametrize("kind", [(), LORA], ids=["full", "lora"])
def test_a_checkpoint_is_of_the_model_it_started_from(
    kind: tuple[str, ...],
    tiny_ppo: Path,
    tiny_chat: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from safetensors.torch import load_file, save_file

    base = tmp_path / "model"
    shutil.copytree(tiny_chat / "model", base)
    args = arguments(tiny_ppo, tmp_path / "run", *SHORT, *kind, f"--model.base.pretrained={base}")
    args += ["--checkpoint.every_n_steps=4"]
    trained(args)
    (tmp_path / "run" / "checkpoints" / "step=00000008.ckpt").unlink()
    state = load_file(base / "model.safetensors")
    save_file({k: v * 1.5 for k, v in state.items()}, base / "model.safetensors", {"format": "pt"})
    message = "another base model" if kind else "trained against another reference"
    assert message in said(args, capsys)
