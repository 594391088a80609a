"""Checks of how PPO moves its policy: numbers that cannot be, distance, steps, the critic.

Each takes the history and the limits and returns its diagnosis, or ``None`` where all is well.
"""

import math

from lit_llm.evaluation.ppo_history import ITERATION, Stretch, ends, level, series
from lit_llm.evaluation.ppo_limits import Diagnosis, HealthLimits, History

# What rounding in bfloat16 does to a ratio stays below it.
_BEYOND_ROUNDING = 0.1
# A metric that a healthy run may lack: returns that are all the same have no variance to explain.
_MAY_BE_UNDEFINED = {"value/explained_variance"}
_GROSS = 10.0  # times a limit: two iterations are enough
# Share of its iterations without explanation that makes a critic blind.
_BLIND = 0.9


def nan(history: History, limits: HealthLimits) -> Diagnosis | None:
    """A metric of the last iteration is NaN or infinite."""
    last = history[-1]
    broken = [
        f"{name} ({value})"
        for name, value in last.items()
        if not math.isfinite(value) and name not in _MAY_BE_UNDEFINED
    ]
    if not broken:
        return None
    return Diagnosis(
        "nan",
        f"In iteration {int(last.get(ITERATION, len(history)))} these are no finite numbers: "
        f"{', '.join(broken)}. Usual cause: a step that was too large, or float16 that overflowed. "
        "Cure: go on from a checkpoint before it (--resume PATH) with a lower "
        "model.optimizer.init_args.lr, trainer.gradient_clip_val 1.0, and trainer.precision "
        "bf16-mixed or 32-true in place of 16-mixed.",
        "error",
    )


def off_policy_start(history: History, limits: HealthLimits) -> Diagnosis | None:
    """The ratio is not 1 before the first update of an iteration."""
    errors = series(history, "policy/first_ratio_error")
    if errors is None or errors.values[-1] <= limits.first_ratio_error:
        return None
    recent = errors.part(-limits.window)
    over = sum(value > limits.first_ratio_error for value in recent.values)
    certain = errors.values[-1] > _BEYOND_ROUNDING
    reason = (
        "Usual cause: dropout that is on in the update, or text that the update reads otherwise "
        "than the scoring of the rollout did (padding, positions, temperature). Cure: "
        "model.base.dropout 0.0; where that changes nothing, an error of the code has to be found."
        if certain
        else "Usual cause: rounding, where the update reads the responses in other batches than "
        "the scoring did. Cure: try trainer.precision 32-true; where the error stays, "
        "model.base.dropout 0.0."
    )
    return Diagnosis(
        "off_policy_start",
        f"Before the first update of iteration {errors.iterations[-1]} the policy still is the one "
        "that sampled, so every token's ratio should be 1, but it is off by up to "
        f"{errors.values[-1]:.3g} (policy/first_ratio_error; limit {limits.first_ratio_error:.3g}; "
        f"over it {over} times in {recent.when}): PPO corrects a change that there was not. "
        f"{reason}",
        "error" if certain else "warning",
    )


def negative_kl(history: History, limits: HealthLimits) -> Diagnosis | None:
    """The KL divergence from the reference is below 0 by more than chance."""
    found = series(history, "objective/kl")
    if found is None:
        return None
    recent = found.part(-limits.window)
    # Of fewer iterations than a window the same sum is asked for: it is as unlikely.
    if sum(recent.values) >= -limits.negative_kl * limits.window:
        return None
    return Diagnosis(
        "negative_kl",
        f"objective/kl was {recent.mean:.3g} nats a response over {recent.when} (limit "
        f"-{limits.negative_kl:.3g}). What a policy samples is on average likelier under itself "
        "than under any other model, and chance does not go so far below 0: the responses were "
        "not sampled from the probabilities that are compared. Usual cause: sampling that leaves "
        "tokens out, or a policy and a reference that do not read the same text. Cure: "
        "model.generation.top_p 1.0, model.generation.top_k null, model.base.dropout 0.0, and the "
        "model that the policy started from as the reference.",
        "error",
    )


def kl_growth(history: History, limits: HealthLimits) -> Diagnosis | None:
    """The policy is too far from the reference, or soon will be."""
    found, recent = series(history, "objective/kl"), level(history, "objective/kl", limits)
    if found is None or recent is None:
        return None
    before = found.part(-2 * limits.window, -limits.window)
    cure = (
        "Usual cause: a penalty too weak for the size of the rewards, or steps that are too "
        "large. Cure: raise model.ppo.kl_coef two to five times, or let model.ppo.kl_target find "
        "it; lower model.optimizer.init_args.lr; bring large scores down to a deviation of 1 "
        "(model.ppo.normalise_scores running)."
    )
    if recent.median > limits.kl:
        return Diagnosis(
            "kl_growth",
            f"objective/kl was {recent.median:.3g} nats a response{_a_token(history, recent)} "
            f"(median over {recent.when}; limit {limits.kl:.3g}): the policy is so far from the "
            f"reference that the reward judges text it was not made for. {cure}",
            "error",
        )
    if (
        len(before) == limits.window
        and recent.mean > max(limits.kl_growth_from, limits.kl_growth * before.mean)
        and found.rise(before, recent) > limits.noise
    ):
        return Diagnosis(
            "kl_growth",
            f"objective/kl rose from {before.mean:.3g} nats a response in {before.when} to "
            f"{recent.mean:.3g} in {recent.when}, more than {limits.kl_growth:.3g} times within "
            f"{limits.window} iterations. {cure}",
        )
    return None


