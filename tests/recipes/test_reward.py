"""The reward recipe run whole: learned, standardised, exported as a classifier, reported."""

import json
from pathlib import Path

import pytest
import reward
import torch

from tests.recipes.preference_runs import arguments, logged, scores, sequences

LEARN = (
    "--trainer.max_steps=150",
    "--trainer.max_epochs=-1",
    "--trainer.check_val_every_n_epoch=null",
    "--trainer.val_check_interval=100",
    "--data.micro_batch_size=8",
    "--trainer.accumulate_grad_batches=1",
    "--model.optimizer.init_args.lr=0.003",
    "--model.base.dropout=0",
    "--trainer.limit_val_batches=1.0",
    "--checkpoint.every_n_steps=150",
)
RATE = (
    "--model.optimizer.class_path=torch.optim.AdamW",
    "--model.optimizer.init_args.lr=0.003",
)


@pytest.fixture(scope="module")
def learned(tiny_preferences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that had time to learn."""
    output = tmp_path_factory.mktemp("reward")
    args = arguments(tiny_preferences, "reward", output, RATE[0], *LEARN)
    reward.main([*args, f"--export_dir={output / 'model'}"])
    return output


def test_a_separable_preference_is_learned(learned: Path) -> None:
    results = json.loads((learned / "evaluation.json").read_text())
    before, after = results["before"], results["after"]
    assert before["accuracy"] < 0.9
    assert after["accuracy"] > 0.95
    assert after["ood/accuracy"] > 0.95
    assert after["accuracy_low"] < after["accuracy"] <= after["accuracy_high"]
    assert after["margin"] > 1 > before["margin"]
    assert 0.3 < after["length_judge"] < 0.7


def test_everything_promised_is_logged(learned: Path) -> None:
    assert logged(learned).keys() >= {
        "train/loss",
        "train/accuracy",
        "train/margin",
        "train/score_better",
        "train/score_worse",
        "val/loss",
        "val/accuracy",
        "val/accuracy/first",
        "val/accuracy/second",
        "val/margin",
        "val/score_std",
        "test/accuracy",
        "ood/accuracy",
    }


def test_the_exported_classifier_scores_as_measured(learned: Path, tiny_preferences: Path) -> None:
    """All pairs of the second set, scored by transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(learned / "model")
    tokenizer = AutoTokenizer.from_pretrained(learned / "model")
    pairs = sequences(tokenizer, tiny_preferences / "other.jsonl")
    better = scores(model, [pair[0] for pair in pairs])
    worse = scores(model, [pair[1] for pair in pairs])
    after = json.loads((learned / "evaluation.json").read_text())["after"]
    assert float((better > worse).float().mean()) == pytest.approx(after["ood/accuracy"])
    assert float((better - worse).mean()) == pytest.approx(after["ood/margin"], abs=1e-4)
    assert float(better.mean()) == pytest.approx(after["ood/score_better"], abs=1e-4)


def test_scores_are_standardised_on_the_validation_answers(
    learned: Path, tiny_preferences: Path
) -> None:
    """Mean and deviation in the config are those of transformers' own scores of these answers."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from lit_llm.data.splits import assign_split

    model = AutoModelForSequenceClassification.from_pretrained(learned / "model")
    tokenizer = AutoTokenizer.from_pretrained(learned / "model")
    texts = []
    for name in ("first", "second"):
        path = tiny_preferences / f"{name}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line, pair in zip(lines, sequences(tokenizer, path), strict=True):
            question = line["prompt"][0]["content"]
            if assign_split(question, val_fraction=0.05, test_fraction=0.2) == "validation":
                texts += pair
    found = scores(model, texts)
    assert len(found) > 20
    assert model.config.reward_mean == pytest.approx(found.mean(0).tolist(), abs=1e-4)
    assert model.config.reward_std == pytest.approx(found.std(0, correction=0).tolist(), rel=1e-3)
    assert model.config.reward_aggregation == "mean"


def test_the_report_says_whether_it_is_fit(learned: Path) -> None:
    text = (learned / "reward_report.md").read_text()
    numbers = json.loads((learned / "reward_report.json").read_text())
    assert (learned / "reward_report.png").stat().st_size > 10_000
    for part in ("Fit to drive PPO", "reward_report.png", "first", "second", "length"):
        assert part.lower() in text.lower(), part
    assert json.dumps(numbers)  # plain data


def test_adapters_and_several_heads(
    tiny_preferences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is exported is what was measured: adapters merged, the head trained whole."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    extra = ("--model.adapter.method=lora", "--model.heads=3", "--model.aggregation=min")
    args = arguments(tiny_preferences, "reward", tmp_path, *extra, *RATE)
    cli = reward.main([*args, f"--export_dir={tmp_path / 'model'}"])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.num_labels == 3
    assert model.config.reward_aggregation == "min"
    pairs = sequences(tokenizer, tiny_preferences / "other.jsonl")
    mean = torch.tensor(model.config.reward_mean)
    std = torch.tensor(model.config.reward_std)
    better, worse = (
        ((scores(model, [pair[side] for pair in pairs]) - mean) / std).amin(1) for side in (0, 1)
    )
    assert float((better > worse).float().mean()) == pytest.approx(
        cli.results["after"]["ood/accuracy"]
    )
    margin = float((better - worse).mean() * std.mean())
    assert margin == pytest.approx(cli.results["after"]["ood/margin"], rel=1e-3)
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    state = torch.load(tmp_path / "checkpoints" / "step=00000012.ckpt", weights_only=True)
    names = [name for name in state["state_dict"] if name.startswith("model.")]
    assert names and all("lora" in name or "score" in name for name in names)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("--model.heads=0", "heads must be at least 1"),
        ("--model.label_smoothing=0.5", "label_smoothing must be at least 0 and below 0.5"),
        ("--model.margin=-1", "must not be negative"),
        ("--data.sources={first}", "holds no comparison"),
        ("--data.seq_len=4", "seq_len 4"),
    ],
)
def test_a_mistake_is_one_sentence(
    setting: str,
    sentence: str,
    tiny_preferences: Path,
    tiny_chat: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    setting = setting.format(first=tiny_chat / "first.jsonl")
    with pytest.raises(SystemExit) as caught:
        reward.main(arguments(tiny_preferences, "reward", tmp_path, setting))
    assert caught.value.code == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    assert sentence in error


def test_inspect_shows_which_answer_is_better(
    tiny_preferences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        reward.main(arguments(tiny_preferences, "reward", tmp_path, "--inspect"))
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "better than row 1" in shown and "worse than row 0" in shown


def test_a_checkpoint_loads_by_itself_and_scores_as_the_export(
    learned: Path, tiny_preferences: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from lit_llm.modules.reward import RewardModule

    path = learned / "checkpoints" / "step=00000150.ckpt"
    module = RewardModule.load_from_checkpoint(path, weights_only=True)
    tokenizer = AutoTokenizer.from_pretrained(learned / "model")
    model = AutoModelForSequenceClassification.from_pretrained(learned / "model")
    texts = [pair[0] for pair in sequences(tokenizer, tiny_preferences / "other.jsonl")]
    torch.testing.assert_close(scores(module.model, texts), scores(model, texts))
    # It was saved before its validation: no statistics are better than those of other weights.
    assert module.statistics is None
