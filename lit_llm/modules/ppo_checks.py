"""What of PPO's settings does not go together, found before anything is built."""

from collections.abc import Sequence
from typing import Any

from lit_llm.errors import UserError
from lit_llm.models.adapters import AdapterConfig
from lit_llm.models.config import BaseModelConfig
from lit_llm.modules.ppo_config import PPOConfig
from lit_llm.modules.rewards import RewardConfig, reward_names
from lit_llm.rollout.generation import GenerationConfig


def check_rewards(rewards: Sequence[RewardConfig], judges: Sequence[RewardConfig]) -> None:
    """Refuse a run without a reward, and names that would hide one another.

    Raises:
        UserError: For the first that is so.
    """
    if not rewards:
        raise UserError(
            "model.rewards is empty: nothing says what a good response is; give the folder of a "
            "reward model, a rule, or a function (--model.rewards runs/reward/model)"
        )
    if all(reward.weight == 0 for reward in rewards):
        raise UserError(
            "model.rewards: every reward has the weight 0, so there is nothing to learn; give one "
            "another weight, and what is only measured as model.judges"
        )
    if both := set(reward_names(rewards)) & set(reward_names(judges)):
        raise UserError(
            f"a reward and a judge are both called {min(both)!r}; give one a name "
            "(the field name of model.rewards or model.judges)"
        )


def check_policy(
    base: BaseModelConfig,
    adapter: AdapterConfig | None,
    ppo: PPOConfig,
    generation: GenerationConfig,
) -> None:
    """Refuse a policy that would learn from another one's responses, and a critic nobody reads.

    Raises:
        UserError: For the first that is so.
    """
    if generation.temperature == 0:
        raise UserError(
            "model.generation.temperature is 0, so every response to a prompt is the same and "
            "nothing can be learned from comparing them; 1 is usual"
        )
    if generation.top_k is not None or generation.top_p < 1:
        raise UserError(
            "model.generation: top_k and top_p make what is sampled another policy than the one "
            "that is trained; leave them off and lower the temperature"
        )
    if base.dropout or (adapter is not None and adapter.dropout):
        raise UserError(
            "dropout makes the policy that learns another one than the one that sampled; set "
            "model.base.dropout and model.adapter.dropout to 0"
        )
    if ppo.value_from is not None and (
        adapter is not None or ppo.value_model == "shared" or not ppo.has_critic
    ):
        raise UserError(
            "model.ppo.value_from goes with a separate critic of all weights only (advantage gae, "
            "value_model separate, no adapters); leave it out"
        )
    own = adapter is not None and ppo.has_critic and ppo.value_model == "separate"
    if own and base.compile:
        raise UserError(
            "compiled layers do not take adapters that are switched over; set "
            "model.ppo.value_model to shared, or model.base.compile to false"
        )
    if own and base.gradient_checkpointing:
        raise UserError(
            "gradient checkpointing runs layers again when the critic's adapters are off; set "
            "model.ppo.value_model to shared, or model.base.gradient_checkpointing to false"
        )


def check_positions(config: Any, seq_len: int) -> None:
    """Refuse positions by which a token's probability depends on the longest row beside it.

    Args:
        config: The policy's transformers config.
        seq_len: Longest prompt and response, in tokens.

    Raises:
        UserError: LongRoPE, past the length where it changes.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    border = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and border and seq_len > border:
        raise UserError(
            f"the policy's positions (LongRoPE) change at {border} tokens, so a response's "
            f"probability would depend on the batch it is in; keep data.prompt_len and "
            f"model.generation.max_new_tokens together at {border} or below, not {seq_len}"
        )
