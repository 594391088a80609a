"""The command line's own parts."""

import pytest

from lit_llm.arguments import in_one_sentence, listed_sources
from lit_llm.cli import _check_strategy
from lit_llm.errors import UserError


def test_a_single_source_is_a_list_that_starts_empty():
    assert listed_sources(["--data.sources", "my.txt", "--x", "y"]) == [
        "--data.sources=[]",
        '--data.sources=["my.txt"]',
        "--x",
        "y",
    ]
    assert listed_sources(["--data.val_sources=a/*.gz"])[1] == '--data.val_sources=["a/*.gz"]'
    assert listed_sources(["--data.sources=[{path: a}]"])[1] == "--data.sources=[{path: a}]"
    assert listed_sources(["--data.val_sources=null"])[1] == "--data.val_sources=null"
    assert listed_sources(["--data.sources+=b"]) == ["--data.sources+=b"]


@pytest.mark.parametrize("name", ["auto", "ddp", "fsdp"])
def test_known_strategies_pass(name):
    _check_strategy(name)


def test_an_unknown_strategy_is_told_the_nearest():
    with pytest.raises(UserError, match="'dpd'.*ddp"):
        _check_strategy("dpd")


def test_what_the_parser_says_becomes_one_sentence():
    message = (
        'Parser key "model.adapter":\n  Does not validate against any of the Union subtypes\n'
        "  Subtypes: [<class 'AdapterConfig'>, <class 'NoneType'>]\n  Errors:\n"
        "    - Problem with given class_path 'AdapterConfig':\n"
        "        Option 'rank' is not accepted\n"
        "    - Expected a <class 'NoneType'>\n  Given value type: <class 'NestedArg'>\n"
        "  Given value: NestedArg(key='rank', val='8')"
    )
    assert in_one_sentence(message) == (
        "Parser key \"model.adapter\": Option 'rank' is not accepted (--help lists the settings)"
    )
