"""Strategies by name, and which one ``auto`` is."""

from pathlib import Path

import pytest
import torch
import yaml

from lit_llm.errors import UserError
from lit_llm.models import BaseModelConfig
from lit_llm.models.build import build_model, count_parameters
from lit_llm.strategies import registry
from lit_llm.strategies.gathering import needs_gathering
from lit_llm.strategies.registry import (
    STRATEGIES,
    build_strategy,
    found_devices,
    simplest_strategy,
)

FILES = sorted((Path(__file__).parents[2] / "recipes" / "strategies").glob("*.yaml"))


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_name_has_a_strategy_and_a_file(name):
    if name.startswith("deepspeed"):
        pytest.importorskip("deepspeed", reason="needs deepspeed: pip install 'deepspeed>=0.19.8'")
    built = build_strategy(name)
    written = yaml.safe_load((FILES[0].parent / f"{name}.yaml").read_text())["trainer"]["strategy"]
    if isinstance(written, str):
        assert built == written
        return
    assert written["class_path"] == f"lit_llm.strategies.{type(built).__name__}"
    again = type(built)(**written["init_args"])
    for setting in written["init_args"]:
        if hasattr(built, setting):
            assert getattr(built, setting) == getattr(again, setting), setting
    assert needs_gathering(built)


def test_there_is_no_file_without_a_name():
    assert {file.stem for file in FILES} == set(STRATEGIES)


@pytest.mark.parametrize(
    ("name", "near"),
    [("fsdp3", "fsdp"), ("deepspeed_stage_2", "deepspeed_zero"), ("dpd", "ddp"), ("xyz", "auto")],
)
def test_an_unknown_name_is_told_the_nearest(name, near):
    with pytest.raises(UserError, match=f"'{name}'.*did you mean.*{near}"):
        build_strategy(name)


def test_lightning_s_own_sharding_is_not_taken_by_mistake():
    with pytest.raises(UserError, match="fsdp_cpu_offload"):
        build_strategy("fsdp_cpu_offload")


def test_without_deepspeed_one_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'deepspeed>=0.19.8'") as told:
        build_strategy("deepspeed_zero2")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("devices", "parameters", "expected"),
    [
        (1, 10**12, "auto"),  # nothing to share it with
        (8, 3_500_000_000, "ddp"),  # 56 GB of 80
        (8, 3_600_000_000, "fsdp2"),
    ],
)
def test_auto_is_the_simplest_that_fits(devices, parameters, expected):
    assert simplest_strategy(devices, parameters, 80 * 10**9) == expected


@pytest.mark.parametrize(
    ("devices", "count"),
    [("auto", 4), (-1, 4), ("-1", 4), (2, 2), ("3", 3), ([0, 2], 2), ("0,1", 2)],
)
def test_devices_are_counted_as_lightning_does(monkeypatch, devices, count):
    class Properties:
        total_memory = 80

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert found_devices("auto", devices, 3) == (3 * count, 80)
    assert found_devices("cpu", 2, 1) == (2, None)


def test_parameters_are_counted_without_a_model():
    config = BaseModelConfig(preset="llama-5m")
    assert count_parameters(config) == sum(p.numel() for p in build_model(config).parameters())
