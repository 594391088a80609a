"""Learning-rate schedules, counted in optimizer steps."""

import math
from dataclasses import dataclass
from typing import Literal

from lit_llm.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """How the learning rate moves over a run, as a factor of its peak.

    A plain description instead of an injected ``LRScheduler``: every shape but the constant one
    needs the run's length in optimizer steps, which only the trainer knows.

    Args:
        name: ``wsd`` holds the peak and then decays linearly (warm-up, stable, decay: Hu et al.
            2024, https://arxiv.org/abs/2404.06395); ``cosine`` falls along half a cosine from the
            end of the warm-up (Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983);
            ``linear`` falls in a straight line; ``constant`` stays at the peak.
        warmup_steps: Optimizer steps of linear warm-up; a number below 1 is a share of the run.
        decay_steps: Length of the final decay of ``wsd``, in steps; a number below 1 is a share of
            the run. The other schedules ignore it.
        min_factor: The factor that the decay ends at.
    """

    name: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    warmup_steps: float = 0.02
    decay_steps: float = 0.2
    min_factor: float = 0.0

    def __post_init__(self) -> None:
        """Refuse numbers that no schedule can follow."""
        if self.warmup_steps < 0 or self.decay_steps < 0:
            raise UserError(
                "schedule: warmup_steps and decay_steps must not be negative, got "
                f"{self.warmup_steps} and {self.decay_steps}; give steps, or a share below 1"
            )
        if not 0 <= self.min_factor <= 1:
            raise UserError(
                f"schedule: min_factor must lie in [0, 1], got {self.min_factor}; "
                "it is the share of the peak learning rate that the decay ends at"
            )

    def factor(self, step: int, total_steps: int) -> float:
        """Return the factor for the update number ``step`` (0 is the first) of ``total_steps``.

        The first update of a warm-up of w steps has 1/w, never 0 (a step with learning rate 0 is
        a batch thrown away); the last update of a decay stands one step above ``min_factor``.
        """
        warmup = _steps(self.warmup_steps, total_steps)
        if step < warmup:
            return (step + 1) / warmup
        if self.name == "constant":
            return 1.0
        start = warmup
        if self.name == "wsd":
            start = max(warmup, total_steps - _steps(self.decay_steps, total_steps))
        if step < start:
            return 1.0
        progress = min(1.0, (step - start) / max(1, total_steps - start))
        shape = 0.5 * (1 + math.cos(math.pi * progress)) if self.name == "cosine" else 1 - progress
        return self.min_factor + (1 - self.min_factor) * shape


def _steps(value: float, total_steps: int) -> int:
    """Read a length given in steps (>= 1) or as a share of the run (< 1)."""
    return round(value * total_steps) if value < 1 else int(value)
