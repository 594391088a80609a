"""The card of a corpus, and the one that is committed."""

import importlib.util
import platform
import re
from collections import Counter
from pathlib import Path

import pytest

from lit_llm.data.card import CorpusCard, SplitCount, write_card
from lit_llm.data.cleaning import CleaningReport
from lit_llm.data.deduplication import DeduplicationReport, Duplicate

FOLDER = Path(__file__).parents[2] / "data" / "python-docs"


def test_card_by_hand(tmp_path):
    card = CorpusCard(
        name="poems",
        description="Some poems.\n",
        sources=["poems.txt"],
        documents=3,
        bytes=12_345,
        tokens=4_000,
        tokenizer="runs/tokenizer",
        sha256="abc",
        splits={"train": SplitCount(2, 12_000, 3_900), "validation": SplitCount(1, 345)},
        cleaning=CleaningReport(5, 4, 13_000, 12_900, removed=Counter(short=1)),
        deduplication=DeduplicationReport(
            4, 3, exact=1, removed_bytes=555, examples=[Duplicate("exact", "f:3", "f:1", "a | b")]
        ),
    )
    path = write_card(tmp_path / "new" / "card.md", card)
    python = f"{platform.python_implementation()} {platform.python_version()}"
    assert (
        path.read_text(encoding="utf-8")
        == f"""# poems

Some poems.

|  |  |
| --- | --- |
| sources | `poems.txt` |
| documents | 3 |
| bytes (UTF-8) | 12,345 |
| tokens | 4,000 |
| tokenizer | `runs/tokenizer` |
| sha256 | `abc` |
| Python | {python} |

## Splits

| split | documents | bytes | tokens |
| --- | --- | --- | --- |
| train | 2 | 12,000 | 3,900 |
| validation | 1 | 345 |  |

## Cleaning

Cleaning kept 4 of 5 documents (12,900 of 13,000 bytes; removed: 1 short); \
0 documents changed by Unicode normalisation, 0 control characters removed.

## Deduplication

Deduplication kept 3 of 4 documents (removed 555 bytes: 1 equal, 0 similar documents).

| kind | removed | repeats | begins |
| --- | --- | --- | --- |
| exact | f:3 | f:1 | a \\| b |
"""
    )
    assert list(path.parent.iterdir()) == [path]


def test_short_card(tmp_path):
    card = CorpusCard(name="x", documents=1, bytes=2, sha256="s")
    text = write_card(tmp_path / "card.md", card).read_text()
    assert "tokens" not in text
    assert "##" not in text


def test_split_count():
    count = SplitCount()
    for text in ("é", "abc"):
        count.add(text)
    assert count == SplitCount(documents=2, bytes=5)


def test_committed_card_is_what_the_script_writes(tmp_path, capsys):
    committed = (FOLDER / "card.md").read_text(encoding="utf-8")
    spec = importlib.util.spec_from_file_location("prepare", FOLDER / "prepare.py")
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    prepare.main(["--path", str(tmp_path / "card.md")])
    assert "wrote" in capsys.readouterr().out
    written = (tmp_path / "card.md").read_text(encoding="utf-8")

    def fact(card: str, name: str) -> str:
        return re.search(rf"^\| {re.escape(name)} \| (.*) \|$", card, re.MULTILINE).group(1)

    def size(card: str) -> int:
        return int(fact(card, "bytes (UTF-8)").replace(",", ""))

    assert re.fullmatch(r"`[0-9a-f]{64}`", fact(committed, "sha256"))
    # Another build of the same version documents some other parts of its system (module os).
    if fact(committed, "Python") == fact(written, "Python"):
        assert size(written) == pytest.approx(size(committed), rel=0.02)
    headings = [line for line in written.splitlines() if line.startswith("#")]
    assert headings == [line for line in committed.splitlines() if line.startswith("#")]
