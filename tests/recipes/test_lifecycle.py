"""The life cycle through its ``main``: overrides by stage, stages resumed, the margin kept."""

import lifecycle
import pytest


def test_stages_run_in_order_and_a_model_that_learned_nothing_fails(tmp_path, capsys):
    """Two steps teach nothing, which the margin must notice."""
    tiny = ["--pretrain.trainer.max_steps=2", "--pretrain.logging.wandb", "off"]
    tiny += ["--pretrain.data.seq_len=32", "--pretrain.samples.max_new_tokens=2"]
    tiny += ["--pretrain.trainer.limit_test_batches=2", "--tokenizer.vocab_size=300"]
    with pytest.raises(SystemExit) as caught:
        lifecycle.main([f"--output_dir={tmp_path}", *tiny])
    assert caught.value.code == 1
    assert "must be 15% below" in capsys.readouterr().err
    for name in ("tokenizer/tokenizer.json", "pretrain/report.md", "pretrain/model/config.json"):
        assert (tmp_path / name).exists()


def test_fine_tuning_that_taught_nothing_fails(tiny_chat, tmp_path, capsys):
    """It takes the exported model of the stage before it, and the questions of python-docs."""
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "model").symlink_to(tiny_chat / "model")
    tiny = "max_steps=2 limit_test_batches=2 limit_val_batches=0 precision=32-true".split()
    args = [f"--sft.trainer.{setting}" for setting in tiny]
    args += ["--sft.data.seq_len=96", "--sft.samples.test_count=4", "--sft.logging.wandb=off"]
    args += ["--sft.samples.max_new_tokens=8"]
    with pytest.raises(SystemExit) as caught:
        lifecycle.main([f"--output_dir={tmp_path}", "--from=sft", *args])
    assert caught.value.code == 1
    assert (
        "0% of the answers to held-out questions have the trained form" in capsys.readouterr().err
    )
    assert (tmp_path / "sft" / "model" / "chat_template.jinja").exists()


def test_answers_must_have_form_and_end(capsys):
    lifecycle.check_answers(
        {"before": {"well_formed_rate": 0.0}, "after": {"well_formed_rate": 0.8}}
    )
    assert "80% of the answers are well formed" in capsys.readouterr().out
    with pytest.raises(lifecycle.UserError, match="79% of the answers"):
        lifecycle.check_answers(
            {"before": {"well_formed_rate": 0.0}, "after": {"well_formed_rate": 0.79}}
        )


def test_the_margin_is_a_share_of_the_better_reference():
    rows = {"unigram": {"bits_per_byte": 3.0}, "gzip": {"bits_per_byte": 2.0}}
    lifecycle.check_margin({**rows, "after": {"bits_per_byte": 1.69}})
    with pytest.raises(lifecycle.UserError, match="1.710 bits per byte"):
        lifecycle.check_margin({**rows, "after": {"bits_per_byte": 1.71}})


@pytest.mark.parametrize("args", [["--data.seq_len=3"], ["--pretrian.trainer.max_steps=3"], ["x"]])
def test_settings_of_no_stage_are_refused(args, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        lifecycle.main([f"--output_dir={tmp_path}", *args])
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_answers_must_certainly_have_become_better(capsys):
    before = {"objective/scores": -0.1}
    after = {"objective/scores": 0.4, "objective/kl": 2.5, "win_rate": 0.62}
    lifecycle.check_wins(
        {"before": before, "after": {**after, "win_rate_low": 0.53, "win_rate_high": 0.7}}
    )
    told = capsys.readouterr().out
    assert "reward -0.100 before, 0.400 after; KL 2.50 nats; win rate" in told
    assert "0.620 (95 % interval 0.530 to 0.700)" in told
    with pytest.raises(lifecycle.UserError, match="not certainly made the answers better"):
        lifecycle.check_wins(
            {"before": before, "after": {**after, "win_rate_low": 0.5, "win_rate_high": 0.7}}
        )
