"""Perplexity of long texts against plain forwards, token by token."""

import gzip
import json
import math
import os
from pathlib import Path

import pytest
import torch

from lit_llm.data.files import Document
from lit_llm.data.splits import assign_split
from lit_llm.errors import UserError
from lit_llm.evaluation.perplexity import (
    Part,
    TextScore,
    named_path,
    perplexity,
    perplexity_measurements,
    read_texts,
)
from tests.evaluation.tiny_models import TEXTS, log_probs, model, tokenizer

LONG = " ".join(TEXTS * 3)


def ids_of(own, text):
    first = own.eos_token_id if own.bos_token_id is None else own.bos_token_id
    return [first, *own(text, add_special_tokens=False)["input_ids"]]


def by_hand(network, ids, window, stride):
    """Negative log-likelihood of each token but the first, from a plain forward of its window.

    Tokens 1 to ``window`` see all before them; of the others, groups of ``stride`` see what the
    window that ends with their group holds.
    """
    steps, forwards = [], {}
    for place in range(1, len(ids)):
        end = len(ids) - 1 if len(ids) - 1 < window else window
        if place > window:
            group = math.ceil((place - window) / stride)
            end = min(len(ids) - 1, window + group * stride)
        begin = max(0, end - window)
        assert place <= window or place - begin > window - stride
        if end not in forwards:
            forwards[end] = log_probs(network, ids[begin:end])
        steps.append(-float(forwards[end][place - 1 - begin, ids[place]]))
    return steps


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 16), (16, 1), (15, 4), (None, None)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_token_scores_once_as_in_a_plain_loop(kind, window, stride):
    own, network = tokenizer(), model(kind)
    texts = [LONG[:260], "fox", LONG[:90]]
    found = perplexity(network, own, texts, window=window, stride=stride)
    for text, score in zip(texts, found, strict=True):
        ids = ids_of(own, text)
        steps = by_hand(network, ids, window or 64, stride or 32)
        assert score.whole.nll == pytest.approx(sum(steps), rel=1e-6)
        assert score.whole.tokens == len(ids) - 1
        done = 0
        for part in score.parts:
            assert part.nll == pytest.approx(sum(steps[done : done + part.tokens]), rel=1e-5)
            done += part.tokens
        assert len(score.parts) == 1 + max(
            0, math.ceil((len(ids) - 1 - (window or 64)) / (stride or 32))
        )


@pytest.mark.parametrize("kind", ["plain", "bos", "eos"])
def test_a_text_that_fits_is_one_forward(kind):
    own, network = tokenizer(kind), model()
    (found,) = perplexity(network, own, [TEXTS[0]])
    ids = torch.tensor([ids_of(own, TEXTS[0])])
    with torch.no_grad():
        loss = float(network(input_ids=ids, labels=ids).loss)
    assert found.whole.nll / found.whole.tokens == pytest.approx(loss, rel=1e-5)
    assert found.whole.tokens == ids.shape[1] - 1
    assert found.whole.bytes == len(TEXTS[0].encode())


def test_batches_change_nothing_and_no_trace_is_left():
    own, network = tokenizer(), model("gpt2")
    together = perplexity(network, own, [LONG, *TEXTS], window=20, stride=5)
    before = torch.get_rng_state()
    network.train()
    try:
        alone = perplexity(network, own, [LONG, *TEXTS], window=20, stride=5, batch_tokens=1)
        assert network.training and torch.equal(torch.get_rng_state(), before)
    finally:
        network.eval()
    for one, other in zip(together, alone, strict=True):
        assert one.whole.nll == pytest.approx(other.whole.nll, rel=1e-6)


def test_the_bytes_of_the_windows_are_those_of_their_tokens():
    own, network = tokenizer(), model()
    text = TEXTS[2] * 3  # tokens that are parts of characters, too
    (found,) = perplexity(network, own, [text], window=7, stride=3)
    data, ids = text.encode(), own(text)["input_ids"]
    assert any(own.decode([i]) == "\ufffd" for i in ids)
    done = tokens = 0
    for part in found.parts:
        tokens += part.tokens
        done += part.bytes
        # What is decoded from whole tokens is the text up to there, but for a character in parts.
        assert data[:done].startswith(own.decode(ids[:tokens]).rstrip("\ufffd").encode())
        assert len(own.decode(ids[:tokens]).rstrip("\ufffd").encode()) > done - 4
    assert done == len(data) and tokens == len(ids)


def test_names_of_special_tokens_in_a_text_are_text():
    own, network = tokenizer(), model()
    text = "A question <|endoftext|> An answer"
    (found,) = perplexity(network, own, [text])
    pieces = own.backend_tokenizer.model  # never a special token
    assert pieces.token_to_id("<|endoftext|>") == own.eos_token_id
    assert found.whole.tokens > len(own(text)["input_ids"])
    assert found.whole.bytes == len(text)


def test_a_tokenizer_of_unknown_kind_shares_the_bytes_out():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<e>": 0, "a": 1, "bcd": 2, "<u>": 3}, unk_token="<u>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    own = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>", unk_token="<u>")
    (found,) = perplexity(model(), own, ["a bcd a bcd zz"], window=2, stride=2)
    assert [part.tokens for part in found.parts] == [2, 2, 1]
    assert [part.bytes for part in found.parts] == [6, 5, 3]  # 14 bytes, 2.8 a token


