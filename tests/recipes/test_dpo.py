"""The DPO recipe run whole: learned, by either kind of reference, and exported."""

import json
import math
from pathlib import Path

import dpo
import pytest
import torch

from tests.recipes.preference_runs import arguments, logged, sequences

RATE = (
    "--model.optimizer.class_path=torch.optim.AdamW",
    "--model.optimizer.init_args.lr=0.001",
)
LEARN = (
    *RATE,
    "--trainer.max_steps=100",
    "--trainer.max_epochs=-1",
    "--trainer.check_val_every_n_epoch=null",
    "--trainer.val_check_interval=100",
    "--data.micro_batch_size=8",
    "--trainer.accumulate_grad_batches=1",
    "--trainer.limit_val_batches=1.0",
    "--checkpoint.every_n_steps=100",
    "--model.base.dropout=0",
    "--model.kl_prompts=32",
)
LORA = ("--model.adapter.method=lora", "--model.adapter.r=8")


@pytest.fixture(scope="module", params=["full", "lora"])
def learned(
    request: pytest.FixtureRequest,
    tiny_preferences: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A finished run with a reference that was precomputed, or with adapters turned off."""
    output = tmp_path_factory.mktemp("dpo")
    kind = (*LORA, "--model.optimizer.init_args.lr=0.01") if request.param == "lora" else ()
    args = arguments(tiny_preferences, "dpo", output, *LEARN, *kind)
    dpo.main([*args, f"--export_dir={output / 'model'}"])
    return output


def test_a_separable_preference_is_learned(learned: Path) -> None:
    results = json.loads((learned / "evaluation.json").read_text())
    before, after = results["before"], results["after"]
    # Policy and reference are the same at first: every pair is a tie and costs log 2.
    assert before["rewards/accuracies"] == pytest.approx(0.5, abs=0.2)  # rounding breaks ties
    assert before["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert before["objective/kl"] == pytest.approx(0, abs=1e-6)
    assert after["rewards/accuracies"] > 0.9
    assert after["rewards/margins"] > 0.3
    assert after["objective/kl"] > 0.05


def test_everything_promised_is_logged(learned: Path) -> None:
    names = logged(learned).keys()
    for name in ("accuracies", "margins", "chosen", "rejected"):
        assert {f"train/rewards/{name}", f"val/rewards/{name}"} <= names
    assert {"train/loss", "train/logps/chosen", "val/logps/rejected"} <= names
    assert {"val/loss", "val/objective/kl", "val/accuracy/first", "val/stop_rate"} <= names


def test_rewards_are_what_transformers_says_of_policy_and_reference(
    learned: Path, tiny_chat: Path, tiny_preferences: Path
) -> None:
    """The second set, by the exported model and the one it started from."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(learned / "model")
    policy = AutoModelForCausalLM.from_pretrained(learned / "model").eval()
    start = AutoModelForCausalLM.from_pretrained(tiny_chat / "model").eval()
    prompts = [
        tokenizer.apply_chat_template(
            json.loads(line)["prompt"], tokenize=False, add_generation_prompt=True
        )
        for line in (tiny_preferences / "other.jsonl").read_text().splitlines()
    ]
    first = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in prompts]
    margins = []
    for border, pair in zip(
        first, sequences(tokenizer, tiny_preferences / "other.jsonl"), strict=True
    ):
        rewards = []
        for ids in pair:
            tokens = torch.tensor([ids])
            with torch.no_grad():
                logps = [
                    model(tokens).logits[0, border - 1 : -1].log_softmax(-1)
                    for model in (policy, start)
                ]
            chosen = tokens[0, border:, None]
            rewards.append(float((logps[0] - logps[1]).gather(1, chosen).sum()))
        margins.append(0.1 * (rewards[0] - rewards[1]))
    after = json.loads((learned / "evaluation.json").read_text())["after"]
    assert sum(margins) / len(margins) == pytest.approx(after["ood/rewards/margins"], abs=1e-3)


