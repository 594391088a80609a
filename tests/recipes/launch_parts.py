"""What the tests of the launch files run beside the recipes."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Strike(Callback):
    """Send a signal at the beginning of a step: to this process, or to the one that launched it.

    Args:
        step: Optimizer steps that are done by then; a run that is resumed there is left alone.
        rank: Which process does it.
        number: Of the signal.
        file: Holds the id of the process to strike; by default it is this one.
    """

    def __init__(self, step: int, rank: int = 0, number: int = 9, file: str | None = None) -> None:
        self.step, self.rank, self.number, self.file = step, rank, number, file
        self._armed = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing in the run that goes on."""
        self._armed = trainer.global_step == 0

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Strike."""
        if self._armed and trainer.global_step == self.step and trainer.global_rank == self.rank:
            self._armed = False
            os.kill(
                os.getpid() if self.file is None else int(Path(self.file).read_text()), self.number
            )


def srun(command: list[str]) -> int:
    """What SLURM's ``srun`` does for the processes of two nodes, on this machine."""
    count = int(os.environ["SLURM_NTASKS"])
    tasks = []
    for number in range(count):
        own = {
            "SLURM_PROCID": str(number),
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": str(number),
            "SLURM_STEP_ID": "0",
        }
        tasks.append(subprocess.Popen(command, env=os.environ | own))
    signal.signal(signal.SIGTERM, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
    return max(abs(task.wait()) for task in tasks)


if __name__ == "__main__":
    sys.exit(srun(sys.argv[1:]))
