"""Reading: formats, compression, order, cutting, and one clear sentence for every mistake."""

import gzip
import json
import os
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from lit_llm.data.sources import (
    Source,
    as_sources,
    documents_sha256,
    read_documents,
    source_fingerprint,
    source_labels,
)
from lit_llm.errors import UserError


def texts(source: str | Path | Source, **options) -> list[str]:
    source = source if isinstance(source, Source) else Source(str(source), **options)
    return [document.text for document in read_documents(source)]


def error_of(source: str | Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        texts(source, **options)
    return str(caught.value)


def jsonl(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def parquet(path: Path, **columns: list) -> bytes:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path.read_bytes()


PACK = {
    "": lambda data: data,
    ".gz": gzip.compress,
    # Two frames one after the other, as parallel compressors write them.
    ".zst": lambda data: (
        zstandard.compress(data[: len(data) // 2]) + zstandard.compress(data[len(data) // 2 :])
    ),
}


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("kind", [".txt", ".md", ".jsonl", ".parquet"])
def test_every_format_and_compression_reads_the_same(tmp_path, kind, ending):
    wanted = ["Grüße, 世界 🌍"] if kind in (".txt", ".md") else ["Grüße, 世界 🌍", "second\nline"]
    data = {
        ".txt": "Grüße, 世界 🌍\n".encode(),
        ".md": "Grüße, 世界 🌍\n".encode(),
        ".jsonl": jsonl({"text": wanted[0], "id": 1}, {"id": 2, "text": wanted[-1]}),
        ".parquet": parquet(tmp_path / "plain", text=wanted, id=[1, 2][: len(wanted)]),
    }[kind]
    file = tmp_path / f"corpus{kind}{ending}"
    file.write_bytes(PACK[ending](data))
    assert texts(file) == wanted


def test_origin_names_file_and_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n" + jsonl({"text": "one"}) + b"\n\n" + jsonl({"text": "two"}))
    assert [d.origin for d in read_documents(Source(str(file)))] == [f"{file}:2", f"{file}:5"]


def test_folder_is_recursive_sorted_and_skips_what_it_cannot_read(tmp_path):
    for name in ("b/2.txt", "b/10.md", "a.txt", "c.txt.gz", ".hidden.txt", ".git/x.txt", "x.csv"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(gzip.compress(b"c.txt.gz") if name.endswith("gz") else name.encode())
    assert texts(tmp_path) == ["a.txt", "b/10.md", "b/2.txt", "c.txt.gz"]


def test_glob_is_sorted_by_name_whatever_the_order_on_disk(tmp_path):
    for name in ("z.txt", "m.txt", "a.txt", "b.md"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "*.txt") == ["a.txt", "m.txt", "z.txt"]
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "y.txt").write_text("y")
    assert texts(tmp_path / "**" / "y.txt") == ["y"]


def test_a_file_whose_name_has_wildcards_is_a_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("literal")
    assert texts(tmp_path / "a[1].txt") == ["literal"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "notes.txt").write_text("at home")
    assert texts("~/notes.txt") == ["at home"]


def test_line_separators_other_than_line_feed_do_not_split_json(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes('{"text": "a\u2028b\u0085c"}\r\n{"text": "d"}'.encode())
    assert texts(file) == ["a\u2028b\x85c", "d"]


def test_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert texts(file) == ["one\ntwo"]


def test_text_units(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n\none\nstill one\n \t\n\n two\n\n\nthree")
    assert texts(file, documents="file") == ["\n\none\nstill one\n \t\n\n two\n\n\nthree"]
    assert texts(file, documents="auto") == texts(file, documents="file")
    assert texts(file, documents="paragraphs") == ["one\nstill one\n \t", " two", "three"]
    assert texts(file, documents="lines") == ["one", "still one", " two", "three"]


def test_auto_cuts_only_files_above_100_kb(tmp_path):
    paragraph = "x" * 98 + "\n\n"  # 100 bytes
    file = tmp_path / "a.txt"
    file.write_text(paragraph * 1000)
    assert len(texts(file)) == 1
    file.write_text(paragraph * 1001)
    assert len(texts(file)) == 10
    file.with_suffix(".txt.gz").write_bytes(gzip.compress((paragraph * 1001).encode()))
    assert texts(file.with_suffix(".txt.gz")) == texts(file)


def test_auto_cuts_at_blank_lines_near_10_kb_and_loses_nothing(tmp_path):
    file = tmp_path / "a.txt"
    paragraphs = ["y" * (500 + 37 * (i % 11)) for i in range(300)]
    file.write_text("\n\n".join(paragraphs))
    found = texts(file)
    assert "\n\n".join(found) == "\n\n".join(paragraphs)
    assert all(10_000 <= len(text) < 10_000 + 1_000 for text in found[:-1])


def test_auto_cut_does_not_move_when_text_is_added(tmp_path):
    file = tmp_path / "a.txt"
    text = "".join(f"{'z' * (i % 700)}\n\n" for i in range(500))
    file.write_text(text)
    before = texts(file)
    file.write_text(text + "more\n\n" * 5000)
    after = texts(file)
    assert len(before) > 10
    assert after[: len(before) - 1] == before[:-1]
    assert after[len(before) - 1].startswith(before[-1])


def test_auto_cuts_at_a_line_end_where_no_blank_line_comes(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("0123456789\n" * 20_000)
    found = texts(file)
    assert len(found) == 11  # 220 kB in pieces of just over 20 kB
    assert "\n".join(found) + "\n" == file.read_text()


def test_limits(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("ééé\nbbb\nccc\n")
    assert texts(file, documents="lines", max_documents=2) == ["ééé", "bbb"]
    assert texts(file, documents="lines", max_bytes=9) == ["ééé", "bbb"]
    assert texts(file, documents="lines", max_bytes=8) == ["ééé"]
    assert error_of(file, documents="lines", max_bytes=5) == (
        f"{file}:1: the first document has 6 bytes, above max_bytes 5."
    )


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("nope.txt", "nope.txt: no such file or folder."),
        ("./nope", "./nope: no such file or folder."),
        ("a/b/c", "a/b/c: no such file or folder."),
        ("folder/nope", "folder/nope: no such file or folder."),
        ("*.txt", "*.txt: no file matches this pattern."),
        (
            "folder",
            "folder: holds no file of a format that can be read "
            "(.txt, .md, .jsonl, .parquet, each also with .gz or .zst).",
        ),
        (
            "folder/x.csv",
            "folder/x.csv: cannot tell the format of this file; "
            "use .txt, .md, .jsonl, .parquet, each also with .gz or .zst.",
        ),
        ("void/empty.txt", "void/empty.txt: the corpus is empty: there is no text in it."),
        ("void", "void: the corpus is empty: there is no text in it."),
    ],
)
def test_what_is_not_there_is_said_and_never_looked_up_on_the_hub(
    tmp_path, monkeypatch, path, sentence
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_llm.data.sources.read_hub", None)
    for name, content in (("folder/x.csv", "1,2"), ("void/empty.txt", " \n\t\n")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    assert error_of(path) == sentence


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"{'text': 1}", "is not JSON (Expecting property name"),
        (b'{"text": "cut', "is not JSON (Unterminated string"),
        (b'["text"]', 'is JSON but not an object like {"text": ...}.'),
        (b"[" * 100_000, "is not JSON ("),
        (b'{"body": "x", "id": 3}', "has no field 'text'; its fields are: 'body', 'id'."),
        (b"{}", "has no field 'text'; its fields are: none."),
        (b'{"text": null}', "field 'text' is null, not a string."),
        (b'{"text": 5}', "field 'text' is a number, not a string."),
        (b'{"text": true}', "field 'text' is a boolean, not a string."),
        (b'{"text": ["a"]}', "field 'text' is a list, not a string."),
        (b'{"text": {}}', "field 'text' is an object, not a string."),
        (b'{"text": "ab\\ud83d"}', "field 'text' holds half of a surrogate pair at character 2"),
    ],
)
def test_a_bad_line_is_told_with_file_and_line(tmp_path, line, sentence):
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl({"text": "fine"}) + line + b"\n")
    message = error_of(file)
    assert message.startswith(f"{file}:2: {sentence}")
    assert "\n" not in message


@pytest.mark.parametrize("ending", PACK)
def test_undecodable_bytes_are_told_with_line_and_offset(tmp_path, ending):
    file = tmp_path / f"a.txt{ending}"
    file.write_bytes(PACK[ending](b"caf\xc3\xa9\nna\xefve\n"))
    assert error_of(file) == (
        f"{file}:2: byte 0xef at offset 8 is not UTF-8; convert the file to UTF-8."
    )


@pytest.mark.parametrize("keep", [0.5, 0.99])
@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_a_truncated_compressed_file_is_an_error(tmp_path, kind, ending, keep):
    # Text that does not compress to one block, so that much of it could be read before the end.
    lines = [os.urandom(40).hex() for _ in range(5_000)]
    data = {
        ".txt": "\n\n".join(lines).encode(),
        ".jsonl": jsonl(*({"text": line} for line in lines)),
        ".parquet": parquet(tmp_path / "plain", text=lines),
    }[kind]
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}[ending](data)
    file = tmp_path / f"a{kind}{ending}"
    file.write_bytes(packed[: int(len(packed) * keep)])
    assert error_of(file).startswith(f"{file}: the compressed file is cut short or damaged (")


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_file_that_is_not_compressed_as_its_name_says(tmp_path, ending):
    file = tmp_path / f"a.txt{ending}"
    file.write_text("plain text")
    assert error_of(file).startswith(f"{file}: the compressed file is cut short or damaged (")


def test_bad_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    data = parquet(file, text=["a", "b"] * 1000, other=[1, 2] * 1000)
    assert error_of(file, field="body") == (
        f"{file}: has no field 'body'; its fields are: 'text', 'other'."
    )
    assert error_of(file, field="other") == f"{file}:1: field 'other' is a number, not a string."
    file.write_bytes(data[:-20])
    assert error_of(file).startswith(f"{file}: is not a readable parquet file (")
    parquet(file, text=["a", None])
    assert error_of(file) == f"{file}:2: field 'text' is null, not a string."


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    file = tmp_path / "a.txt"
    file.write_text("secret")
    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    assert error_of(file) == f"{file}: cannot be read (Permission denied)."
    with pytest.raises(UserError, match="cannot be read"):
        source_fingerprint(Source(str(file)))


# --- configuration


def test_sources_from_configuration():
    source = Source("b", weight=2.0)
    assert as_sources("a") == [Source("a")]
    assert as_sources(["a", source, {"path": "c", "field": "body"}]) == [
        Source("a"),
        source,
        Source("c", field="body"),
    ]


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        ([], "no source of text is given"),
        ([""], "a source needs a path"),
        ([{"weight": 1}], "is not understood; a path is needed, and the fields are: path, weight"),
        (
            [{"path": "a", "wight": 1}],
            "a source has no field 'wight'; the fields are: path, weight",
        ),
        ('[{"path": "a", "wight": 1}]', "a source has no field 'wight'"),
        ('[{"path": "a"', "is no YAML"),
        ([{"path": "a", "weight": 0}], "source a: weight 0 must be above 0"),
        ([{"path": "a", "weight": float("nan")}], "source a: weight nan must be above 0"),
        ([{"path": "a", "max_bytes": 0}], "source a: max_bytes 0 must be at least 1."),
        ([{"path": "a", "max_documents": -1}], "source a: max_documents -1 must be at least 1."),
    ],
)
def test_bad_configuration(sources, sentence):
    with pytest.raises(UserError) as caught:
        as_sources(sources)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("python-docs", "python-docs"),
        ("texts/poems.jsonl.gz", "poems"),
        ("texts/poems.v2.txt", "poems.v2"),
        ("wikipedia-en/train.jsonl.gz", "wikipedia-en-train"),
        ("train.txt", "train"),
        ("data/books/", "books"),
        ("data/books/*.txt", "books"),
        ("data/**/*.txt", "data"),
        ("*.txt", "files"),
        ("HuggingFaceFW/fineweb-edu", "fineweb-edu"),
    ],
)
def test_label(path, label):
    assert Source(path).label == label
    assert Source(path, name="mine").label == "mine"


