"""Jobs of the ranks: what PPO's frozen models are like under a strategy."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

FROZEN = ("reference", "rewards")


def reward_folder(settings: Path, folder: Path) -> str:
    """A reward model with the tokenizer and the architecture of the policy, by transformers."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings / "model")
    config = AutoConfig.from_pretrained(
        settings / "model", num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    torch.manual_seed(7)
    model = AutoModelForSequenceClassification.from_config(config)
    nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def inspect(args: list[str]) -> dict[str, Any]:
    """Run PPO, and look at its frozen models meanwhile."""
    from lit_llm.cli import RecipeCLI
    from lit_llm.modules.ppo import PPOModule

    modes: set[bool] = set()
    held: dict[str, int] = {}
    views = PPOModule.views

    def watched(module: Any, batch: Any) -> Any:
        modes.update(one.training for name in FROZEN for one in getattr(module, name).modules())
        if not held:  # within the first step: blocks are divided, the root is whole
            held.update({name: local_numel(getattr(module, name)) for name in FROZEN})
        return views(module, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPOModule, "views", watched)
        patch.setattr(RecipeCLI, "report", lambda self, *_: None)
        cli = importlib.import_module("ppo").main(args)
    module = cli.model
    return {
        "modes": modes,
        "held": held,
        "whole": {
            name: sum(
                torch.Size(shape).numel()
                for key, shape in module.whole_shapes.items()
                if key.startswith(f"{name}.") and not key.endswith("lm_head.weight")  # tied
            )
            for name in FROZEN
        },
        "optimised": [name for name in module.optimizer_names if name.startswith(FROZEN)],
        "trained": len(module.optimizer_names),
    }


def local_numel(module: nn.Module) -> int:
    """Numbers of a module that this rank holds in its decoder blocks and elsewhere."""
    count = 0
    for parameter in module.parameters():
        local = getattr(parameter, "ds_tensor", parameter)
        if hasattr(local, "to_local"):
            local = local.to_local()
        count += local.numel()
    return count
