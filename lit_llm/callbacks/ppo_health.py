"""A watch over PPO: names what goes wrong, and ends the run where it was asked to."""

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_llm.callbacks.checkpoint import checkpoint_path
from lit_llm.callbacks.graceful_stop import RunStopped
from lit_llm.callbacks.table import GrowingTable
from lit_llm.errors import UserError
from lit_llm.evaluation.ppo_health import Diagnosis, HealthLimits, diagnose
from lit_llm.evaluation.ppo_history import ITERATION


class HealthStopped(RunStopped):
    """The health check has ended the run, which is a failure."""

    code = 1


class PPOHealth(Callback):
    """Look for what usually goes wrong in PPO after every iteration, and say it in plain words.

    A diagnosis has a name, its evidence, the usual cause and the cure
    (:func:`lit_llm.evaluation.ppo_health.diagnose`). It is a warning on the terminal and a line of
    ``health.jsonl``, which is there, though empty, where nothing was found.

    The module has ``iteration_metrics``, the same on all ranks, complete before the callbacks' hook
    at the epoch's end: Lightning calls that one before the module's own.

    Args:
        action: ``warn`` tells; ``stop`` also saves a checkpoint and ends the run at the first
            diagnosis that is an error (going on would be a waste of time); ``off`` does not look.
        repeat_every: Iterations after which a diagnosis that still holds is told again.
        limits: From where on something is wrong.
    """

    def __init__(
        self,
        action: Literal["warn", "stop", "off"] = "warn",
        repeat_every: int = 10,
        limits: HealthLimits = HealthLimits(),  # noqa: B008 - frozen
    ) -> None:
        if action not in ("warn", "stop", "off"):
            raise UserError(f"health: action {action!r}: use warn, stop or off")
        if repeat_every < 1:
            raise UserError(f"health: repeat_every must be at least 1, got {repeat_every}")
        self.action = action
        self.repeat_every = repeat_every
        self.limits = limits
        self._history: list[dict[str, float]] = []
        self._table = GrowingTable("health", [ITERATION, "severity", "name", "text"])

    def state_dict(self) -> dict[str, Any]:
        """Keep what was seen and told."""
        return {"history": self._history, "rows": self._table.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        self._history = list(state_dict["history"])
        self._table.rows = state_dict["rows"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the file, or go on with it."""
        if self.action == "off":
            return
        if trainer.is_global_zero:
            if trainer.global_step:
                self._table.take_over(trainer)
            self._write(trainer, [])
        # A checkpoint of an iteration's last step is older than its diagnosis, and Lightning does
        # not end that epoch a second time.
        done = trainer.current_epoch
        if done and not any(row[ITERATION] == done for row in self._history):
            self._tell(trainer, self._look(pl_module, done), done)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the iteration that ends.

        Raises:
            HealthStopped: A diagnosis is an error and the action is ``stop``.
        """
        if self.action == "off":
            return
        iteration = trainer.current_epoch + 1
        found = self._look(pl_module, iteration)
        self._tell(trainer, found, iteration)
        errors = [one for one in found if one.severity == "error"]
        if errors and self.action == "stop":
            # The evidence: the module's own hook, which logs it, comes after this one.
            for logger in trainer.loggers:
                metrics: Any = getattr(pl_module, "iteration_metrics", {})
                logger.log_metrics(metrics, step=trainer.global_step - 1)
                logger.save()
            raise HealthStopped(self._stopped(trainer, errors[0]))

    def _look(self, pl_module: Any, iteration: int) -> list[Diagnosis]:
        metrics = getattr(pl_module, "iteration_metrics", None)
        if not metrics:
            return []
        row = {name: float(value) for name, value in metrics.items()}
        self._history.append({ITERATION: iteration, **row})
        return diagnose(self._history, self.limits)

    def _tell(self, trainer: Trainer, found: list[Diagnosis], iteration: int) -> None:
        if not trainer.is_global_zero:
            return
        fresh = [one for one in found if self._is_due(one, iteration)]
        for one in fresh:
            rank_zero_warn(f"PPO health, {one.severity} {one.name}: {one.text}")
        if fresh:
            self._write(trainer, [[iteration, one.severity, one.name, one.text] for one in fresh])

    def _is_due(self, one: Diagnosis, iteration: int) -> bool:
        """Whether it is new, worse than before, or was told long ago."""
        told = [row for row in self._table.rows if row[3] == one.name]
        if not told:
            return True
        _, last, severity, *_ = told[-1]
        worse = one.severity == "error" and severity != "error"
        return worse or iteration >= last + self.repeat_every

    def _write(self, trainer: Trainer, rows: list[list[Any]]) -> None:
        """Add rows to those that this step has."""
        kept = [row[1:] for row in self._table.rows if row[0] == trainer.global_step]
        self._table.put(trainer, [*kept, *rows])

    def _stopped(self, trainer: Trainer, error: Diagnosis) -> str:
        told = f"stopped by the health check after iteration {trainer.current_epoch + 1}"
        cause = f"{error.name}: {error.text}"
        if error.name == "nan":  # weights that --resume auto should not find
            return f"{told} without a checkpoint of it; {cause}"
        path = checkpoint_path(trainer)
        trainer.save_checkpoint(path, weights_only=False)
        return (
            f"{told}, saved {path}; {cause} To go on from there with other settings add "
            f"--resume {path}; to go on as it is, --health.action warn."
        )
