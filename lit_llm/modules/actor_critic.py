"""The models of reinforcement learning in one module: policy, reference, critic and rewards.

Shapes: B rows, T prompt and response, R response.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lit_llm.errors import UserError
from lit_llm.models.adapter_switches import active_adapter, adapters_off, add_second_adapter
from lit_llm.models.adapters import AdapterConfig, unwrap
from lit_llm.models.compile import compile_blocks
from lit_llm.models.config import BaseModelConfig
from lit_llm.models.forward import hidden_states
from lit_llm.models.policy import policy_output
from lit_llm.models.value import ValueHead, build_value_model, width_of
from lit_llm.models.vocabulary import vocabulary_of
from lit_llm.modules.frozen import tensors_fingerprint
from lit_llm.modules.model import ModelModule
from lit_llm.modules.ppo_checks import check_policy, check_positions, check_rewards
from lit_llm.modules.ppo_config import PPOConfig
from lit_llm.modules.rewards import RewardConfig, Rewards
from lit_llm.modules.schedules import Schedule
from lit_llm.modules.scoring_model import own_tokenizer, reads_alike
from lit_llm.rollout.generation import GenerationConfig
from lit_llm.rollout.rewards import RewardSample

CRITIC = "value"
_FROZEN = ("reference.", "rewards.", "judges.")
_ADAPTED = ("lora_", "modules_to_save", "original_module")


class Views(NamedTuple):
    """What the models say about responses, (B, R) float32 each, 0 where there is no token.

    Attributes:
        logprobs: Of the tokens under the policy, in nats.
        entropy: Of the distributions they were sampled from, in nats.
        values: Of the states before the tokens; 0 without a critic.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


