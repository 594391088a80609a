"""Cleaning: each option by hand-written cases."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_llm.data.cleaning import (
    Cleaning,
    CleaningReport,
    clean_documents,
    normalized_key,
    repetition,
)
from lit_llm.data.files import Document
from lit_llm.errors import UserError


def clean(*texts: str, **options) -> tuple[list[str], CleaningReport]:
    report = CleaningReport()
    documents = [Document(text, f"file:{line}") for line, text in enumerate(texts, start=1)]
    cleaned = list(clean_documents(documents, Cleaning(**options), report))
    return [document.text for document in cleaned], report


def test_unicode_forms():
    texts = ["cafe\u0301", "ﬁne ２", "plain"]
    assert clean(*texts, unicode="none")[0] == texts
    assert clean(*texts)[0] == ["café", "ﬁne ２", "plain"]
    kept, report = clean(*texts, unicode="NFKC")
    assert kept == ["café", "fine 2", "plain"]
    assert report.normalized == 2


def test_control_characters():
    text = "a\tb\r\nc\rd\x00e\x1b[1mf\x7f\x9f\x0cg\n"
    kept, report = clean(text)
    assert kept == ["a\tb\nc\nde[1mfg\n"]
    assert report.control_characters == 6  # CR of CRLF, NUL, ESC, DEL, 9F, FF; lone CR became LF
    assert clean(text, strip_control_characters=False)[0] == [text]


def test_minimum_length_and_empty():
    kept, report = clean("", " \n", "  abc ", "abcd", min_characters=4)
    assert kept == ["abcd"]
    assert report.removed == {"empty": 2, "short": 1}
    assert (report.documents, report.kept, report.bytes, report.kept_bytes) == (4, 1, 12, 4)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        ("one", 0),
        ("yes yes", 0),  # one pair of words, once
        ("all words here differ", 0),
        ("same line\nsame line\n\nother text", 16 / 25),  # "same line" 2 x 8 of 25
        ("a b c\nd e f\na b c\nd e f", 8 / 12),  # "a b c d" twice; of four lines two repeat
        ("x y z x y", 4 / 5),  # the pair "x y" twice: 4 of 5 characters
        ("spam spam spam spam", 1),  # overlapping pairs are capped at everything
        ("aa bb cc dd ee ff gg hh aa bb", 8 / 20),
    ],
)
def test_repetition(text, share):
    assert repetition(text) == pytest.approx(share)


def test_repeated_lines_count_beside_ngrams():
    # One word a line: the lines repeat (3 of 6), pairs of words do not.
    assert repetition("a\nb\na\nc\nb\nc") == pytest.approx(1 - 3 / 6)


def test_repetition_filter():
    dull = "buy now\n" * 10
    prose = "The quick brown fox jumps over the lazy dog near the old river bank today."
    kept, report = clean(prose, dull, max_repetition=0.3)
    assert kept == [prose]
    assert report.removed == {"repetitive": 1}
    assert clean(prose, dull)[0] == [prose, dull]


def test_origin_and_order_stay():
    documents = [Document("b", "f:1"), Document("", "f:2"), Document("a", "f:3")]
    assert list(clean_documents(documents, Cleaning())) == [("b", "f:1"), ("a", "f:3")]


def test_report_is_a_sentence():
    report = clean("abc", "", "x" * 1500)[1]
    assert str(report) == (
        "cleaning kept 2 of 3 documents (1,503 of 1,503 bytes; removed: 1 empty); "
        "0 documents changed by Unicode normalisation, 0 control characters removed"
    )


@pytest.mark.parametrize("options", [{"min_characters": -1}, {"max_repetition": 1.5}])
def test_bad_options(options):
    with pytest.raises(UserError, match=f"cleaning: {next(iter(options))}"):
        Cleaning(**options)


def test_key_by_hand():
    assert normalized_key("  The\tCAT\r\n sat\x00 ") == "the cat sat"
    assert normalized_key("STRASSE ﬁn CAFE\u0301") == "strasse fin café"
    assert normalized_key("Straße") == "strasse"


@given(st.text(), st.sampled_from(["none", "NFC", "NFKC"]), st.booleans())
def test_key_is_the_same_before_and_after_cleaning(text, unicode, strip):
    options = Cleaning(unicode=unicode, strip_control_characters=strip)
    for document in clean_documents([Document(text, "")], options):
        assert normalized_key(document.text) == normalized_key(text)


@given(st.text())
def test_clean_text_is_nfc_without_control_characters(text):
    for document in clean_documents([Document(text, "")], Cleaning()):
        assert unicodedata.is_normalized("NFC", document.text)
        kinds = {unicodedata.category(c) for c in document.text if c not in "\t\n"}
        assert "Cc" not in kinds
