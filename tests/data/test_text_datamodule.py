import collections
import json
import random
import warnings
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_llm.data.cleaning import Cleaning
from lit_llm.data.deduplication import Deduplication
from lit_llm.data.sources import Source
from lit_llm.data.text import TextDataModule
from lit_llm.errors import UserError

WORDS = [start + end for start in "bdfg" for end in ("at", "ore", "ing", "ullet")]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A byte-level tokenizer without merges: a token is a byte. EOS is 256, PAD 257."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|pad|>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    ).save_pretrained(folder)
    return str(folder)


def write(path, number, seed):
    generator = random.Random(seed)
    texts = [" ".join(generator.choices(WORDS, k=12)) + f" {seed} {n}" for n in range(number)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def make(tokenizer_folder, tmp_path):
    """Builds a data module on two small sources in the ratio 3:1."""
    big = write(tmp_path / "big.jsonl", 60, seed=1)
    small = write(tmp_path / "small.jsonl", 30, seed=2)

    def build(**options):
        defaults = {
            "tokenizer": tokenizer_folder,
            "sources": [Source(big, weight=3), Source(small, weight=1)],
            "seq_len": 32,
            "micro_batch_size": 4,
            "val_fraction": 0.1,
            "test_fraction": 0.1,
            "cache_dir": str(tmp_path / "cache"),
        }
        return TextDataModule(**{**defaults, **options})

    build.big, build.small, build.folder = big, small, tmp_path
    return build


def texts_of(path):
    with open(path) as file:
        return [json.loads(line)["text"] for line in file]


def test_every_training_token_is_predicted_once_an_epoch(make):
    data = make(sources=[make.big], micro_batch_size=1)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == data.batches_per_epoch
    assert set(batches[0]) == {"input_ids", "labels", "source", "num_targets"}
    assert batches[0]["input_ids"].shape == (1, 32)
    tokens = torch.tensor(data.cache.split(0, "train").tokens.astype("int64"))
    predicted = torch.cat([batch["labels"][:, 1:].flatten() for batch in batches])
    kept = 1 + len(predicted)  # the block that was not full is dropped
    assert len(tokens) - 31 < kept <= len(tokens)
    assert predicted.bincount(minlength=258).equal(tokens[1:kept].bincount(minlength=258))


def test_the_held_out_blocks_hold_the_held_out_texts(make):
    data = make(sources=[make.big], val_micro_batch_size=3)
    data.setup()
    for split, loader in [("validation", data.val_dataloader()), ("test", data.test_dataloader())]:
        texts = list(data.heldout_texts(split))
        assert texts and set(texts) < set(texts_of(make.big))
        targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in loader)
        assert targets == sum(len(text) + 1 for text in texts) - 1
        assert next(iter(loader))["input_ids"].shape == (3, 32)
    train = set(texts_of(make.big)) - set(data.heldout_texts()) - set(data.heldout_texts("test"))
    assert len(train) == data.corpus_report()["sources"]["big"]["splits"]["train"]["documents"]


def test_the_mixture_is_held_and_tokens_seen_are_told(make):
    data = make()
    data.setup("fit")
    seen = torch.zeros(2, dtype=torch.long)
    for number, batch in enumerate(data.train_dataloader(), start=1):
        seen += batch["source"].bincount(minlength=2)
        assert data.tokens_seen() == {"big": seen[0] * 31, "small": seen[1] * 31}
        assert abs(seen[0] - 4 * number * 0.75) <= 1


def test_isolated_documents(make):
    data = make(isolate_documents=True, seq_len=100)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    starts = (batch["document_ids"][:, 1:] != batch["document_ids"][:, :-1]).nonzero()
    assert len(starts)
    for row, column in starts.tolist():
        assert batch["input_ids"][row, column] == 256  # EOS
        assert batch["position_ids"][row, column + 1] == 0
        assert batch["labels"][row, column + 1] == -100
    assert batch["num_targets"] == 4 * 99 - len(starts)


def test_validation_sources_are_held_out_as_a_whole_and_not_trained_on(make):
    held_out = make.folder / "val.jsonl"
    lines = [*texts_of(make.big)[:5], "a text that stands nowhere else"]
    held_out.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    data = make(val_sources=[Source(str(held_out), name="held out")], test_fraction=0.0)
    data.setup("fit")
    assert list(data.heldout_texts()) == lines
    assert data.source_labels == ["big", "small", "held out"]
    splits = {label: part["splits"] for label, part in data.corpus_report()["sources"].items()}
    assert splits["big"]["train"]["documents"] == 55
    assert splits["big"]["validation"]["documents"] == 0
    assert {int(number) for batch in data.val_dataloader() for number in batch["source"]} == {2}
    assert data.test_dataloader() == []


def test_no_validation_when_none_is_asked_for(make):
    data = make(val_fraction=0.0, test_fraction=0.0)
    data.setup()
    assert data.val_dataloader() == data.test_dataloader() == []


