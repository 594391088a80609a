"""The settings of PPO, as plain data."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from lit_llm.errors import UserError
from lit_llm.functional.policy_gradient import KLKind


@dataclass
class PPOConfig:
    """How a policy learns from its own responses.

    PPO: Schulman et al. 2017, https://arxiv.org/abs/1707.06347; on language models: Ziegler et al.
    2019, https://arxiv.org/abs/1909.08593, and Ouyang et al. 2022, https://arxiv.org/abs/2203.02155.

    Args:
        rollout_batch_size: Responses of an iteration, over all devices.
        minibatch_size: Responses of an optimizer step, over all devices.
        micro_batch_size: Responses that go through the models at once on each device; by default a
            minibatch's share.
        rollout_micro_batch_size: Responses that each device samples at once; by default its whole
            share, which is quickest, and needs memory for the keys and values of all of them.
        num_ppo_epochs: Times that an iteration goes through its responses.
        group_size: Responses to each prompt; grpo and rloo compare them with each other.
        advantage: ``gae`` learns a critic (https://arxiv.org/abs/1506.02438); ``grpo``
            (https://arxiv.org/abs/2402.03300) and ``rloo`` (https://arxiv.org/abs/2402.14740) do
            without one.
        value_model: Where the critic lives: ``separate`` is a model of its own (with adapters:
            adapters of its own on the policy's backbone); ``shared`` is a head on the policy.
        value_from: Folder or Hub name of the model that a separate critic starts from, best the
            reward model; by default the policy's.
        kl_coef: Price of a nat of KL divergence from the reference, in units of reward.
        kl_estimator: What each token pays for: ``k1``, log(policy / reference); ``k2``, half its
            square; or ``k3``, never below 0 (http://joschu.net/blog/kl-approx.html).
        kl_target: KL of a response, in nats, that kl_coef is moved to keep (the adaptive controller
            of Ziegler et al.); by default kl_coef stays as it is.
        kl_horizon: Responses over which the controller acts; fewer make it quicker.
        clip_range: How far the ratio of new to old probability of a token may move from 1.
        value_clip_range: How far a value may move in an iteration; ``null`` is without limit.
        vf_coef: Weight of the critic's loss.
        ent_coef: Weight of the entropy bonus.
        gamma: Discount of later rewards, a token.
        gae_lambda: How far advantages look ahead: 0 is the next value only, 1 the whole return.
        whiten_advantages: Bring the advantages of a rollout to mean 0 and deviation 1; by default
            for gae only.
        whiten_rewards: Bring the rewards of tokens to deviation 1, their mean left as it is.
        normalise_scores: Scale of the scores: ``none`` leaves them; ``batch`` brings those of a
            rollout to mean 0 and deviation 1; ``running`` does so with those of all rollouts so
            far.
        score_clip: Largest absolute score, after normalising.
        missing_eos_penalty: Taken off the score of a response that was cut off.
        missing_eos_score: Score of a response that was cut off, whatever it says.
        target_approxkl: Once a minibatch finds the policy this far (nats a token) from the one that
            sampled, the rest of the iteration is skipped, on all devices alike.
        ptx_coef: Weight of the pre-training loss mixed in (PPO-ptx, Ouyang et al.); needs
            ``data.ptx_sources``.
        value_lr_factor: Learning rate of a critic's own weights, as a factor of the policy's.
        sharded_rollouts: Under strategies that shard weights, sample from them as they are, layer
            by layer, all devices together: slow, for policies that do not fit on one device. By
            default the weights are gathered once a rollout.
        seed: Seed of the sampling, and of the order of the updates.

    Raises:
        UserError: For a value that makes no sense.
    """

    rollout_batch_size: int = 64
    minibatch_size: int = 16
    micro_batch_size: int | None = None
    rollout_micro_batch_size: int | None = None
    num_ppo_epochs: int = 2
    group_size: int = 1
    advantage: Literal["gae", "grpo", "rloo"] = "gae"
    value_model: Literal["separate", "shared"] = "separate"
    value_from: str | None = None
    kl_coef: float = 0.05
    kl_estimator: KLKind = "k1"
    kl_target: float | None = None
    kl_horizon: int = 10_000
    clip_range: float = 0.2
    value_clip_range: float | None = 0.2
    vf_coef: float = 0.1
    ent_coef: float = 0.0
    gamma: float = 1.0
    gae_lambda: float = 0.95
    whiten_advantages: bool | None = None
    whiten_rewards: bool = False
    normalise_scores: Literal["none", "batch", "running"] = "none"
    score_clip: float | None = None
    missing_eos_penalty: float | None = None
    missing_eos_score: float | None = None
    target_approxkl: float | None = None
    ptx_coef: float = 0.0
    value_lr_factor: float = 1.0
    sharded_rollouts: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no iteration can be made of."""
        for name in ("rollout_batch_size", "minibatch_size", "num_ppo_epochs", "group_size"):
            if getattr(self, name) < 1:
                raise UserError(f"model.ppo: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("micro_batch_size", "rollout_micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"model.ppo: {name} must be at least 1, got {value}")
        if self.rollout_batch_size % self.minibatch_size:
            raise UserError(
                f"model.ppo: rollout_batch_size {self.rollout_batch_size} must be a multiple of "
                f"minibatch_size {self.minibatch_size}, so that each response is learned from as "
                "often as any other"
            )
        if self.rollout_batch_size % self.group_size:
            raise UserError(
                f"model.ppo: rollout_batch_size {self.rollout_batch_size} must be a multiple of "
                f"group_size {self.group_size}, the responses to each prompt"
            )
        if self.advantage != "gae" and self.group_size < 2:
            raise UserError(
                f"model.ppo: advantage {self.advantage} compares the responses to one prompt with "
                "each other; give model.ppo.group_size, at least 2 (4 to 8 is usual)"
            )
        positive = ("kl_horizon", "clip_range", "value_clip_range", "kl_target", "score_clip")
        for name in (*positive, "target_approxkl", "value_lr_factor"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"model.ppo: {name} must be above 0, got {value}")
        for name in ("kl_coef", "vf_coef", "ent_coef", "ptx_coef", "missing_eos_penalty"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UserError(f"model.ppo: {name} must not be negative, got {value}; 0 is off")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"model.ppo: {name} must lie in [0, 1], got {getattr(self, name)}")
        if self.missing_eos_penalty is not None and self.missing_eos_score is not None:
            raise UserError("model.ppo: give missing_eos_penalty or missing_eos_score, not both")
        if self.kl_target is not None and self.kl_coef == 0:
            raise UserError(
                "model.ppo: kl_target moves kl_coef by factors, so it cannot start from 0; give "
                "a kl_coef above 0"
            )

    @property
    def has_critic(self) -> bool:
        """Whether values are learned."""
        return self.advantage == "gae"

    @property
    def whitens_advantages(self) -> bool:
        """Whether advantages are whitened."""
        return self.has_critic if self.whiten_advantages is None else self.whiten_advantages

    def batches(self, world_size: int) -> "BatchSizes":
        """What each of the devices takes of an iteration.

        Args:
            world_size: Devices that see different data.

        Raises:
            UserError: The sizes do not divide evenly.
        """
        share = self.minibatch_size // world_size
        micro = self.micro_batch_size or max(1, share)
        if self.minibatch_size % (micro * world_size):
            raise UserError(
                f"model.ppo: minibatch_size {self.minibatch_size} must be a multiple of "
                f"micro_batch_size x devices ({micro} x {world_size})"
            )
        prompts = self.rollout_batch_size // self.group_size
        if prompts % world_size:
            raise UserError(
                f"model.ppo: the {prompts} prompts of an iteration (rollout_batch_size / "
                f"group_size) must be a multiple of the {world_size} devices"
            )
        return BatchSizes(prompts, micro, self.minibatch_size // (micro * world_size))


class BatchSizes(NamedTuple):
    """The sizes that follow from the settings and the number of devices.

    Attributes:
        prompts: Prompts of an iteration, over all devices.
        micro_batch_size: Responses that go through the models at once on each device.
        accumulate: Micro-batches of an optimizer step on each device.
    """

    prompts: int
    micro_batch_size: int
    accumulate: int
