"""A mistake is one line and exit code 1; a defect keeps its traceback."""

import pytest

from lit_llm.console import recipe
from lit_llm.errors import UserError


@recipe
def fails(error, cause=None):
    if cause is None:
        raise error
    raise error from cause


def test_a_mistake_is_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        fails(UserError("the file is missing"))
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: the file is missing\n"


def test_a_wrapped_mistake_too(capsys):
    with pytest.raises(SystemExit):
        fails(ValueError("parser: could not build"), UserError("weight must be positive"))
    assert capsys.readouterr().err == "error: weight must be positive\n"


def test_a_defect_is_not_hidden():
    with pytest.raises(KeyError):
        fails(KeyError("x"))


def test_a_traceback_if_asked_for(monkeypatch):
    monkeypatch.setenv("LIT_LLM_TRACEBACK", "1")
    with pytest.raises(UserError):
        fails(UserError("missing"))
