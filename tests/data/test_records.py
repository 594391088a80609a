"""Records: every kind of file gives the same ones, renamed, limited, and told where they stand."""

import gzip
import json
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from lit_llm.data import python_questions
from lit_llm.data.conversations import Conversation
from lit_llm.data.records import RecordSource, read_records, record_fingerprint
from lit_llm.data.sources import Source, as_sources, source_labels
from lit_llm.errors import UserError
from tests.data.test_sources import PACK, jsonl, parquet

ROWS = [{"question": "Grüße, 世界?", "answer": 'a, "b"\nc'}, {"question": "", "answer": "d"}]
CSV = 'question,answer\r\n"Grüße, 世界?","a, ""b""\nc"\r\n\r\n,d\r\n'


def records(path, **options) -> list[dict]:
    return [record.data for record in read_records(RecordSource(str(path), **options))]


def error_of(path, **options) -> str:
    with pytest.raises(UserError) as caught:
        records(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet", ".csv"])
def test_every_format_and_compression_reads_the_same(tmp_path, kind, ending):
    data = {
        ".jsonl": jsonl(*ROWS),
        ".json": json.dumps(ROWS, indent=2).encode(),
        ".parquet": parquet(
            tmp_path / "plain", **{name: [row[name] for row in ROWS] for name in ROWS[0]}
        ),
        ".csv": CSV.encode(),
    }[kind]
    file = tmp_path / f"data{kind}{ending}"
    file.write_bytes(PACK[ending](data))
    assert records(file) == ROWS


def test_origins(tmp_path):
    def origins(name: str, data: bytes) -> list[str]:
        (tmp_path / name).write_bytes(data)
        found = read_records(RecordSource(str(tmp_path / name)))
        return [origin.removeprefix(str(tmp_path)) for _, origin in found]

    assert origins("a.jsonl", b"\n" + jsonl(*ROWS)) == ["/a.jsonl:2", "/a.jsonl:3"]
    assert origins("a.json", json.dumps(ROWS, indent=2).encode()) == ["/a.json:1", "/a.json:2"]
    # The first record is on lines 2 and 3, line 4 is empty.
    assert origins("a.csv", CSV.encode()) == ["/a.csv:2", "/a.csv:5"]


def test_one_object_is_one_record_and_a_byte_order_mark_is_no_text(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b"\xef\xbb\xbf" + b'{"text": "one"}')
    assert records(file) == [{"text": "one"}]


def test_a_folder_holds_all_formats_and_no_text_files(tmp_path):
    for name in ("b.json", "a.jsonl", "c/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / "README.md").write_text("# not a record")
    assert records(tmp_path) == [{"text": "a.jsonl"}, {"text": "b.json"}, {"text": "c/d.jsonl"}]
    assert "use .jsonl, .json, .parquet, .csv, each" in error_of(tmp_path / "README.md")


def test_fields_that_arrow_filled_with_null_are_taken_out(tmp_path):
    file = tmp_path / "a.parquet"
    messages = [{"role": "user", "content": "x"}, {"role": "tool", "name": "f", "content": None}]
    table = {"messages": [messages], "system": [None]}
    pyarrow.parquet.write_table(
        pyarrow.table(table | {"system": pyarrow.array([None], "string")}), file
    )
    # A column that is null as a whole stays: the table has it.
    assert records(file) == [
        {
            "messages": [{"role": "user", "content": "x"}, {"role": "tool", "name": "f"}],
            "system": None,
        }
    ]


def test_a_long_csv_field(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("text\n" + "x" * 300_000 + "\n")
    assert len(records(file)[0]["text"]) == 300_000


def test_limit_and_rename(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl({"a": 1, "b": 2}, {"a": 3}, {"c": 4}))
    assert records(file, max_records=2, rename={"a": "b", "b": "a"}) == [{"b": 1, "a": 2}, {"b": 3}]
    assert records(file, rename={"c": "d"})[-1] == {"d": 4}
    assert error_of(file, rename={"x": "d"}) == (
        f"{file}: rename knows a field 'x' that is in no record; "
        "the fields of the last one are: 'c'."
    )
    assert error_of(file, rename={"a": "b"}).startswith(
        f"{file}:1: rename would give two fields the name 'b'"
    )


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"a": 1}\n[1]\n', ":2: is JSON but not an object like"),
        ("a.jsonl", b'{"a": 1}\n{"a":\n', ":2: is not JSON (Expecting value"),
        ("a.json", b'[{"a": 1},\n {"a": }]', ":2: is not JSON (Expecting value)"),
        ("a.json", b'{"a": 1}\n{"a": 2}', ":2: is not JSON (Extra data)"),
        ("a.json", b"[" * 100_000, ": is not JSON ("),
        ("a.json", b'[{"a": 1}, "b"]', ":2: is JSON but not an object like"),
        ("a.json", b'{"a": "na\xefve"}', ":1: byte 0xef at offset 9 is not UTF-8"),
        ("a.json", b"[]", ": there is no record in it."),
        ("a.json", b" \n", ": there is no record in it."),
        ("a.csv", b"a,b\n", ": there is no record in it."),
        ("a.csv", b"a,b\n1,2\n3\n", ":3: has 1 values for the 2 columns of the first line"),
        ("a.csv", b"a,a\n1,2\n", ":1: the first line of a .csv file names its columns"),
        ("a.csv", b'a,b\n1,2\n"3,4\n5,6\n', ":3: is not readable as .csv (unexpected end of data)"),
        ("a.parquet", b"PAR1", ": is not a readable parquet file ("),
        # Without the time of day in it: the bytes are in the name of the test.
        (
            "a.csv.gz",
            gzip.compress(b"a,b\n1,2\n" * 999, mtime=0)[:-9],
            ": the compressed file is cut short",
        ),
        ("a.json.gz", b"[]", ": the compressed file is cut short or damaged ("),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(tmp_path, name, content, sentence):
    file = tmp_path / name
    file.write_bytes(content)
    assert error_of(file).startswith(f"{file}{sentence}")


def test_hub_records(monkeypatch):
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return [{"q": "one", "meta": {"a": None, "b": 1}}, {"q": "two", "meta": None}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = RecordSource("some/set", split="test", revision="v1", rename={"q": "question"})
    assert list(read_records(source)) == [
        ({"question": "one", "meta": {"b": 1}}, "some/set/test:1"),
        ({"question": "two", "meta": None}, "some/set/test:2"),
    ]
    wanted = {"name": None, "split": "test", "revision": "v1", "streaming": True}
    assert asked == [("some/set", wanted)]


def test_python_docs(monkeypatch):
    told = [
        Conversation(
            [{"role": "user", "content": "?"}], f"python-docs:{name}", name, None, "yes|no"
        )
        for name in "ab"
    ]
    monkeypatch.setattr(python_questions, "collect_conversations", lambda: told)
    source = RecordSource("python-docs")
    data, origin = next(read_records(source))
    assert data == {
        "messages": [{"role": "user", "content": "?"}],
        "group": "a",
        "tools": None,
        "answer_format": "yes|no",
        "template_options": None,
    }
    assert origin == "python-docs:a"
    assert len(records("python-docs", max_records=1)) == 1
    before = record_fingerprint(source)
    assert record_fingerprint(RecordSource("python-docs", name="x")) == before
    told[0].messages[0]["content"] = "!"
    assert record_fingerprint(source) != before
    # What else is made of it decides in the place of its records.
    made = [record_fingerprint(source, content) for content in ([{"a": 1}], [{"a": 2}], [])]
    assert len({*made, before, record_fingerprint(source)}) == 5


# --- configuration


def test_sources_from_configuration():
    source = RecordSource("b", max_records=3)
    given = ["a", source, {"path": "c", "rename": {"x": "text"}}]
    assert as_sources(given, RecordSource) == [
        RecordSource("a"),
        source,
        RecordSource("c", rename={"x": "text"}),
    ]


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        ([], "no source of records is given"),
        ([{"path": "a", "field": "x"}], "the fields are: path, weight, name, subset"),
        ([Source("a")], "is not understood"),
        ([{"path": "a", "weight": -1}], "source a: weight -1 must be above 0"),
        ([{"path": "a", "max_records": 0}], "source a: max_records 0 must be at least 1."),
        ([{"path": "a", "format": "chatml"}], "source a: format 'chatml' is unknown; use auto, me"),
        ([{"path": "a", "rename": {"x": "z", "y": "z"}}], "source a: rename names two fields 'z'."),
        ([{"path": "python-docs", "format": "text"}], "source python-docs has one format"),
        ([{"path": "python-parameters", "rename": {"x": "z"}}], "source python-parameters has one"),
    ],
)
def test_bad_configuration(sources, sentence):
    with pytest.raises(UserError) as caught:
        as_sources(sources, RecordSource)
    assert sentence in str(caught.value)


def test_labels():
    paths = ["chats.json.gz", "b/chats.csv", "b/train.json", "chats.txt"]
    assert source_labels(map(RecordSource, paths)) == ["chats", "chats-2", "b-train", "chats.txt"]


def test_fingerprint_follows_what_determines_the_records(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl({"a": "b"}))
    first = record_fingerprint(RecordSource(str(file)))
    assert record_fingerprint(RecordSource(str(file), name="n", weight=2)) == first
    moved = tmp_path / "deeper"
    moved.mkdir()
    file = file.rename(moved / "a.jsonl")
    assert record_fingerprint(RecordSource(str(file))) == first
    others = [
        record_fingerprint(RecordSource(str(file), **options))
        for options in ({"format": "text"}, {"rename": {"a": "text"}}, {"max_records": 1})
    ]
    file.write_bytes(jsonl({"a": "c"}))
    others.append(record_fingerprint(RecordSource(str(file))))
    assert len({first, *others}) == 5

    commits = {None: "1" * 40, "v2": "2" * 40}
    api = SimpleNamespace(
        dataset_info=lambda path, revision, timeout: SimpleNamespace(sha=commits[revision])
    )
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    on_hub = [
        record_fingerprint(RecordSource("some/set", **options))
        for options in ({}, {"revision": "v2"}, {"split": "test"}, {"rename": {"a": "b"}})
    ]
    assert len(set(on_hub)) == 4
