"""What cannot work, said before any rank is started: the others would wait for one that is gone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins.environments import LightningEnvironment

from lit_llm.errors import UserError
from lit_llm.strategies.gathering import needs_gathering
from lit_llm.strategies.sharded_checkpoint import load_metadata
from lit_llm.strategies.sharded_files import read_index

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def check_launch(trainer: Trainer, ckpt_path: Path | None = None) -> None:
    """Refuse ranks that would never meet, and what a strategy cannot train with or go on from.

    Args:
        trainer: As it is built, with no rank started by it yet.
        ckpt_path: What the run is to go on from, if anything.

    Raises:
        UserError: For the first that is so.
    """
    environment = trainer._accelerator_connector.cluster_environment
    # Lightning starts the ranks of this node only, and waits for the others for half an hour.
    alone = isinstance(environment, LightningEnvironment) and not (
        {"NODE_RANK", "GROUP_RANK"} & os.environ.keys()
    )
    if trainer.num_nodes > 1 and alone:
        raise UserError(
            f"--trainer.num_nodes {trainer.num_nodes} needs a launcher that starts the recipe on "
            "every node; use recipes/launch/torchrun.sh or recipes/launch/slurm.sbatch, which "
            "give num_nodes themselves"
        )
    check = getattr(trainer.strategy, "check", None)
    if check is not None:
        check(trainer)
    if ckpt_path is not None and ckpt_path.is_dir():
        _check_folder(trainer.strategy, ckpt_path)


def _check_folder(strategy: Any, path: Path) -> None:
    """Refuse a sharded checkpoint that is damaged, or of other strategies or ranks."""
    if not needs_gathering(strategy):
        raise UserError(
            f"{path} is a sharded checkpoint, which this strategy does not read; resume with the "
            "strategy that wrote it, or make a model of it (recipes/export.py) and start from that"
        )
    if hasattr(strategy, "check_folder"):
        strategy.check_folder(path)
        return
    load_metadata(path)
    read_index(path)


def check_half_gather(half_gather: bool, precision: object) -> None:
    """Refuse to gather in half precision what is not computed in it.

    Args:
        half_gather: As the strategies take it.
        precision: As ``trainer.precision``.

    Raises:
        UserError: It would be without effect, or another precision than the one asked for.
    """
    if half_gather and precision != "bf16-mixed":
        raise UserError(
            "half_gather gathers float32 weights in bfloat16, so it needs --trainer.precision "
            f"bf16-mixed, not {precision}; set half_gather to false, or change the precision"
        )