def test_a_lost_reference_is_computed_again(tiny_preferences: Path, tmp_path: Path) -> None:
    """A resumed run, whose model is another one by now, ends as if nothing had happened."""
    from lit_llm.strategies.checkpoint_io import read_checkpoint

    def run(output: Path, *extra: str) -> dict[str, torch.Tensor]:
        cache = f"--data.cache_dir={output / 'cache'}"
        cli = dpo.main(arguments(tiny_preferences, "dpo", output, *RATE, cache, *extra))
        assert cli is not None
        state = read_checkpoint(sorted((output / "checkpoints").glob("step=*.ckpt"))[-1])
        return dict(state["state_dict"])

    straight = run(tmp_path / "straight")
    (tmp_path / "cut").mkdir()
    run(tmp_path / "cut")
    (tmp_path / "cut" / "checkpoints" / "step=00000012.ckpt").unlink()
    (reference,) = (tmp_path / "cut" / "cache").glob("reference-*.safetensors")
    first = reference.read_bytes()
    reference.unlink()
    resumed = run(tmp_path / "cut")
    (again,) = (tmp_path / "cut" / "cache").glob("reference-*.safetensors")
    assert again.name == reference.name
    assert again.read_bytes() == first
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["--model.beta=0"], "beta must be above 0"),
        (["--model.reference=adapter_off"], "reference adapter_off needs adapters"),
        (["--model.loss=ipo", "--model.label_smoothing=0.1"], "goes with loss: sigmoid only"),
        (["--model.kl_prompts=-1"], "kl_prompts must not be negative"),
    ],
)
def test_a_mistake_is_one_sentence(
    settings: list[str],
    sentence: str,
    tiny_preferences: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        dpo.main(arguments(tiny_preferences, "dpo", tmp_path, *settings))
    assert caught.value.code == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    assert sentence in error


def test_ipo_and_a_precomputed_reference_with_adapters(
    tiny_preferences: Path, tmp_path: Path
) -> None:
    extra = (*LORA, "--model.reference=precomputed", "--model.loss=ipo", "--model.beta=0.2")
    cli = dpo.main(arguments(tiny_preferences, "dpo", tmp_path, *RATE, *extra))
    assert cli is not None
    # (0 - 1 / (2 beta))^2 of a policy that is its reference.
    assert cli.results["before"]["loss"] == pytest.approx(6.25, abs=1e-4)
    assert cli.results["after"]["loss"] < 6.25


def test_a_checkpoint_knows_what_it_started_from(
    tiny_chat: Path, tiny_preferences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another model in the same folder is no reference for a policy that is half trained."""
    import shutil

    from safetensors.torch import load_file, save_file

    base = tmp_path / "model"
    shutil.copytree(tiny_chat / "model", base)
    cache = f"--data.cache_dir={tmp_path / 'cache'}"
    args = arguments(tiny_preferences, "dpo", tmp_path / "run", *RATE, cache)
    args += [f"--model.base.pretrained={base}"]
    dpo.main(args)
    (tmp_path / "run" / "checkpoints" / "step=00000012.ckpt").unlink()
    state = load_file(base / "model.safetensors")
    save_file({k: v * 1.5 for k, v in state.items()}, base / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        dpo.main(args)
    assert caught.value.code == 1
    assert "trained against another reference" in capsys.readouterr().err


def test_kl_of_sampled_answers_is_that_of_plain_models(
    learned: Path, tiny_chat: Path, tiny_preferences: Path
) -> None:
    """The module's estimate against log-probabilities of its answers, taken one by one."""
    from transformers import AutoModelForCausalLM

    from lit_llm.data.preference import PreferenceDataModule
    from lit_llm.modules import dpo as module_file
    from lit_llm.modules.dpo import DPOModule

    policy = AutoModelForCausalLM.from_pretrained(learned / "model").eval()
    start = AutoModelForCausalLM.from_pretrained(tiny_chat / "model").eval()
    answers: list[tuple[list[int], list[int]]] = []
    sample = module_file.generate

    def kept(model: object, prompts: list[list[int]], *args: object, **options: object) -> object:
        found = sample(model, prompts, *args, **options)
        answers.extend((list(p), r.ids) for p, r in zip(prompts, found, strict=True))
        return found

    data = PreferenceDataModule(
        tokenizer=str(learned / "model"),
        sources=[str(tiny_preferences / "first.jsonl")],
        seq_len=96,
        cache_dir=str(tiny_preferences / "cache"),
    )
    module = DPOModule.__new__(DPOModule)
    torch.nn.Module.__init__(module)
    module.model = policy
    module.kl_config = module_file.GenerationConfig(8)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(module_file, "generate", kept)
    monkey.setattr(DPOModule, "device", torch.device("cpu"))

    class Plain:
        def forward_context(self) -> object:
            import contextlib

            return contextlib.nullcontext()

    class FakeTrainer:
        precision_plugin = Plain()

    import contextlib

    monkey.setattr(DPOModule, "trainer", FakeTrainer())
    monkey.setattr(DPOModule, "reference_model", lambda self, policy: contextlib.nullcontext(start))
    prompts = [question.prompt_ids for question in data.heldout_questions("test", 4)]
    try:
        total = module._sampled_kl(prompts, data)
    finally:
        monkey.undo()
    expected = 0.0
    for prompt, response in answers:
        tokens = torch.tensor([prompt + response])
        for model, sign in ((policy, 1), (start, -1)):
            with torch.no_grad():
                rows = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected += sign * float(rows.gather(1, tokens[0, len(prompt) :, None]).sum())
    assert float(total[1]) == 4
    assert float(total[0]) == pytest.approx(expected, abs=1e-3)
