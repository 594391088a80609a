"""Data sets of the Hub: read by streaming, identified by their commit, told in one sentence."""

from types import SimpleNamespace

import pytest

from lit_llm.data.hub import read_hub
from lit_llm.data.sources import Source, read_documents, source_fingerprint
from lit_llm.errors import UserError
from tests.data.test_sources import error_of, jsonl


@pytest.fixture
def hub(monkeypatch):
    """A Hub that holds one data set and remembers how it was asked."""
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        if path != "some/set":
            raise FileNotFoundError(f"Dataset '{path}' doesn't exist on the Hub\nor not accessible")
        return [{"text": "one"}, {"text": "  "}, {"text": "two"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


def test_hub_streams_by_default(hub):
    source = Source("some/set", subset="en", split="validation", revision="v1")
    documents = list(read_documents(source))
    assert documents == [
        ("one", "some/set/validation:1"),
        ("two", "some/set/validation:3"),
    ]
    wanted = {"name": "en", "split": "validation", "revision": "v1", "streaming": True}
    assert hub == [("some/set", wanted)]


def test_unknown_on_the_hub_is_one_sentence(hub):
    message = error_of("some/unknown")
    assert message == (
        "cannot read 'some/unknown' (subset None, split 'train', revision None) from the "
        "Hugging Face Hub: Dataset 'some/unknown' doesn't exist on the Hub or not accessible. "
        "There is no local file or folder of that name either."
    )


def test_missing_field_on_the_hub(hub):
    assert error_of("some/set", field="body") == (
        "some/set/train:1: has no field 'body'; its fields are: 'text'."
    )


def test_a_connection_lost_while_reading_is_one_sentence(monkeypatch):
    def broken():
        yield {"text": "one"}
        raise ConnectionError("connection lost")

    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: broken())
    documents = read_documents(Source("some/set"))
    assert next(documents).text == "one"
    with pytest.raises(UserError, match="Hugging Face Hub: connection lost"):
        next(documents)


def test_no_network_is_one_sentence():
    # The tests run with HF_HUB_OFFLINE: the real library is asked here.
    assert "cannot read 'no-such-owner/no-such-set'" in error_of("no-such-owner/no-such-set")


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_reader_on_a_real_data_set_in_a_folder(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(jsonl({"text": "one"}, {"text": "zwei"}))
    (folder / "validation.jsonl").write_bytes(jsonl({"text": "held out"}))
    read = [data["text"] for data, _ in read_hub(str(folder), streaming=streaming)]
    assert read == ["one", "zwei"]
    read = [
        data["text"] for data, _ in read_hub(str(folder), streaming=streaming, split="validation")
    ]
    assert read == ["held out"]
    with pytest.raises(UserError, match="split 'nope'"):
        list(read_hub(str(folder), streaming=streaming, split="nope"))


def test_hub_options_on_a_local_path(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert "subset and revision belong to a data set on the Hub" in error_of(
        tmp_path / "a.txt", subset="en"
    )


def test_hub_fingerprint_follows_the_commit(monkeypatch):
    commits = {None: "1" * 40, "v2": "2" * 40}

    class Api:
        def dataset_info(self, path, *, revision, timeout):
            return SimpleNamespace(sha=commits[revision])

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    first = source_fingerprint(Source("some/set"))
    assert source_fingerprint(Source("some/set", revision="v2")) != first
    assert source_fingerprint(Source("some/set", subset="en")) != first
    assert source_fingerprint(Source("some/set", split="test")) != first
    commits[None] = "3" * 40
    second = source_fingerprint(Source("some/set"))
    assert second != first
    # A commit needs no question; and when the Hub does not answer, the settings alone count.
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    pinned = source_fingerprint(Source("some/set", revision="1" * 40))
    assert len({first, second, pinned, source_fingerprint(Source("some/set"))}) == 4
