"""The command line's own parts."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from lightning.pytorch import Trainer

from lit_llm import cli as cli_module
from lit_llm.arguments import in_one_sentence, listed_sources
from lit_llm.callbacks.guards import Guards
from lit_llm.callbacks.progress import Progress
from lit_llm.cli import RecipeCLI
from lit_llm.data.chat_tokenizer import load_chat_tokenizer
from lit_llm.errors import UserError
from lit_llm.models import (
    AdapterConfig,
    BaseModelConfig,
    RewardStatistics,
    add_adapter,
    build_reward_model,
    export_model,
    vocabulary_of,
)
from lit_llm.modules.dpo import DPOModule
from lit_llm.modules.reward import RewardModule
from lit_llm.modules.sft import SFTModule
from lit_llm.strategies.registry import build_strategy


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


def test_other_sources_do_without_the_second_test_of_the_recipe(tmp_path):
    none = "--data.ood_sources=null"
    sources, both = tmp_path / "sources.yaml", tmp_path / "both.yaml"
    sources.write_text("data: {sources: [a]}")
    both.write_text("data: {sources: [a], ood_sources: [b]}")
    for args in (["--data.sources", "a"], ["--data.sources=a"], [f"--config={sources}"]):
        assert listed_sources(args, has_ood=True) == [none, *listed_sources(args)]
        assert none not in listed_sources(args)
        for own in ("--data.ood_sources=b", "--data.ood_sources+=b", f"--config={both}"):
            assert none not in listed_sources([*args, own], has_ood=True)
    for args in (["--data.val_sources=a"], ["--data.sources+=a"], [f"--config={both}"], []):
        assert none not in listed_sources(args, has_ood=True)


@pytest.mark.parametrize("name", ["auto", "ddp", "ddp_spawn"])
def test_known_strategies_pass(name):
    build_strategy(name)


def test_an_unknown_strategy_is_told_the_nearest():
    with pytest.raises(UserError, match="'dpd'.*ddp"):
        build_strategy("dpd")


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


def bare_cli(folder, **attributes):
    """A command line that has parsed nothing and built nothing."""
    cli = RecipeCLI.__new__(RecipeCLI)
    cli.config = {"output_dir": str(folder), "export_dir": None}
    cli.results, cli.ckpt_path, cli.subcommand = {}, None, None
    for name, value in attributes.items():
        setattr(cli, name, value)
    return cli


def test_without_a_test_split_it_is_told_that_nothing_was_measured(tmp_path):
    trainer = SimpleNamespace(test=lambda *args, **options: [], is_global_zero=True)
    cli = bare_cli(tmp_path, trainer=trainer, model=None, datamodule=None)
    with pytest.warns(UserWarning, match="no test split.*raise data.test_fraction"):
        cli.test("before")
    assert not cli.results


@pytest.mark.parametrize("bar", [None, True, False])
def test_without_a_progress_bar_there_is_none(tmp_path, bar):
    config = {"enable_progress_bar": bar, "logger": False, "accelerator": "cpu", "callbacks": None}
    cli = bare_cli(
        tmp_path,
        config_init={"trainer": config | {"enable_checkpointing": False}},
        trainer_defaults={"callbacks": [Progress(), Guards()]},
        trainer_class=Trainer,
        save_config_callback=None,
        parser=SimpleNamespace(callback_keys=[]),
    )
    kinds = [type(callback) for callback in cli.instantiate_trainer().callbacks]
    assert (Progress in kinds) == (bar is not False)
    assert Guards in kinds


def reward_model(tokenizer, heads):
    config = BaseModelConfig(preset="llama-1m")
    return build_reward_model(config, heads=heads, **vocabulary_of(tokenizer))


@pytest.fixture
def tokenizer(tmp_path):
    from lit_llm.data.tokenizer import train_tokenizer

    train_tokenizer(["a few words of a text"], vocab_size=300).save_pretrained(tmp_path / "own")
    return load_chat_tokenizer(str(tmp_path / "own"))


def test_an_adapter_is_saved_with_statistics_and_tokenizer(tokenizer, tmp_path):
    model = add_adapter(reward_model(tokenizer, 2), AdapterConfig(r=2))
    module = SimpleNamespace(
        whole=lambda exact: nullcontext(model),
        statistics=RewardStatistics([0.5, 1.0], [2.0, 3.0], "min"),
    )
    strategy = SimpleNamespace(broadcast=lambda what: what)
    trainer = SimpleNamespace(is_global_zero=True, strategy=strategy)
    data = SimpleNamespace(tokenizer=tokenizer)
    bare_cli(tmp_path, trainer=trainer, model=module, datamodule=data).export()
    kept = json.loads((tmp_path / "adapter" / "reward_statistics.json").read_text())
    assert kept["reward_std"] == [2.0, 3.0]
    again = load_chat_tokenizer(str(tmp_path / "adapter"))
    assert again.pad_token == tokenizer.pad_token is not None


def test_a_base_of_the_wrong_kind_is_refused_before_there_is_data(tokenizer, tmp_path, monkeypatch):
    folder = export_model(reward_model(tokenizer, 2), tokenizer, tmp_path / "reward")

    class Later(Exception):
        """What comes after the check of the base."""

    def later(path):
        raise Later

    monkeypatch.setattr(cli_module, "check_writable", later)
    for module_class, heads, error, sentence in (
        (SFTModule, None, UserError, "scores texts; give a causal language model"),
        (DPOModule, None, UserError, "scores texts; give a causal language model"),
        (RewardModule, 1, UserError, "gives 2 scores, not 1; set heads to 2"),
        (RewardModule, 2, Later, None),
    ):
        cli = bare_cli(tmp_path, _module_class=module_class)
        cli.config |= {
            "trainer": {},
            "data": {"seq_len": 16},
            "model": {"base": {"pretrained": str(folder)}, "heads": heads},
        }
        with pytest.raises(error, match=sentence):
            cli.before_instantiate_classes()