def _a_token(history: History, recent: Stretch) -> str:
    lengths = series(history, "rollout/response_length")
    length = lengths.part(-len(recent)).median if lengths else 0.0
    return f", {recent.median / length:.2g} a token" if length > 0 else ""


def entropy_collapse(history: History, limits: HealthLimits) -> Diagnosis | None:
    """The policy becomes certain of everything it says."""
    found = ends(history, "objective/entropy", limits)
    if found is None or found.rise >= -limits.noise:
        return None
    if found.last.mean >= limits.entropy_share * found.first.mean:
        return None
    return Diagnosis(
        "entropy_collapse",
        f"objective/entropy fell from {found.first.mean:.3g} nats a token in {found.first.when} to "
        f"{found.last.mean:.3g} in {found.last.when}, below {limits.entropy_share:.0%} of its "
        "beginning: the policy says nearly the same each time and finds nothing new. Usual cause: "
        "one kind of response wins everything, and large steps make it the only one. Cure: "
        "model.ppo.ent_coef 0.001 to 0.01, a higher model.ppo.kl_coef, a lower "
        "model.optimizer.init_args.lr, fewer model.ppo.num_ppo_epochs.",
        "error",
    )


def clipping(history: History, limits: HealthLimits) -> Diagnosis | None:
    """Much of what the policy could learn is clipped away."""
    recent = level(history, "policy/clipfrac", limits)
    if recent is None or recent.median <= limits.clipfrac:
        return None
    return Diagnosis(
        "clipping",
        f"policy/clipfrac was {recent.median:.3g} (median over {recent.when}; limit "
        f"{limits.clipfrac:.3g}): that share of the tokens has moved as far as "
        "model.ppo.clip_range lets them and teaches nothing more in its iteration. Usual cause: "
        "too many or too large steps on the same responses. Cure: a lower "
        "model.optimizer.init_args.lr, fewer model.ppo.num_ppo_epochs, a larger "
        "model.ppo.minibatch_size.",
    )


def large_step(history: History, limits: HealthLimits) -> Diagnosis | None:
    """An iteration moves the policy too far from the one that sampled."""
    found = series(history, "policy/approxkl")
    # Twice in a row, as a single iteration may be an accident.
    if found is not None and min([0.0, *found.values][-2:]) > _GROSS * limits.approxkl:
        return Diagnosis(
            "large_step",
            f"policy/approxkl was {found.values[-1]:.3g} nats a token in iteration "
            f"{found.iterations[-1]} (limit {limits.approxkl:.3g}): the updates of one iteration "
            "have made another policy. Usual cause: a learning rate for a model of another size. "
            "Cure: one ten times lower "
            "(model.optimizer.init_args.lr), from a checkpoint before it or from the start.",
            "error",
        )
    recent = level(history, "policy/approxkl", limits)
    if recent is None or recent.median <= limits.approxkl:
        return None
    return Diagnosis(
        "large_step",
        f"policy/approxkl was {recent.median:.3g} nats a token (median over {recent.when}; limit "
        f"{limits.approxkl:.3g}): within an iteration the policy moves so far that the responses "
        "it learns from are no longer its own. Usual cause: a learning rate that is too high. "
        "Cure: a lower model.optimizer.init_args.lr, fewer model.ppo.num_ppo_epochs, a smaller "
        "model.ppo.clip_range, or model.ppo.target_approxkl 0.05, which ends such an iteration "
        "early.",
    )


def blind_critic(history: History, limits: HealthLimits) -> Diagnosis | None:
    """The critic explains nothing of the returns, for long."""
    found = series(history, "value/explained_variance")
    if found is None or len(found) < limits.critic_iterations:
        return None
    recent = found.part(-limits.critic_iterations)
    blind = sum(value <= 0 for value in recent.values)
    if blind < _BLIND * len(recent):
        return None
    return Diagnosis(
        "blind_critic",
        f"value/explained_variance was 0 or below {blind} times in {recent.when} (median "
        f"{recent.median:.3g}; 1 is perfect): the critic foretells returns no better than their "
        "mean does, so advantages are mostly noise. Usual cause: a critic that learns too slowly, "
        "or started far from the size of the rewards. Cure: raise model.ppo.vf_coef; widen "
        "model.ppo.value_clip_range or drop it (null); start from the reward model "
        "(model.ppo.value_from); or do without a critic (model.ppo.advantage rloo with "
        "model.ppo.group_size 4).",
    )