@pytest.mark.skipif("LIT_LLM_MODELS" not in os.environ, reason="LIT_LLM_MODELS is not set")
def test_a_trained_sentencepiece_model_against_a_plain_loop():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(os.environ["LIT_LLM_MODELS"]) / "stories260k"
    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    own = AutoTokenizer.from_pretrained(folder)
    text = "Once upon a time, there was a little girl named Lily. She loved to play. " * 4
    (found,) = perplexity(network, own, [text], window=32, stride=8)
    steps = by_hand(network, ids_of(own, text), 32, 8)
    assert found.whole.nll == pytest.approx(sum(steps), rel=1e-5)
    assert sum(part.bytes for part in found.parts) == len(text)


# ----- what is measured -------------------------------------------------------------------------


def scores(count, windows=2):
    return [
        TextScore(f"t{n}", [Part(1.0 + n + w, 2 + w, 5 + n) for w in range(windows)])
        for n in range(count)
    ]


def test_both_numbers_are_weighted_by_tokens_and_bytes():
    plain, bits = perplexity_measurements("wiki", scores(3))
    # nll 1+2, 2+3, 3+4; tokens 2+3 each; bytes 2 * (5, 6, 7)
    assert plain.value == pytest.approx(math.exp(15 / 15))
    assert bits.value == pytest.approx(15 / math.log(2) / 36)
    assert (plain.metric, plain.scale, plain.better) == ("perplexity", "exp", "lower")
    assert (bits.metric, bits.scale, bits.better) == ("bits_per_byte", "mean", "lower")
    assert plain.task == bits.task == "wiki"
    assert plain.low < plain.value < plain.high and bits.low < bits.value < bits.high


def test_items_are_windows_of_few_documents_and_documents_of_many():
    assert [one.count for one in perplexity_measurements("a", scores(19))] == [38, 38]
    many, _ = perplexity_measurements("a", scores(20))
    assert many.items.keys == [f"t{n}" for n in range(20)]
    assert many.items.numerators[3] == 9 and many.items.denominators[3] == 5
    # One text twice is two items.
    again, _ = perplexity_measurements("a", scores(20) + scores(20))
    assert again.count == 40


def test_windows_are_named_alike_only_where_the_texts_were_cut_alike():
    own, texts = tokenizer(), [LONG, TEXTS[0]]

    def keys(network, **cut):
        plain, _ = perplexity_measurements("a", perplexity(network, own, texts, **cut))
        return plain.items.keys

    first = keys(model(), window=16, stride=8)
    assert len(set(first)) == len(first) > 10
    assert keys(model("gpt2"), window=16, stride=8) == first
    assert not set(keys(model(), window=16, stride=7)) & set(first[:-1])


def test_nothing_to_measure_is_told():
    with pytest.raises(UserError, match="wiki: there is no text to measure"):
        perplexity_measurements("wiki", [])


# ----- texts ------------------------------------------------------------------------------------


def test_files_are_read_as_whole_documents(tmp_path):
    text = "\n\n".join(f"Paragraph {n} of a long text." * 200 for n in range(40))
    (tmp_path / "long.txt").write_text(text)
    assert len(text) > 200_000
    assert read_texts(str(tmp_path / "long.txt")) == ("long", [text])
    assert read_texts(f"wiki-2={tmp_path}/long.txt") == ("wiki-2", [text])
    with gzip.open(tmp_path / "a=b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": own}) + "\n" for own in TEXTS)
    assert read_texts(f"{tmp_path}/a=b.jsonl.gz") == ("a=b", TEXTS)
    assert named_path("x=python-docs") == ("x", "python-docs")
    assert named_path("python-docs") == ("python-docs", "python-docs")


def test_the_first_documents_are_taken_up_to_the_limit(tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": own}) + "\n" for own in TEXTS))
    spec = str(tmp_path / "t.jsonl")

    def read(**limits):
        return read_texts(spec, **limits).documents

    assert read(max_documents=2) == TEXTS[:2]
    assert read(max_documents=9) == TEXTS


def test_of_the_embedded_documentation_only_what_training_has_not_seen(monkeypatch):
    documents = [Document(f"Module {n}.\n\nWhat it does.", f"m{n}") for n in range(200)]
    monkeypatch.setattr("lit_llm.data.python_docs.collect_documents", lambda: iter(documents))
    name, texts = read_texts("python-docs")
    held_out = [own.text for own in documents if assign_split(own.text) == "test"]
    assert name == "python-docs" and texts == held_out and 2 < len(texts) < 40
    assert read_texts("docs=python-docs", max_documents=2) == ("docs", held_out[:2])


# ----- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"window": 65}, "window 65 exceeds the 64 positions"),
        ({"window": 1}, "window of 1 tokens is too short"),
        ({"window": 8, "stride": 9}, "stride 9 must lie between 1 and the window, 8"),
        ({"stride": 0}, "stride 0 must lie"),
    ],
)
def test_windows_that_do_not_fit_are_refused(limits, message):
    with pytest.raises(UserError, match=message):
        perplexity(model(), tokenizer(), TEXTS, **limits)


def test_texts_that_cannot_be_measured_are_refused(tmp_path):
    with pytest.raises(UserError, match="text 1 is empty"):
        perplexity(model(), tokenizer(), ["a", ""])
    own = tokenizer("eos")
    own.eos_token = None
    with pytest.raises(UserError, match="neither a BOS nor an EOS"):
        perplexity(model(), own, TEXTS)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"empty\.txt: the corpus is empty"):
        read_texts(str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match="no_such"):
        read_texts(str(tmp_path / "no_such.txt"))
