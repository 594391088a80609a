"""The command line's own parts."""

import pytest

from lit_llm.cli import _check_strategy, _listed_sources
from lit_llm.errors import UserError


def test_a_single_source_is_a_list_that_starts_empty():
    assert _listed_sources(["--data.sources", "my.txt", "--x", "y"]) == [
        "--data.sources=[]",
        '--data.sources=["my.txt"]',
        "--x",
        "y",
    ]
    assert _listed_sources(["--data.val_sources=a/*.gz"])[1] == '--data.val_sources=["a/*.gz"]'
    assert _listed_sources(["--data.sources=[{path: a}]"])[1] == "--data.sources=[{path: a}]"
    assert _listed_sources(["--data.val_sources=null"])[1] == "--data.val_sources=null"
    assert _listed_sources(["--data.sources+=b"]) == ["--data.sources+=b"]


@pytest.mark.parametrize("name", ["auto", "ddp", "fsdp"])
def test_known_strategies_pass(name):
    _check_strategy(name)


def test_an_unknown_strategy_is_told_the_nearest():
    with pytest.raises(UserError, match="'dpd'.*ddp"):
        _check_strategy("dpd")
