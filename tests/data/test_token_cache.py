import dataclasses
import hashlib
import itertools
import json
import pickle
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from lit_llm.data import token_cache
from lit_llm.data.cleaning import Cleaning
from lit_llm.data.corpus import CorpusSettings, corpus_card, corpus_report, corpus_summary
from lit_llm.data.deduplication import Deduplication
from lit_llm.data.sources import Source
from lit_llm.data.token_cache import cache_key, open_cache, tokenizer_hash
from lit_llm.errors import UserError

EOS = 1


class Characters:
    """A stand-in for a tokenizer: the ids of a text are its code points."""

    eos_token_id = EOS

    def get_vocab(self):
        return {"last": 59_999}

    def __call__(self, texts, **options):
        return {"input_ids": [[ord(character) for character in text] for text in texts]}


def write(path, texts):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return Source(str(path))


def settings_for(*sources, **options):
    return CorpusSettings(sources, **{"val_fraction": 0.0, "test_fraction": 0.0, **options})


def documents(split):
    bounds = [*split.starts.tolist(), len(split.tokens)]
    parts = [split.tokens[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    assert all(part[-1] == EOS for part in parts)
    return ["".join(map(chr, part[:-1])) for part in parts]


def test_documents_are_stored_one_after_the_other_with_eos(tmp_path):
    source = write(tmp_path / "a.jsonl", ["ab", "cdé", "f"])
    cache = open_cache(tmp_path / "cache", settings_for(source), Characters())
    train = cache.split(0, "train")
    assert train.tokens.tolist() == [97, 98, EOS, 99, 100, 233, EOS, 102, EOS]
    assert train.tokens.dtype == np.uint16
    assert isinstance(train.tokens, np.memmap)
    assert train.starts.tolist() == [0, 3, 7]
    digest = hashlib.sha256("2\nab4\ncdé1\nf".encode()).hexdigest()
    assert train.counts == {"documents": 3, "bytes": 7, "tokens": 9, "sha256": digest}
    assert cache.meta["sha256"] == digest
    assert len(cache.split(0, "test").tokens) == len(cache.split(0, "test").starts) == 0


def test_many_batches_equal_one(tmp_path, monkeypatch):
    texts = [f"document {n} " + n * "x" for n in range(50)]
    source = write(tmp_path / "a.jsonl", texts)
    monkeypatch.setattr(token_cache, "_BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(token_cache, "_BATCH_CHARACTERS", 100)
    cache = open_cache(tmp_path / "cache", settings_for(source), Characters())
    assert documents(cache.split(0, "train")) == texts


def test_every_document_is_in_one_split_and_held_out_texts_are_kept(tmp_path):
    texts = [f"text number {n}" for n in range(200)]
    source = write(tmp_path / "a.jsonl", texts)
    settings = settings_for(source, val_fraction=0.2, test_fraction=0.2)
    cache = open_cache(tmp_path / "cache", settings, Characters())
    parts = {name: documents(cache.split(0, name)) for name in ("train", "validation", "test")}
    assert all(len(part) > 20 for part in parts.values())
    assert sorted(itertools.chain.from_iterable(parts.values())) == sorted(texts)
    for name in ("validation", "test"):
        assert list(cache.split(0, name).texts()) == parts[name]


def test_a_text_in_two_sources_is_kept_in_the_first_and_validation_comes_before(tmp_path):
    first = write(tmp_path / "a.jsonl", ["one", "two", "two"])
    second = write(tmp_path / "b.jsonl", ["three", "TWO", "four"])
    val = write(tmp_path / "v.jsonl", ["four", "five"])
    settings = settings_for(first, second, val_sources=[val])
    cache = open_cache(tmp_path / "cache", settings, Characters())
    assert [documents(cache.split(k, "train")) for k in range(3)] == [["one", "two"], ["three"], []]
    assert documents(cache.split(2, "validation")) == ["four", "five"]
    report = cache.deduplication_report()
    assert (report.documents, report.kept, report.exact) == (8, 5, 3)
    assert report.examples[0].kept.endswith("a.jsonl:2")


def test_reports_survive_the_disk(tmp_path):
    source = write(tmp_path / "a.jsonl", ["long enough", "no", "long  enough", "e\u0301tude"])
    settings = settings_for(source, cleaning=Cleaning(min_characters=3))
    cache = open_cache(tmp_path / "cache", settings, Characters())
    report = cache.cleaning_report(0)
    assert (report.documents, report.kept, report.normalized) == (4, 3, 1)
    assert report.removed == {"short": 1}
    told = corpus_report(cache, settings, ["a"])
    assert told["sources"]["a"]["splits"]["train"]["documents"] == 2
    lines = list(corpus_summary(cache, ["a"]))
    assert "1 short" in lines[0]
    assert lines[1] == "a, train: 2 documents, 17 bytes, 18 tokens"
    assert "1 equal" in lines[2]
    card = corpus_card(cache, settings, name="A")
    assert (card.documents, card.bytes, card.tokens) == (2, 17, 18)


def test_a_second_start_reads_and_tokenises_nothing(tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", ["ab", "cd"])
    first = open_cache(tmp_path / "cache", settings_for(source), Characters())

    def never(*_):
        raise AssertionError("the cache was not used")

    monkeypatch.setattr(token_cache, "_encode", never)
    monkeypatch.setattr(token_cache, "read_documents", never)
    moved = Source(source.path, name="another name", weight=2.0)  # changes no document
    second = open_cache(tmp_path / "cache", settings_for(moved), Characters())
    assert second.folder == first.folder
    assert documents(second.split(0, "train")) == ["ab", "cd"]


def test_whatever_changes_the_tokens_changes_the_key(tmp_path):
    source = write(tmp_path / "a.jsonl", ["ab", "cd"])
    other = write(tmp_path / "b.jsonl", ["ef"])
    base = settings_for(source)
    changed = [
        settings_for(source, other),
        settings_for(source, val_sources=[other]),
        *(
            dataclasses.replace(base, **change)
            for change in (
                {"cleaning": Cleaning(min_characters=1)},
                {"deduplication": Deduplication(exact=False)},
                {"val_fraction": 0.1},
                {"test_fraction": 0.1},
            )
        ),
    ]
    keys = [cache_key(settings, Characters()) for settings in [base, *changed]]
    write(tmp_path / "a.jsonl", ["ab", "cd", "new"])
    keys.append(cache_key(base, Characters()))
    another_eos = Characters()
    another_eos.eos_token_id = 2
    keys.append(cache_key(base, another_eos))
    assert len(set(keys)) == len(keys) == 9


def byte_level(vocab_size_beyond_bytes=0):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(alphabet)}
    for number in range(vocab_size_beyond_bytes):
        vocabulary[f"word{number}"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def test_special_tokens_written_in_a_text_are_text(tmp_path):
    tokenizer = byte_level()
    assert tokenizer("a<|end|>")["input_ids"][-1] == tokenizer.eos_token_id  # what must not happen
    source = write(tmp_path / "a.jsonl", ["a<|end|>b"])
    cache = open_cache(tmp_path / "cache", settings_for(source), tokenizer)
    tokens = cache.split(0, "train").tokens.tolist()
    assert tokens.count(tokenizer.eos_token_id) == 1
    assert len(tokens) == len("a<|end|>b") + 1
    assert tokenizer.decode(tokens[:-1]) == "a<|end|>b"


def test_the_hash_of_a_tokenizer_is_that_of_its_content(tmp_path):
    tokenizer = byte_level()
    before = tokenizer_hash(tokenizer)
    tokenizer("some text", truncation=True, max_length=2)
    tokenizer.save_pretrained(tmp_path / "elsewhere")
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path / "elsewhere")
    assert tokenizer_hash(tokenizer) == tokenizer_hash(again) == before
    assert tokenizer_hash(byte_level(vocab_size_beyond_bytes=1)) != before


@pytest.mark.parametrize(("beyond", "dtype"), [(65535 - 257, "uint16"), (65536 - 257, "uint32")])
def test_tokens_take_four_bytes_only_where_two_do_not_do(tmp_path, beyond, dtype):
    tokenizer = byte_level(beyond)
    source = write(tmp_path / "a.jsonl", ["ab"])
    cache = open_cache(tmp_path / "cache", settings_for(source), tokenizer)
    tokens = cache.split(0, "train").tokens
    assert tokens.dtype == dtype
    assert tokens[-1] == tokenizer.eos_token_id == 256 + beyond


def test_a_pickled_split_carries_no_tokens(tmp_path):
    source = write(tmp_path / "a.jsonl", ["x" * 100_000])
    split = open_cache(tmp_path / "cache", settings_for(source), Characters()).split(0, "train")
    assert len(split.tokens) == 100_001
    data = pickle.dumps(split)
    assert len(data) < 2_000
    assert (pickle.loads(data).tokens == split.tokens).all()


@pytest.mark.parametrize("name", ["0-train.tokens", "0-train.starts", "meta.json"])
def test_a_damaged_cache_is_built_again(tmp_path, name):
    source = write(tmp_path / "a.jsonl", ["ab", "cd"])
    folder = open_cache(tmp_path / "cache", settings_for(source), Characters()).folder
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-3])
    cache = open_cache(tmp_path / "cache", settings_for(source), Characters())
    assert (folder / name).read_bytes() == data
    assert documents(cache.split(0, "train")) == ["ab", "cd"]


def test_a_build_that_fails_leaves_nothing(tmp_path):
    source = write(tmp_path / "a.jsonl", ["ab"])
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\nnot json\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        open_cache(tmp_path / "cache", settings_for(source), Characters())
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] in ([], [".lock"])


