"""Checks of what PPO makes of the responses: their scores, ends, length, repetition, a judge.

Each takes the history and the limits and returns its diagnosis, or ``None`` where all is well.
"""

from lit_llm.evaluation.ppo_history import ends, level, series
from lit_llm.evaluation.ppo_limits import Diagnosis, HealthLimits, History

# Scores whose standard deviation is so small a part of their size differ by rounding only.
_NO_SPREAD = 1e-6


def no_signal(history: History, limits: HealthLimits) -> Diagnosis | None:
    """All rewards are equal."""
    spread = series(history, "objective/scores_std")
    if spread is None or len(spread) < limits.window:
        return None
    recent = spread.part(-limits.window)
    scores = level(history, "objective/scores", limits)
    score = scores.mean if scores else 0.0
    if max(recent.values) > _NO_SPREAD * max(1.0, abs(score)):
        return None
    return Diagnosis(
        "no_signal",
        f"In {recent.when} all responses of an iteration have the same score (on average "
        f"{score:.4g}; objective/scores_std is {max(recent.values):.3g}), so there is nothing to "
        "learn but the KL penalty. Usual cause: a rule that no response meets yet, or every one; a "
        "reward that does not see the response; model.ppo.missing_eos_score where every response "
        "is cut off. Cure: look at responses.jsonl; take easier prompts, or a reward with steps in "
        "between; raise model.ppo.rollout_batch_size, so that a rare success is among them; give "
        "whole answers room (model.generation.max_new_tokens).",
    )


def no_stop(history: History, limits: HealthLimits) -> Diagnosis | None:
    """Responses do not end by themselves, or less and less."""
    name = "rollout/eos_rate"
    recent, found = level(history, name, limits), ends(history, name, limits)
    if recent is not None and recent.mean < limits.eos_rate:
        told = (
            f"{name} was {recent.mean:.1%} over {recent.when} (limit {limits.eos_rate:.1%}): "
            "hardly a response ends by itself before model.generation.max_new_tokens"
        )
    elif (
        found is not None
        and found.last.mean < limits.eos_share * found.first.mean
        and found.rise < -limits.noise
    ):
        told = (
            f"{name} fell from {found.first.mean:.0%} of the responses in {found.first.when} to "
            f"{found.last.mean:.0%} in {found.last.when}: the policy unlearns to stop"
        )
    else:
        return None
    return Diagnosis(
        "no_stop",
        f"{told}. Usual cause: a response that is cut off scores as well as one that ends, or "
        "better because it is longer. Cure: model.ppo.missing_eos_penalty of about the deviation "
        "of the scores, 1.0 for a standardised reward; more model.generation.max_new_tokens if "
        "good answers need the room. Where responses are meant to be cut off this is no failure.",
    )


def length_drift(history: History, limits: HealthLimits) -> Diagnosis | None:
    """Responses get longer or shorter."""
    found = ends(history, "rollout/response_length", limits)
    if found is None or found.first.mean <= 0 or abs(found.rise) <= limits.noise:
        return None
    factor = found.last.mean / found.first.mean
    if factor > limits.length_factor:
        text = (
            "responses grow, the usual first sign that PPO finds length before quality. Usual "
            "cause: a reward that likes long responses. Cure: read what the reward model's report "
            "says of length; add the rule length_window to the rewards; set "
            "model.ppo.missing_eos_penalty; raise model.ppo.kl_coef."
        )
    elif factor < 1 / limits.length_factor:
        text = (
            "responses shrink. Usual cause: a reward that likes short responses, a penalty that "
            "every further token adds to, or a large model.ppo.missing_eos_penalty. Cure: add the "
            "rule length_window to the rewards; lower model.ppo.missing_eos_penalty; lower "
            "model.ppo.kl_coef if the scores fall too."
        )
    else:
        return None
    return Diagnosis(
        "length_drift",
        f"rollout/response_length went from {found.first.mean:.3g} tokens in {found.first.when} to "
        f"{found.last.mean:.3g} in {found.last.when} ({factor:.2g} times): {text} Where the reward "
        "asks for it this is no failure.",
    )


def repetition(history: History, limits: HealthLimits) -> Diagnosis | None:
    """Responses repeat themselves more than they did."""
    found = ends(history, "rollout/repetition", limits)
    if found is None or found.rise <= limits.noise:
        return None
    if found.last.mean - found.first.mean <= limits.repetition_rise:
        return None
    return Diagnosis(
        "repetition",
        "rollout/repetition, the share of its n-grams that a response has said before, rose from "
        f"{found.first.mean:.0%} in {found.first.when} to {found.last.mean:.0%} in "
        f"{found.last.when}. Usual cause: a reward that pays for a phrase each time it is said. "
        "Cure: look at responses.jsonl; let the reward count a phrase once, or add one that "
        "takes repetition off; raise model.ppo.kl_coef; lower model.generation.max_new_tokens.",
    )


def over_optimisation(history: History, limits: HealthLimits) -> Diagnosis | None:
    """The reward rises and a judge falls: Gao et al. 2022, https://arxiv.org/abs/2210.10760."""
    names = sorted({name for row in history for name in row if name.startswith("judge/")})
    told = [found for name in names if (found := _turned(history, name, limits)) is not None]
    if not told:
        return None
    return Diagnosis(
        "over_optimisation",
        f"{'; '.join(told)}: the policy gets better by the reward it learns from and worse by a "
        "judge it does not see. Usual cause: the reward has a weakness, and PPO has found it. "
        "Cure: keep a checkpoint of the judge's best iterations and end the run there "
        "(trainer.max_epochs); raise model.ppo.kl_coef, or hold the distance with "
        "model.ppo.kl_target; mend the reward, or learn from the judge too and take another one.",
        "error",
    )


def _turned(history: History, name: str, limits: HealthLimits) -> str | None:
    """What a judge and the scores did since the judge was at its best, if they parted then."""
    judge, scores = series(history, name), series(history, "objective/scores")
    if judge is None or scores is None or judge.iterations != scores.iterations:
        return None
    # The judge may have risen at first, so its best part counts. Parts are quarters of the run:
    # the best of many short ones would be the best by chance.
    length = max(limits.window, len(judge) // 4)
    starts = range(len(judge) % length, len(judge) - length, length)
    if not starts:
        return None
    start = max(starts, key=lambda start: judge.part(start, start + length).mean)
    best, last = judge.part(start, start + length), judge.part(-length)
    before, now = scores.part(start, start + length), scores.part(-length)
    if judge.rise(best, last) >= -limits.noise or scores.rise(before, now) <= limits.noise:
        return None
    return (
        f"{name} fell from {best.mean:.3g} in {best.when} to {last.mean:.3g} in {last.when}, "
        f"while objective/scores rose from {before.mean:.3g} to {now.mean:.3g}"
    )
