"""The pre-training recipe run whole, and its answers to bad input."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pretrain
import pytest
import torch
import torch.nn.functional as F
import yaml

ROOT = Path(__file__).parents[2]


def arguments(tiny: Path, output: Path, *extra: str) -> list[str]:
    """Command line of a tiny run."""
    return [f"--config={tiny / 'tiny.yaml'}", f"--output_dir={output}", *extra]


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run with an export."""
    output = tmp_path_factory.mktemp("run")
    pretrain.main(arguments(tiny, output, f"--export_dir={output / 'model'}"))
    return output


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of the run's CSV."""
    import csv

    with (run / "metrics" / "version_0" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_it_leaves_checkpoints_metrics_samples_and_a_report(run: Path) -> None:
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step=00000008.ckpt", "step=00000012.ckpt"]
    report = (run / "report.md").read_text()
    for part in ("| before |", "| after |", "| unigram |", "| gzip |", "sha256", "torch 2."):
        assert part in report
    assert (run / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {4, 8, 12}
    assert all(row["prompt"] for row in samples)


def test_everything_promised_is_logged(run: Path) -> None:
    rows = metrics(run)
    logged = {name for row in rows for name, value in row.items() if value}
    assert logged >= {
        "train/loss",
        "train/perplexity",
        "train/lr",
        "train/grad_norm",
        "val/loss",
        "val/perplexity",
        "val/bits_per_byte",
        "val/token_accuracy",
        "val/perplexity/first",
        "val/perplexity/second",
        "perf/tokens_per_s",
        "perf/mfu",
        "perf/peak_memory",
        "data/tokens/first",
        "data/tokens/second",
    }
    # 12 steps x 2 micro-batches x 2 samples of 31 targets, mixed 3:1
    last = [row for row in rows if row.get("data/tokens/first")][-1]
    assert float(last["data/tokens/first"]) == 36 * 31
    assert float(last["data/tokens/second"]) == 12 * 31


def test_held_out_perplexity_is_that_of_a_plain_transformers_loop(run: Path, tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    from lit_llm.data.text import TextDataModule

    settings = yaml.safe_load((tiny / "tiny.yaml").read_text())["data"]
    data = TextDataModule(**settings)
    data.setup("test")
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    total, tokens = 0.0, 0
    loader: Any = data.test_dataloader()
    with torch.no_grad():
        for batch in loader:
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1].double()
            labels = batch["labels"][:, 1:]
            total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
            tokens += int((labels != -100).sum())
    measured = json.loads((run / "evaluation.json").read_text())["after"]
    assert measured["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_the_export_has_its_tokenizer(run: Path, tiny: Path) -> None:
    from transformers import AutoTokenizer

    text = "the red bird sings ñ 漢"
    exported = AutoTokenizer.from_pretrained(run / "model")
    original = AutoTokenizer.from_pretrained(tiny / "tokenizer")
    assert exported(text)["input_ids"] == original(text)["input_ids"]
    assert exported.chat_template == original.chat_template
    assert exported.pad_token_id != exported.eos_token_id


def test_a_checkpoint_loads_without_its_tokenizer_and_trainer(run: Path) -> None:
    from transformers import AutoModelForCausalLM

    from lit_llm.modules.causal_lm import CausalLMModule

    path = run / "checkpoints" / "step=00000012.ckpt"
    module = CausalLMModule.load_from_checkpoint(path, weights_only=True)
    ids = torch.arange(20)[None]
    exported = AutoModelForCausalLM.from_pretrained(run / "model")
    with torch.no_grad():
        assert torch.equal(module.model.eval()(ids).logits, exported(ids).logits)


def test_a_pretrained_folder_is_where_training_goes_on(
    run: Path, tiny: Path, tmp_path: Path
) -> None:
    cli = pretrain.main(
        arguments(
            tiny,
            tmp_path,
            f"--model.base.pretrained={run / 'model'}",
            "--model.base.config=null",
            "--model.base.dropout=0.0",
            "--trainer.max_steps=2",
        )
    )
    end = json.loads((run / "evaluation.json").read_text())["after"]
    assert cli.results["before"]["loss"] == pytest.approx(end["loss"], rel=1e-6)
    assert cli.results["after"]["loss"] != cli.results["before"]["loss"]


def test_a_finished_run_is_not_trained_again(run: Path, tiny: Path) -> None:
    checkpoint = run / "checkpoints" / "step=00000012.ckpt"
    before = checkpoint.read_bytes()
    cli = pretrain.main(arguments(tiny, run))
    assert cli.trainer.global_step == 12
    assert checkpoint.read_bytes() == before
    assert list(cli.results) == ["before", "after", "unigram", "gzip"]


def test_held_out_text_can_be_done_without(tiny: Path, tmp_path: Path) -> None:
    cli = pretrain.main(
        arguments(tiny, tmp_path, "--data.test_fraction=0", "--trainer.max_steps=1")
    )
    assert cli.results == {}
    assert (tmp_path / "report.md").exists()


def test_a_run_measured_in_epochs_ends_with_a_checkpoint(tiny: Path, tmp_path: Path) -> None:
    extra = ["--trainer.max_steps=-1", "--trainer.max_epochs=1", "--trainer.limit_train_batches=9"]
    cli = pretrain.main(arguments(tiny, tmp_path, *extra))
    assert cli.trainer.global_step == 5, "windows of two, and a last one of one"
    assert (tmp_path / "checkpoints" / "step=00000005.ckpt").exists()
    assert cli.model.total_steps() == 5
    # The last update's rate: one step of the decay above its end, as Schedule promises.
    rates = [float(row["train/lr"]) for row in metrics(tmp_path) if row.get("train/lr")]
    assert rates
    assert pretrain.main(arguments(tiny, tmp_path, *extra)).trainer.global_step == 5


def test_starting_over_puts_the_old_checkpoints_aside(tiny: Path, tmp_path: Path) -> None:
    pretrain.main(arguments(tiny, tmp_path))
    pretrain.main(arguments(tiny, tmp_path, "--resume=never", "--trainer.max_steps=3"))
    names = [path.name for path in (tmp_path / "checkpoints").glob("*.ckpt")]
    assert names == ["step=00000003.ckpt"]
    kept = {path.name for path in (tmp_path / "checkpoints" / "replaced").iterdir()}
    assert kept == {"step=00000008.ckpt", "step=00000012.ckpt"}


def test_prompts_longer_than_the_positions_are_cut(tiny: Path, tmp_path: Path) -> None:
    extra = ["--model.base.config=null", "--model.base.preset=gpt2-1m", "--trainer.max_steps=4"]
    extra += ["--samples.max_new_tokens=20", f'--samples.prompts=["{"the red bird " * 40}"]']
    pretrain.main(arguments(tiny, tmp_path, *extra))
    row = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 4
    assert row["continuation"]


@pytest.mark.slow
def test_half_precision_compiled_and_checkpointed(tiny: Path, tmp_path: Path) -> None:
    """bf16, compiled blocks and recomputed activations through checkpoint, export and resume."""
    extra = [
        "--trainer.precision=bf16-mixed",
        "--model.base.compile=true",
        "--model.base.gradient_checkpointing=true",
        "--model.z_loss=1e-4",
        "--model.schedule.name=cosine",
        f"--export_dir={tmp_path / 'model'}",
    ]
    cli = pretrain.main(arguments(tiny, tmp_path, *extra, "--trainer.max_steps=6"))
    assert math.isfinite(cli.results["after"]["loss"])
    assert cli.results["after"]["loss"] < cli.results["before"]["loss"]
    assert (tmp_path / "model" / "model.safetensors").exists()
    state = torch.load(tmp_path / "checkpoints" / "step=00000006.ckpt", weights_only=True)
    assert all("_orig_mod" not in name for name in state["state_dict"])
    again = pretrain.main(arguments(tiny, tmp_path, *extra, "--trainer.max_steps=6"))
    assert again.trainer.global_step == 6


def test_stacked_configs_inherit_no_sources(tiny: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"data": {"sources": [{"path": str(tiny / "second.jsonl")}]}}))
    extra = ["--config", str(mine), "--trainer.max_steps=1"]
    assert pretrain.main(arguments(tiny, tmp_path / "out", *extra)).datamodule.weights is None


def fails(capsys: pytest.CaptureFixture[str], args: list[str]) -> str:
    """Run the recipe, which must end with one sentence and a non-zero exit: the sentence."""
    with pytest.raises(SystemExit) as caught:
        pretrain.main(args)
    assert caught.value.code not in (0, None)
    error = capsys.readouterr().err
    sentences = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1, error
    assert "Traceback" not in error
    return sentences[0]


def sources(path: Path) -> str:
    """The argument that trains on ``path``."""
    return f'--data.sources=[{{"path": "{path}"}}]'


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Broken inputs with what the sentence must name."""
    files: dict[str, tuple[str, bytes, str]] = {
        "empty": ("empty.txt", b"", "empty"),
        "no json": ("broken.jsonl", b'{"text": "a"}\n{oops\n', "broken.jsonl:2"),
        "field": ("field.jsonl", b'{"body": "a", "title": "b"}\n', "body"),
        "bytes": ("latin.txt", "España".encode("latin-1"), "latin.txt"),
    }
    result = {"missing": (folder / "absent.jsonl", "absent.jsonl")}
    for name, (file, content, word) in files.items():
        (folder / file).write_bytes(content)
        result[name] = (folder / file, word)
    return result


@pytest.mark.parametrize("kind", ["missing", "empty", "no json", "field", "bytes"])
def test_bad_data_ends_in_one_sentence(
    kind: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, word = bad_files(tmp_path)[kind]
    sentence = fails(capsys, arguments(tiny, tmp_path / "out", sources(path)))
    assert word in sentence
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--trainer.strategy=dpp"], ["'dpp'", "ddp"]),
        (["--model.base.config=null", "--model.base.preset=lama-1m"], ["lama-1m", "llama-1m"]),
        (["--model.base.config.max_position_embeddings=16"], ["32", "16"]),
        (["--model.base.config.vocab_size=100"], ["320", "100"]),
        (["--data.tokenizer=absent/tokenizer"], ["absent/tokenizer"]),
        (["--resume=absent.ckpt"], ["absent.ckpt"]),
        (["--data.seq_len=1"], ["seq_len"]),
        (["--export_dir=README.md"], ["README.md", "folder"]),
        (["--resume=tests"], ["tests", "no checkpoint"]),
        (["--trainer.reload_dataloaders_every_n_epochs=1"], ["misfires"]),
        (["--samples.prompts=['']"], ["prompt"]),
        (["--checkpoint.keep=0"], ["keep"]),
        (["--model.schedule.min_factor=2"], ["min_factor"]),
    ],
)
def test_bad_settings_end_in_one_sentence(
    extra: list[str],
    words: list[str],
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sentence = fails(capsys, arguments(tiny, tmp_path, *extra))
    assert all(word in sentence for word in words), sentence


def test_a_checkpoint_of_another_model_is_refused(
    run: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run / "checkpoints" / "step=00000008.ckpt"
    other = ["--model.base.config.hidden_size=48", f"--resume={checkpoint}"]
    assert "another model" in fails(capsys, arguments(tiny, tmp_path, *other))


def test_other_settings_in_the_same_folder_are_refused(
    run: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = fails(capsys, arguments(tiny, run, "--model.z_loss=0.1"))
    assert "model.z_loss: 0.0 there, 0.1 now" in sentence


def test_an_unknown_setting_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        pretrain.main(arguments(tiny, tmp_path, "--model.zed_loss=0.1"))
    assert caught.value.code == 1


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs").rglob("pretrain*.yaml")))
def test_every_shipped_config_builds(
    path: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parse and build everything but the data, which a test cannot have."""
    from lit_llm.cli import RecipeCLI
    from lit_llm.data.text import TextDataModule
    from lit_llm.modules.causal_lm import CausalLMModule

    class Unprepared(TextDataModule):
        corpus_card = None  # type: ignore[assignment]

        def prepare_data(self) -> None:
            """Leave the corpus alone."""

    monkeypatch.setattr("lit_llm.cli.check_data", lambda datamodule: None)
    cli = RecipeCLI(
        CausalLMModule,
        Unprepared,
        output_dir=str(tmp_path),
        config=ROOT / "recipes" / "configs" / "pretrain.yaml",
        args=[
            f"--config={path}",
            f"--output_dir={tmp_path}",
            f"--data.tokenizer={tiny / 'tokenizer'}",
            "--logging.wandb=off",
        ],
    )
    cli.model.configure_model()
    assert cli.trainer.max_steps > 0


@pytest.mark.slow
def test_two_ranks_measure_and_train_what_one_does(run: Path, tiny: Path, tmp_path: Path) -> None:
    """DDP on two processes, the same global batch: same perplexity before and after training."""
    for name, extra in (
        ("one", ["--data.micro_batch_size=2", "--trainer.accumulate_grad_batches=2"]),
        (
            "two",
            [
                "--data.micro_batch_size=2",
                "--trainer.accumulate_grad_batches=1",
                "--trainer.devices=2",
                "--trainer.strategy=ddp",
            ],
        ),
    ):
        command = [sys.executable, str(ROOT / "recipes" / "pretrain.py")]
        # Plain descent and unequal numbers of targets: a wrong scale of a gradient shows.
        command += arguments(
            tiny,
            tmp_path / name,
            "--model.base.dropout=0.0",
            "--data.isolate_documents=true",
            "--model.optimizer=torch.optim.SGD",
            "--model.optimizer.lr=0.5",
            "--trainer.gradient_clip_val=null",
            *extra,
        )
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=240)
    one, two = (
        json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two")
    )
    for stage in ("before", "after"):
        for name in ("loss", "bits_per_byte", "token_accuracy"):
            assert two[stage][name] == pytest.approx(one[stage][name], rel=1e-5), (stage, name)
    assert one["after"]["loss"] < one["before"]["loss"]
    weights = [
        torch.load(tmp_path / name / "checkpoints" / "step=00000012.ckpt", weights_only=True)
        for name in ("one", "two")
    ]
    for name, value in weights[0]["state_dict"].items():
        torch.testing.assert_close(weights[1]["state_dict"][name], value, rtol=1e-5, atol=1e-6)


def test_sources_on_the_command_line_inherit_nothing(tiny: Path, tmp_path: Path) -> None:
    """The weights of tiny.yaml's sources must not stick to others."""
    extra = ["--data.sources", str(tiny / "second.jsonl"), "--trainer.max_steps=1"]
    cli = pretrain.main(arguments(tiny, tmp_path, *extra))
    assert cli.datamodule.source_labels == ["second"]
    assert cli.datamodule.weights is None
