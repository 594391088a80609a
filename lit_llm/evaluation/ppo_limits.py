"""What a failure of PPO is: a diagnosis, and the limits from where on there is one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lit_llm.errors import UserError

Severity = Literal["warning", "error"]
History = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class HealthLimits:
    """From where on PPO's metrics count as a failure.

    Args:
        window: Iterations that a level is taken over, and that "the beginning" lasts.
        noise: Standard errors that a change must come to before it counts; 4 is one false alarm in
            some ten thousand looks.
        first_ratio_error: Most that the ratio of a token may differ from 1 before the first update
            of an iteration.
        negative_kl: How far below 0 the mean KL of a response may lie, in nats, by chance. The
            chance of a mean below -x over N responses is at most exp(-N x), as the mean of
            reference / policy is 1.
        kl: Largest KL of a response from the reference, in nats.
        kl_growth: Largest growth of the KL from one window to the next, as a factor.
        kl_growth_from: KL from which its growth counts, in nats.
        entropy_share: Least share of its beginning that the entropy may fall to.
        clipfrac: Largest share of clipped tokens.
        approxkl: Largest KL between the policies before and after the updates of an iteration, in
            nats a token.
        critic_iterations: Iterations after which a critic that explained nothing in nine of ten of
            them is blind.
        eos_rate: Least share of responses that end by themselves.
        eos_share: Least share of its beginning that this rate may fall to.
        length_factor: Largest factor by which responses may get longer or shorter.
        repetition_rise: Most that the share of repeated n-grams may rise.

    Raises:
        UserError: For a value that makes no sense.
    """

    window: int = 5
    noise: float = 4.0
    first_ratio_error: float = 1e-3
    negative_kl: float = 0.1
    kl: float = 30.0
    kl_growth: float = 2.0
    kl_growth_from: float = 5.0
    entropy_share: float = 0.3
    clipfrac: float = 0.3
    approxkl: float = 0.1
    critic_iterations: int = 15
    eos_rate: float = 0.02
    eos_share: float = 0.5
    length_factor: float = 1.5
    repetition_rise: float = 0.15

    def __post_init__(self) -> None:
        """Refuse limits that nothing can be measured by."""
        for name, least in (("window", 2), ("critic_iterations", 2)):
            if getattr(self, name) < least:
                raise UserError(
                    f"health: {name} must be at least {least}, got {getattr(self, name)}"
                )
        for name in ("kl_growth", "length_factor"):
            if not getattr(self, name) > 1:
                raise UserError(f"health: {name} is a factor above 1, got {getattr(self, name)}")
        for name, value in vars(self).items():
            if not value >= 0:
                raise UserError(f"health: {name} must not be negative, got {value}")


@dataclass(frozen=True)
class Diagnosis:
    """A failure of PPO.

    Attributes:
        name: Its name, e.g. ``entropy_collapse``.
        text: The evidence with numbers and iterations, the usual cause and the cure.
        severity: ``error`` where going on is a waste of time, otherwise ``warning``.
    """

    name: str
    text: str
    severity: Severity = "warning"