def test_a_cache_dir_that_cannot_be_written(tmp_path):
    source = write(tmp_path / "a.jsonl", ["ab"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cache cannot be written"):
        open_cache(tmp_path / "file" / "cache", settings_for(source), Characters())


BUILDER = """
import pathlib, sys, time
from lit_llm.data import token_cache
from lit_llm.data.corpus import CorpusSettings
from lit_llm.data.sources import Source

source, folder, log, mode = sys.argv[1:]
token_cache._BATCH_DOCUMENTS = 1

class Characters:
    eos_token_id = 1
    def get_vocab(self):
        return {"last": 59_999}
    def __call__(self, texts, **options):
        with open(log, "a") as file:
            file.write(f"{mode}\\n")
        if mode == "hang" and texts == ["b"]:
            print("half", flush=True)
            time.sleep(600)
        time.sleep(0.2)
        return {"input_ids": [[ord(character) for character in text] for text in texts]}

settings = CorpusSettings([Source(source)], val_fraction=0.0, test_fraction=0.0)
print("ready", flush=True)
sys.stdin.readline()
cache = token_cache.open_cache(folder, settings, Characters())
print(cache.key, cache.split(0, "train").tokens.tolist(), flush=True)
"""


def start_builder(tmp_path, mode):
    script = tmp_path / "builder.py"
    script.write_text(textwrap.dedent(BUILDER))
    arguments = [tmp_path / "a.jsonl", tmp_path / "cache", tmp_path / "log", mode]
    process = subprocess.Popen(
        [sys.executable, script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_processes_at_once_build_one_cache(tmp_path):
    write(tmp_path / "a.jsonl", ["a", "b", "c"])
    builders = [start_builder(tmp_path, mode) for mode in ("one", "other")]
    for builder in builders:
        builder.stdin.write("\n")
        builder.stdin.flush()
    told = [builder.communicate(timeout=60)[0] for builder in builders]
    assert told[0] == told[1]
    assert told[0].endswith(f" {[97, EOS, 98, EOS, 99, EOS]}\n")
    log = (tmp_path / "log").read_text().split()
    assert len(log) == 3 and len(set(log)) == 1  # one tokenised its three documents, the other none


def test_a_killed_builder_leaves_nothing_to_read_and_blocks_nobody(tmp_path):
    source = write(tmp_path / "a.jsonl", ["a", "b", "c"])
    builder = start_builder(tmp_path, "hang")
    builder.stdin.write("\n")
    builder.stdin.flush()
    assert builder.stdout.readline() == "half\n"
    builder.send_signal(signal.SIGKILL)
    builder.communicate(timeout=60)
    key = cache_key(settings_for(source), Characters())
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert key not in left
    assert any(name.startswith(f".{key}.") for name in left)  # it was killed half-way
    cache = open_cache(tmp_path / "cache", settings_for(source), Characters())
    assert documents(cache.split(0, "train")) == ["a", "b", "c"]
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert left <= {key, f"{key}.lock"}
