"""How the policy of reinforcement learning answers prompts, whatever holds its weights."""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_llm.data.prompts import Prompt
from lit_llm.errors import UserError
from lit_llm.models.adapter_switches import adapters_off
from lit_llm.modules.actor_critic import ActorCriticModule
from lit_llm.rollout.engine import RolloutEngine
from lit_llm.rollout.generation import Response
from lit_llm.rollout.rewards import RewardSample
from lit_llm.rollout.sampling import SamplingEngine


class RespondingModule(ActorCriticModule):
    """Samples responses: from the policy itself, or from its weights gathered once a rollout."""

    gather_seconds = 0.0
    """What the last gathering of sharded weights took."""
    _engine: RolloutEngine | None = None

    def respond(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        by_reference: bool = False,
        batch_size: int | None = None,
    ) -> list[Response]:
        """Let the policy, or the reference, answer prompts.

        Args:
            prompts: What to answer.
            seeds: One a prompt: what is sampled depends on it, and not on the other prompts.
            by_reference: Let the reference answer.
            batch_size: Prompts to answer at once; by default all.
        """
        if not prompts:
            return []
        size = batch_size or len(prompts)
        if self.samples_in_place:
            return self.by_root("respond_in_place", prompts, seeds, by_reference, size)
        with self.sampled_from(by_reference) as model:
            if self._replica is not None:
                self.gather_seconds = self._replica.seconds
            return self._sampled(self._get_engine(), model, prompts, seeds, size)

    def respond_in_place(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        by_reference: bool,
        batch_size: int,
    ) -> list[Response]:
        """``respond`` with the weights as the strategy holds them, within the root's forward."""
        switched = by_reference and self.adapter is not None
        model = self.reference if by_reference and not switched else self.model
        with adapters_off(self.model) if switched else nullcontext():
            return self._sampled(self._get_engine(), model, prompts, seeds, batch_size)

    @property
    def samples_in_place(self) -> bool:
        """Whether sharded weights are sampled from as they are, layer by layer and together."""
        return self._replica is not None and self.ppo.sharded_rollouts

    def _sampled(
        self,
        engine: RolloutEngine,
        model: Any,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        batch_size: int,
    ) -> list[Response]:
        engine.load(model)
        try:
            responses = []
            for first in range(0, len(prompts), batch_size):
                part = slice(first, first + batch_size)
                ids = [prompt.ids for prompt in prompts[part]]
                responses += engine.generate(ids, self.generation, seeds=seeds[part])
            return responses
        finally:
            engine.release()

    def samples(
        self, prompts: Sequence[Prompt], responses: Sequence[Response]
    ) -> list[RewardSample]:
        """Prompts and responses as rewards are given them."""
        tokenizer = self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        return [
            RewardSample(
                prompt=prompt.text,
                response=_response_text(tokenizer, prompt.ids, response.ids),
                prompt_ids=prompt.ids,
                response_ids=response.ids,
                stopped=response.stopped,
                messages=prompt.messages,
                reference=prompt.reference,
                answer_format=prompt.answer_format,
            )
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    def _get_engine(self) -> RolloutEngine:
        if self._engine is None:
            datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            half = "bf16" in str(self.trainer.precision)
            factory: Any = SamplingEngine
            if self.rollout_engine is not None:
                factory = _load(self.rollout_engine)
            elif self.samples_in_place:
                factory = partial(SamplingEngine, in_place=True)
            if self._replica is not None:
                self._tell_memory()
            self._engine = factory(
                pad_token_id=datamodule.pad_token_id,
                stop_token_ids=datamodule.stop_token_ids,
                batch_size=max(self.ppo.rollout_batch_size, datamodule.val_batch_size),
                dtype=torch.bfloat16 if half else None,
            )
        assert self._engine is not None
        return self._engine

    def _tell_memory(self) -> None:
        """Say what gathering takes: the one number that decides between the two ways."""
        assert self._replica is not None
        size = f"{self._replica.bytes / 1e9:.2g} GB"
        if self.samples_in_place:
            rank_zero_warn(
                "responses are sampled from sharded weights: every token gathers every layer anew. "
                f"Where {size} more fit on each device, model.ppo.sharded_rollouts false gathers "
                "them once a rollout"
            )
        else:
            rank_zero_info(
                f"Rollouts gather the policy's weights, {size} on every device; where they do not "
                "fit, set model.ppo.sharded_rollouts"
            )

    @contextmanager
    def sampled_from(self, by_reference: bool) -> Iterator[Any]:
        """The policy, or the reference, with all its weights on every rank."""
        switched = by_reference and self.adapter is not None
        with (
            self.whole(self.reference if by_reference and not switched else None) as model,
            adapters_off(model) if switched else nullcontext(),
        ):
            yield model


def _response_text(tokenizer: Any, prompt_ids: list[int], response_ids: list[int]) -> str:
    """What a response adds to its prompt: alone, it may lose the space that it begins with."""
    before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    whole: str = tokenizer.decode([*prompt_ids, *response_ids], skip_special_tokens=True)
    if whole.startswith(before):
        return whole[len(before) :]
    alone: str = tokenizer.decode(response_ids, skip_special_tokens=True)
    return alone


def _load(path: str) -> Any:
    """What a path ``package.module:name`` names."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"model.rollout_engine {path!r} cannot be loaded ({error}); give package.module:name"
        ) from error