def test_labels_of_several_sources_differ():
    paths = ["a/x.txt", "b/x.txt", "x.md"]
    assert source_labels(map(Source, paths)) == ["x", "x-2", "x-3"]
    assert source_labels([Source("x.txt"), Source("y.txt", name="x")]) == ["x-2", "x"]
    with pytest.raises(UserError, match="two sources are named 'n'"):
        source_labels([Source("a", name="n"), Source("b", name="n")])


# --- fingerprint


def test_fingerprint_follows_what_determines_the_documents(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "a.txt").write_text("alpha")
    (folder / "b.txt").write_text("beta")
    source = Source(str(folder))
    first = source_fingerprint(source)
    assert len(first) == 64
    assert source_fingerprint(Source(str(folder), weight=3.0, name="other")) == first

    moved = folder.rename(tmp_path / "two")
    assert source_fingerprint(Source(str(moved))) == first
    assert source_fingerprint(Source(str(moved / "*.txt"))) == first
    os.utime(moved / "a.txt", (time.time() - 999, time.time() - 999))
    assert source_fingerprint(Source(str(moved))) == first

    others = [
        source_fingerprint(Source(str(moved), **options))
        for options in ({"documents": "lines"}, {"field": "body"}, {"max_documents": 1})
    ]
    (moved / "b.txt").write_text("Beta")
    others.append(source_fingerprint(Source(str(moved))))
    (moved / "b.txt").write_text("beta")
    (moved / "b.txt").rename(moved / "c.txt")
    others.append(source_fingerprint(Source(str(moved))))
    assert len({first, *others}) == 6


def test_fingerprint_knows_where_one_text_ends():
    from lit_llm.data.sources import Document

    first = [Document("ab", ""), Document("c", "")]
    second = [Document("a", ""), Document("bc", "")]
    assert documents_sha256(first) != documents_sha256(second)


# --- the Hub


@pytest.mark.skipif("LIT_LLM_DATA" not in os.environ, reason="LIT_LLM_DATA names no data folder")
def test_real_corpora():
    root = Path(os.environ["LIT_LLM_DATA"]) / "pretrain"
    assert len(texts(root / "wikipedia-en" / "train.jsonl.gz")) == 771
    assert len(texts(root / "wikipedia-es" / "*.jsonl.gz")) == 769 + 62 + 44
    book = texts(root / "gutenberg-en" / "alice.txt.gz")
    assert 10 <= len(book) <= 16
    assert sum(len(text.encode()) for text in book) > 149_000
    plays = texts(root / "tinyshakespeare" / "input.txt")
    assert 100 <= len(plays) <= 112