def test_token_counts_and_bytes(make):
    data = make(sources=[make.big])
    counts = data.token_counts("validation")
    text = "".join(data.heldout_texts())
    letter = data.tokenizer("e")["input_ids"][0]
    assert counts.shape == data.token_bytes.shape == (258,)
    assert counts[letter] == text.count("e")
    assert int((counts * data.token_bytes).sum()) == len(text.encode())
    assert int(data.token_counts().sum()) == len(data.cache.split(0, "train").tokens)


def test_ranks_share_the_data_out(make):
    def on_rank(rank, world_size, micro_batch_size):
        data = make(micro_batch_size=micro_batch_size)
        data.trainer = SimpleNamespace(
            distributed_sampler_kwargs={"rank": rank, "num_replicas": world_size},
            accumulate_grad_batches=2,
            limit_train_batches=1.0,
            max_steps=-1,
            fit_loop=SimpleNamespace(
                epoch_loop=SimpleNamespace(
                    batch_progress=SimpleNamespace(current=SimpleNamespace(ready=0))
                )
            ),
            _accelerator_connector=SimpleNamespace(use_distributed_sampler=False),
        )
        data.setup("fit")
        return list(data.train_dataloader()), list(data.val_dataloader())

    one, one_val = on_rank(0, 1, 8)
    first, second = on_rank(0, 2, 4), on_rank(1, 2, 4)
    for whole, *parts in zip(one, first[0], second[0], strict=True):
        together = torch.cat([part["input_ids"] for part in parts])
        assert together.equal(whole["input_ids"])
        assert sum(part["num_targets"] for part in parts) == whole["num_targets"]
    assert len(first[1]) == len(second[1])
    targets = [
        sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        for batches in (one_val, first[1], second[1])
    ]
    assert targets[0] == targets[1] + targets[2]


def test_lightning_must_not_share_the_data_out_again(make):
    data = make()
    data.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"rank": 0, "num_replicas": 2},
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=True),
    )
    with pytest.raises(UserError, match="use_distributed_sampler to false"):
        data.val_dataloader()


