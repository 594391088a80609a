"""Where metrics go: Weights & Biases, a CSV beside it, TensorBoard if asked."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from lit_llm.errors import UserError


@dataclass(frozen=True)
class LoggingConfig:
    """Which loggers a run writes to. A CSV in the output folder is always written.

    Args:
        wandb: ``auto`` sends to Weights & Biases if this machine is logged in and otherwise keeps
            an offline run that ``wandb sync`` can send later; ``online``, ``offline`` and ``off``
            decide it.
        project: Weights & Biases project.
        name: Name of the run in Weights & Biases.
        tensorboard: Also write TensorBoard files.
    """

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    project: str = "lit-llm"
    name: str | None = None
    tensorboard: bool = False


def wandb_logged_in() -> bool:
    """Whether this machine holds an API key, found without importing wandb or the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        # Python's netrc refuses a file that others may read; wandb does not.
        return re.search(r"machine\s+\S*wandb", path.read_text(encoding="utf-8")) is not None
    except OSError:
        return False


def finish_loggers(loggers: list[Logger]) -> None:
    """End what the loggers have open; the next stage in this process would write into it.

    Args:
        loggers: The loggers of a run that is over.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            wandb.finish()


def build_loggers(
    config: LoggingConfig, output_dir: Path, wandb_id: str | None = None
) -> list[Logger]:
    """Build the loggers of a run.

    Args:
        config: Which ones.
        output_dir: The run's folder.
        wandb_id: Run id to go on with, from the checkpoint that is resumed.

    Returns:
        The loggers, CSV first.

    Raises:
        UserError: TensorBoard is asked for and not installed.
    """
    loggers: list[Logger] = [CSVLogger(output_dir, name="metrics")]
    mode = config.wandb
    if os.environ.get("WANDB_MODE") in {"disabled", "offline"} and mode in {"auto", "online"}:
        mode = "off" if os.environ["WANDB_MODE"] == "disabled" else "offline"
    if mode == "auto":
        mode = "online" if wandb_logged_in() else "offline"
    if mode != "off":
        loggers.append(
            WandbLogger(
                project=config.project,
                name=config.name,
                save_dir=output_dir,
                offline=mode == "offline",
                id=wandb_id,
                resume="allow",
            )
        )
    if config.tensorboard:
        try:
            loggers.append(TensorBoardLogger(output_dir, name="tensorboard"))
        except ModuleNotFoundError as error:
            raise UserError(
                "TensorBoard is not installed; pip install 'lit_llm[tensorboard]', "
                "or leave out --logging.tensorboard"
            ) from error
    return loggers
