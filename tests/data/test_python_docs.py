"""The embedded corpus: its size, what is in it, and that it is always the same."""

import os
import subprocess
import sys
import time

import pytest

from lit_llm.data import python_docs
from lit_llm.data.python_docs import collect_documents, collect_functions
from lit_llm.data.sources import Source, documents_sha256, read_documents, source_fingerprint
from lit_llm.errors import UserError


@pytest.fixture(scope="module")
def documents() -> dict[str, str]:
    return {document.origin: document.text for document in collect_documents()}


@pytest.fixture(scope="module")
def functions() -> dict[str, python_docs.FunctionDoc]:
    return {f"{f.module}.{f.qualname}": f for f in collect_functions()}


def test_size(documents):
    size = sum(len(text.encode()) for text in documents.values())
    assert 1_200_000 < size < 4_000_000
    assert 300 < len(documents) < 1_000
    assert all(text.strip() for text in documents.values())


def test_a_module_from_its_source(documents):
    text = documents["python-docs:calendar"]
    assert text.startswith("calendar\nCalendar printing functions\n\nNote when comparing")
    leap = "\n\nisleap(year)\nReturn True for leap years, False for non-leap years.\n\n"
    assert leap in text
    assert "\n\nCalendar.iterweekdays(self)\nReturn an iterator for one week" in text


def test_a_module_from_its_c_code(documents):
    assert "\n\nsqrt(x, /)\nReturn the square root of x.\n\n" in documents["python-docs:math"]
    assert "str.casefold(self, /)\nReturn a version" in documents["python-docs:builtins"]


def test_topics(documents):
    assert documents["python-docs:topic if"].startswith('The "if" statement\n****')


def test_what_is_left_out(documents):
    modules = {origin.partition(":")[2].partition(".")[0] for origin in documents}
    assert not modules & {"antigravity", "this", "idlelib", "test", "lib2to3", "tkinter"}
    assert not any(name.startswith("_") for name in modules)


def test_no_address_and_no_path_of_this_machine(documents):
    for origin, text in documents.items():
        assert " at 0x" not in text, origin
        assert os.path.dirname(os.__file__) not in text, origin


def test_functions(functions):
    leap = functions["calendar.isleap"]
    assert leap.signature == "(year)"
    assert leap.docstring == "Return True for leap years, False for non-leap years."
    assert functions["math.sqrt"].docstring == "Return the square root of x."
    assert "datetime.timedelta.total_seconds" in functions
    assert "datetime.timedelta.days" not in functions  # a property
    assert "builtins.OSError" not in functions  # a class
    assert len(functions) > 3_000
    assert len({(f.signature, f.docstring) for f in functions.values()}) > 2_500


def test_an_object_put_into_builtins_is_no_documentation(monkeypatch):
    import builtins

    before = collect_documents()
    monkeypatch.setattr(builtins, "injected", print, raising=False)
    monkeypatch.setattr("sys.excepthook", print)
    monkeypatch.setattr(builtins, "Injected", type("Injected", (), {"__doc__": "x"}), raising=False)
    python_docs._library.cache_clear()
    assert collect_documents() == before


def test_the_same_in_another_process_without_effects_and_in_time():
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from lit_llm.data.python_docs import collect_documents\n"
        "from lit_llm.data.sources import documents_sha256\n"
        "digest = documents_sha256(collect_documents())\n"
        "effects = {'antigravity', 'this', 'idlelib', 'tkinter', 'lib2to3', 'test', 'asyncio'}\n"
        "print(digest, sorted(effects & set(sys.modules)), time.perf_counter() - start)"
    )
    wanted = documents_sha256(collect_documents())
    for seed in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.getcwd()},
            capture_output=True,
            text=True,
            check=True,
        )
        digest, imported, seconds = result.stdout.split()
        assert digest == wanted
        assert imported == "[]"
        assert float(seconds) < 20  # about 2 s on an idle machine


def test_as_a_source(documents):
    source = Source("python-docs")
    assert [d.text for d in read_documents(source)] == list(documents.values())
    start = time.perf_counter()
    first = source_fingerprint(source)
    assert time.perf_counter() - start < 2  # parsed once a process
    assert source_fingerprint(source) == first
    assert source_fingerprint(Source("python-docs", max_documents=3)) != first


def test_a_python_without_sources(monkeypatch, tmp_path):
    python_docs._library.cache_clear()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="this Python has no library sources in"):
        collect_documents()