class ActorCriticModule(ModelModule):
    """Policy, reference, critic and rewards: how they are built, run and kept in checkpoints.

    The reference is the policy as it was at the start: with adapters the policy without them,
    otherwise a frozen copy. Reference and rewards are part of the module, so that strategies place
    them, but in evaluation mode and in no checkpoint.

    Args:
        base: The model to start from. Dropout is off: the policy would not be the one that sampled.
        tokenizer: Folder, Hub name or .gguf file of the tokenizer.
        prompt_len: Longest prompt, in tokens.
        optimizer: Builds the optimizer from parameter groups.
        schedule: The learning rate over the run.
        chat_template: File with a chat template.
        pad_token: Text of the padding token.
        adapter: Train adapters instead of all weights.
        ppo: How the policy learns.
        generation: How responses are sampled.
        rewards: What responses are scored by.
        judges: What they are also scored by, without learning from it.
        rollout_engine: Import path of what builds another rollout engine.

    Raises:
        UserError: For a value that makes no sense.
    """

    has_reference = True

    def __init__(
        self,
        base: BaseModelConfig,
        tokenizer: str | None,
        prompt_len: int,
        optimizer: OptimizerCallable,
        schedule: Schedule,
        chat_template: str | None,
        pad_token: str | None,
        adapter: AdapterConfig | None,
        ppo: PPOConfig,
        generation: GenerationConfig,
        rewards: Sequence[RewardConfig],
        judges: Sequence[RewardConfig],
        rollout_engine: str | None,
    ) -> None:
        # From a checkpoint, which holds plain data.
        base = BaseModelConfig(**base) if isinstance(base, dict) else base
        ppo = PPOConfig(**ppo) if isinstance(ppo, dict) else ppo
        generation = GenerationConfig(**generation) if isinstance(generation, dict) else generation
        base = replace(base, dropout=0.0) if base.dropout is None else base
        seq_len = prompt_len + generation.max_new_tokens
        super().__init__(
            base, tokenizer, seq_len, optimizer, schedule, chat_template, pad_token, adapter
        )
        self.hparams.pop("seq_len")  # it follows from the other two
        check_rewards(rewards, judges)
        check_policy(base, self.adapter, ppo, generation)
        self.save_hyperparameters(
            {
                "prompt_len": prompt_len,
                "ppo": asdict(ppo),
                "generation": asdict(generation),
                "rewards": [asdict(one) for one in rewards],
                "judges": [asdict(one) for one in judges],
                "rollout_engine": rollout_engine,
            }
        )
        self.prompt_len = prompt_len
        self.ppo = ppo
        self.generation = generation
        self.reward_configs, self.judge_configs = list(rewards), list(judges)
        self.rollout_engine = rollout_engine
        self.reference: nn.Module | None = None
        self.value_model: nn.Module | None = None
        self.value_head: nn.Module | None = None
        self.rewards: Any = None
        self.judges: Any = None
        self._start_fingerprint = ""
        self.strict_loading = False

    # ----- building -----------------------------------------------------------------------------

    def build_model(self, tokenizer: Any | None) -> Any:
        """Build the policy, and around it what it learns from."""
        model = super().build_model(tokenizer)
        check_positions(unwrap(model).config, int(self.seq_len or 0))
        state = unwrap(model).state_dict()
        self._start_fingerprint = tensors_fingerprint(
            {k: v for k, v in state.items() if not any(part in k for part in _ADAPTED)}
        )
        if self.ppo.has_critic:
            self._build_critic(model, tokenizer)
        if self._trainer is None:  # a policy that is only looked at
            return model
        if self.adapter is None:
            reference = copy.deepcopy(model).requires_grad_(False).eval()
            if self.base.compile:  # it rounds as the policy does
                compile_blocks(reference)
            self.reference = reference
        settings: dict[str, Any] = {
            "tokenizer": tokenizer,
            "max_length": self.seq_len,
            "batch_size": self.batch_sizes().micro_batch_size,
            "dtype": "bfloat16" if "bf16" in str(self.trainer.precision) else "float32",
        }
        self.rewards = Rewards(self.reward_configs, **settings)
        self.judges = Rewards(self.judge_configs, **settings) if self.judge_configs else None
        return model

    def build_bare(self, quantization: Literal["nf4"] | None, **vocabulary: Any) -> Any:
        """Build or load the policy.

        Raises:
            UserError: It has not enough positions, among others.
        """
        try:
            return super().build_bare(quantization, **vocabulary)
        except UserError as error:
            if "sequence length" not in str(error):
                raise
            raise UserError(
                f"{str(error).rstrip('.')}: data.prompt_len {self.prompt_len} and "
                f"model.generation.max_new_tokens {self.generation.max_new_tokens} together"
            ) from error

    def trained(self) -> nn.Module:
        """What holds the trained weights: policy and critic."""
        return self

    def _build_critic(self, model: Any, tokenizer: Any | None) -> None:
        if self.ppo.value_model == "shared":
            self.value_head = ValueHead(width_of(unwrap(model)))
        elif self.adapter is not None:
            add_second_adapter(model, CRITIC)
            self.value_head = ValueHead(width_of(unwrap(model)))
        elif self._trainer is not None:  # where only the policy is looked at, it is left out
            base = self.base
            if self.ppo.value_from is not None:
                other = own_tokenizer(self.ppo.value_from)
                if tokenizer is not None and not reads_alike(other, tokenizer, chats=False):
                    raise UserError(
                        f"model.ppo.value_from {self.ppo.value_from} has another tokenizer than "
                        "the policy, whose tokens the critic is to read; take one trained on the "
                        "same, or leave it out"
                    )
                base = replace(
                    base, pretrained=self.ppo.value_from, preset=None, config=None, revision=None
                )
            vocabulary = {} if tokenizer is None else {**vocabulary_of(tokenizer)}
            critic = build_value_model(base, seq_len=self.seq_len, **vocabulary)
            if self.base.compile:
                compile_blocks(critic.backbone)
            self.value_model = critic

    def batch_sizes(self) -> Any:
        """What each device takes of an iteration."""
        return self.ppo.batches(self.data_parallel_size)

    def train(self, mode: bool = True) -> "ActorCriticModule":
        """Set the mode of what is trained; reference and rewards stay in evaluation mode."""
        super().train(mode)
        for frozen in (self.reference, self.rewards, self.judges):
            if frozen is not None:
                frozen.eval()
        return self

    # ----- what the models say ------------------------------------------------------------------

    def run(self, part: str, *args: Any) -> Any:
        """What the models say outside a step: by the strategy's root, in the run's precision.

        Args:
            part: ``views``, ``reference_logprobs`` or ``scores``.
            args: What the method of that name takes.
        """
        # Scores keep their precision; in half precision the context would also set the default.
        context = self.trainer.precision_plugin.forward_context()
        with nullcontext() if part == "scores" else context:
            return self.by_root(part, *args)

    def views(self, batch: dict[str, Tensor]) -> Views:
        """What policy and critic say about the responses of a batch; differentiable."""
        mask = batch["response_mask"]
        ids, real = batch["input_ids"], batch["attention_mask"]
        output = policy_output(self.model, ids, real, mask, temperature=self.generation.temperature)
        values = torch.zeros_like(output.logprobs)
        if self.value_model is not None:
            values = self.value_model(ids, real, mask.shape[1])
        elif self.value_head is not None and self.ppo.value_model == "shared":
            values = self.value_head(output.hidden)
        elif self.value_head is not None:
            with active_adapter(self.model, CRITIC):
                hidden = hidden_states(self.model, ids, real)
            values = self.value_head(hidden[:, -mask.shape[1] - 1 : -1])
        return Views(output.logprobs, output.entropy, values.masked_fill(mask == 0, 0.0))

    def reference_logprobs(self, batch: dict[str, Tensor]) -> Tensor:
        """Log-probabilities of the responses' tokens under the reference, (B, R) float32."""
        with self.reference_model() as model:
            output = policy_output(
                model,
                batch["input_ids"],
                batch["attention_mask"],
                batch["response_mask"],
                temperature=self.generation.temperature,
            )
        return output.logprobs

    def scores(self, samples: Sequence[RewardSample]) -> tuple[list[Any], str | None]:
        """What the rewards and the judges give the samples; and the first mistake, in a sentence.

        It is not raised: other ranks go on, and may need this one's part of the judges.
        """
        found: list[Any] = []
        mistake: str | None = None
        for judge in (self.rewards, self.judges):
            try:
                found.append(None if judge is None else judge(samples))
            except UserError as error:
                mistake = mistake or str(error)
        return found, mistake

    @contextmanager
    def reference_model(self) -> Iterator[Any]:
        """The model that the policy started from; with adapters the policy without them."""
        if self.adapter is None:
            yield self.reference
            return
        with adapters_off(self.model):
            yield self.model

    # ----- checkpoints --------------------------------------------------------------------------

    def left_out(self) -> set[str]:
        """What is in no checkpoint: the reference, the rewards, and frozen weights on disk."""
        frozen = {name for name in self.whole_shapes if name.startswith(_FROZEN)}
        return super().left_out() | frozen

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is frozen, but tell which model the policy started from."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["start"] = self._start_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a policy that was held to another reference.

        Raises:
            UserError: The model it started from has changed since.
        """
        if self._trainer is None:
            state = checkpoint["state_dict"].items()
            kept = {name: value for name, value in state if not name.startswith("value_model.")}
            checkpoint["state_dict"] = kept
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and checkpoint["start"] != self._start_fingerprint:
            raise UserError(
                f"the checkpoint was trained against another reference than the model in "
                f"{self.base.pretrained}; give the model it started from "
                "(model.base.pretrained), or another --output_dir"
            )