class Recorder(pl.LightningModule):
    """Writes down the batches that it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.steps = []
        self.targets = collections.defaultdict(list)  # of each optimizer step: given, counted

    def training_step(self, batch, batch_idx):
        counted = int((batch["labels"][:, 1:] != -100).sum())
        self.targets[self.global_step].append((int(batch["num_targets"]), counted))
        self.steps.append(
            (self.current_epoch, batch_idx, int(batch["num_targets"]), batch["input_ids"])
        )
        return self.weight * batch["num_targets"]

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        # Lightning builds the loaders for this, before the checkpoint is restored.
        assert self.trainer.estimated_stepping_batches == self.trainer.max_steps
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, folder, max_steps=30, ckpt_path=None, max_epochs=-1):
    model = Recorder()
    trainer = pl.Trainer(
        max_steps=max_steps,
        max_epochs=max_epochs,
        accumulate_grad_batches=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=1,
        val_check_interval=5,
        default_root_dir=folder,
        callbacks=ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        trainer.fit(model, data, ckpt_path=ckpt_path)
    for step in model.targets.values():
        given, counted = zip(*step, strict=True)
        assert set(given) == {sum(counted)}
    return model.steps


@pytest.mark.parametrize("workers", [0, 1])
def test_training_resumes_exactly_under_lightning(make, tmp_path, workers):
    options = {
        "num_workers": workers,
        "seq_len": 135,
        "micro_batch_size": 2,
        "isolate_documents": True,  # so that the windows have different numbers of targets
    }
    straight = fit(make(**options), tmp_path / "straight", max_epochs=99)
    # Epochs of 18 micro-batches are windows of 4, 4, 4, 4 and 2, so 5 steps.
    assert [step[:2] for step in straight] == [divmod(n, 18) for n in range(6 * 18)]
    for step in (3, 5, 6, 14, 15) if workers == 0 else (7,):  # 5 and 15 end an epoch
        done = step // 5 * 18 + step % 5 * 4
        checkpoint = tmp_path / "straight" / f"step={step}.ckpt"
        folder = tmp_path / f"resumed-{step}"
        resumed = fit(make(**options), folder, ckpt_path=checkpoint, max_epochs=99)
        assert [part[:3] for part in resumed] == [part[:3] for part in straight[done:]]
        assert all(a[3].equal(b[3]) for a, b in zip(resumed, straight[done:], strict=True))
        assert torch.load(checkpoint, weights_only=True)["TextDataModule"]["consumed"] == 2 * done


def test_a_run_measured_in_steps_is_one_epoch(make, tmp_path):
    straight = fit(make(micro_batch_size=2), tmp_path / "straight", max_steps=9)
    assert [step[:2] for step in straight] == [(0, n) for n in range(36)]
    checkpoint = tmp_path / "straight" / "step=5.ckpt"
    longer = fit(make(micro_batch_size=2), tmp_path / "on", max_steps=11, ckpt_path=checkpoint)
    assert [step[:2] for step in longer] == [(0, n) for n in range(20, 44)]
    assert all(a[3].equal(b[3]) for a, b in zip(longer, straight[20:], strict=False))


def test_windows_are_lightnings_after_a_resume_with_other_batches(make, tmp_path):
    options = {"seq_len": 135, "isolate_documents": True}
    fit(make(micro_batch_size=2, **options), tmp_path / "two", max_steps=4)
    checkpoint = tmp_path / "two" / "step=3.ckpt"
    # As on half the ranks: Lightning has counted 12 batches, and the cursor stands after 24.
    data = make(micro_batch_size=1, **options)
    steps = fit(data, tmp_path / "one", max_steps=8, ckpt_path=checkpoint)
    assert [step[:2] for step in steps] == [(0, n) for n in range(12, 32)]
    expected = data.mixture.indices(24, 44).tolist()
    blocks = [block["input_ids"] for own in data.train_parts for block in own]
    assert all(s[3][0].equal(blocks[i]) for s, i in zip(steps, expected, strict=True))


def test_the_state_is_plain_and_is_refused_by_another_run(make):
    data = make()
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches), next(batches)
    state = json.loads(json.dumps(data.state_dict()))
    assert state["consumed"] == 8
    again = make(num_workers=3, micro_batch_size=2)  # these may differ
    again.load_state_dict(state)
    assert again.state_dict() == state
    for options, name in [
        ({"seq_len": 16}, "seq_len"),
        ({"seed": 1}, "seed"),
        ({"sources": [Source(make.big, 2), Source(make.small, 1)]}, "weights"),
        ({"sources": [make.small]}, "corpus"),
        ({"cleaning": Cleaning(min_characters=5)}, "corpus"),
    ]:
        with pytest.raises(UserError, match=f"another {name}"):
            make(**options).load_state_dict(state)


def test_a_checkpoint_may_be_evaluated_on_other_text(make):
    state = make().state_dict()
    other = make(sources=[make.small])
    other.trainer = SimpleNamespace(state=SimpleNamespace(fn="validate"))
    other.load_state_dict({**state, "consumed": 8})
    assert other.state_dict()["consumed"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "seq_len is 1"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"val_micro_batch_size": 0}, "val_micro_batch_size is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"val_fraction": 0.7, "test_fraction": 0.5}, "val_fraction 0.7"),
        ({"sources": []}, "no source"),
        ({"sources": [Source("a", weight=1), Source("b")]}, "source b has no weight"),
    ],
)
def test_bad_settings_are_refused_at_once(make, options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_too_little_text_is_refused_before_training(make):
    (make.folder / "tiny.txt").write_text("just a few words")
    tiny = str(make.folder / "tiny.txt")
    none = {"val_fraction": 0.0, "test_fraction": 0.0}
    with pytest.raises(UserError, match="source tiny: its 17 training tokens do not fill"):
        make(sources=[tiny], **none).setup("fit")
    with pytest.raises(UserError, match="no document fell into the validation split"):
        make(sources=[tiny], seq_len=4, val_fraction=1e-9).setup("fit")
    with pytest.raises(UserError, match="no document fell into the test split"):
        make(sources=[tiny], seq_len=4, val_fraction=0.0, test_fraction=1e-9).setup("test")
    data = make(sources=[tiny], seq_len=4, micro_batch_size=20, **none)
    data.setup("fit")
    with pytest.raises(UserError, match="there are 5 training samples, fewer than one"):
        data.train_dataloader()


def test_prepare_data_says_what_there_is_and_what_was_removed(make, caplog):
    with open(make.small, "a") as file:
        file.write(json.dumps({"text": "x"}) + "\n")
    data = make(cleaning=Cleaning(min_characters=2), deduplication=Deduplication())
    lightning_logger = "lightning.pytorch.utilities.rank_zero"
    with caplog.at_level("INFO", logger=lightning_logger):
        data.prepare_data()
        data.prepare_data()
    assert caplog.text.count("Corpus: ") == 1
    assert "Corpus: big, small" in caplog.text
    assert "1 short" in caplog.text
    assert "small, train: " in caplog.text


def test_the_command_line_builds_it(make, tokenizer_folder):
    from jsonargparse import ArgumentParser

    config = make.folder / "config.yaml"
    config.write_text(
        f"tokenizer: {tokenizer_folder}\n"
        f"sources:\n- {make.small}\n- {{path: {make.big}, name: large}}\n"
        "seq_len: 64\n"
        "cleaning:\n  unicode: NFKC\n"
    )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TextDataModule, "data")
    parsed = parser.parse_args(
        [f"--data={config}", "--data.deduplication.near=true", f"--data.cache_dir={make.folder}"]
    )
    data = parser.instantiate(parsed).data
    assert data.source_labels == ["small", "large"]
    assert data.settings.cleaning == Cleaning(unicode="NFKC")
    assert data.settings.deduplication == Deduplication(near=True)
    assert data.seq_len == 64
    defaults = parser.instantiate(parser.parse_args([])).data
    assert defaults.source_labels == ["python-docs"]
    assert "Tokens of a sample" in parser.format_help()
