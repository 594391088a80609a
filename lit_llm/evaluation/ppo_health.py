"""What goes wrong in PPO, told from the metrics of its iterations: named, with evidence and cure.

An iteration is a small sample, so nothing is said of one that is merely unlucky: levels are means
or medians over a window of iterations, and a change counts where it is both large and many times
its own noise. What happens then is decided elsewhere (``callbacks/ppo_health.py``).
"""

from lit_llm.evaluation import ppo_response_checks as responses
from lit_llm.evaluation import ppo_update_checks as update
from lit_llm.evaluation.ppo_limits import Diagnosis, HealthLimits, History

__all__ = ["Diagnosis", "HealthLimits", "History", "diagnose"]

_CHECKS = (
    update.nan,
    update.off_policy_start,
    update.negative_kl,
    update.kl_growth,
    update.entropy_collapse,
    responses.over_optimisation,
    responses.no_signal,
    update.large_step,
    update.clipping,
    update.blind_critic,
    responses.no_stop,
    responses.length_drift,
    responses.repetition,
)


def diagnose(history: History, limits: HealthLimits | None = None) -> list[Diagnosis]:
    """Find what is wrong at the end of a history.

    A metric that is missing is not judged: without a critic there is no ``value/...``, without a
    judge no ``judge/...``.

    Args:
        history: The metrics of each iteration under their logged names, in order; a row may hold
            its number as ``iteration``.
        limits: From where on something is wrong; by default as :class:`HealthLimits` has them.

    Returns:
        The diagnoses, errors before warnings; none where all is well.
    """
    if not history:
        return []
    limits = limits or HealthLimits()
    found = [one for check in _CHECKS if (one := check(history, limits)) is not None]
    return sorted(found, key=lambda one: one.severity != "error")
