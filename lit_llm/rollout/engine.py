"""What answers the prompts of a rollout: an interface, and transformers' ``generate`` behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from lit_llm.rollout.generation import GenerationConfig, Response, generate


class RolloutEngine(Protocol):
    """Answers prompts with the policy as it is now; another engine (vLLM, a server) plugs in here.

    A rollout calls ``load`` once, ``generate`` as often as it needs, and ``release``.
    """

    def load(self, model: Any) -> None:
        """Take the weights of the policy as they are now; they must not change until ``release``.

        Args:
            model: A transformers causal language model, possibly wrapped by peft. Adapters that are
                switched off (``disable_adapter``) take no part.
        """

    def generate(
        self, prompts: Sequence[Sequence[int]], config: GenerationConfig, *, seeds: Sequence[int]
    ) -> list[Response]:
        """Answer prompts.

        Args:
            prompts: Token ids of each prompt.
            config: How to sample.
            seeds: One seed a prompt.

        Returns:
            One response a prompt, in the order of the prompts, with the stop token at its end.
        """

    def release(self) -> None:
        """Give back what ``load`` took."""


class EngineFactory(Protocol):
    """Builds an engine; a class of engines is one."""

    def __call__(
        self,
        *,
        pad_token_id: int,
        stop_token_ids: Sequence[int],
        batch_size: int,
        dtype: torch.dtype | None,
    ) -> RolloutEngine:
        """Build an engine.

        Args:
            pad_token_id: Fills up shorter prompts; masked everywhere.
            stop_token_ids: Tokens that end a response.
            batch_size: Prompts to answer at once.
            dtype: What products are computed in; ``None`` is the weights' own.
        """


class TransformersEngine:
    """The policy's own ``generate``, for every architecture transformers can sample from.

    The prompts of a call share the random numbers, so a response depends on the other prompts, and
    on ``batch_size``.

    Args:
        pad_token_id: Fills up shorter prompts; masked everywhere.
        stop_token_ids: Tokens that end a response.
        batch_size: Prompts to answer at once.
        dtype: What products are computed in, by autocast where the weights have another type;
            ``None`` is the weights' own.
    """

    def __init__(
        self,
        *,
        pad_token_id: int,
        stop_token_ids: Sequence[int],
        batch_size: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._pad = pad_token_id
        self._stops = list(stop_token_ids)
        self._batch_size = batch_size
        self._dtype = dtype
        self._model: Any = None

    def load(self, model: Any) -> None:
        """Keep the model; ``generate`` samples from it in place."""
        self._model = model

    def generate(
        self, prompts: Sequence[Sequence[int]], config: GenerationConfig, *, seeds: Sequence[int]
    ) -> list[Response]:
        """Answer prompts; see :class:`RolloutEngine`.

        Raises:
            UserError: A prompt is empty.
        """
        if not prompts:
            return []
        device = next(self._model.parameters()).device.type
        with mixed_precision(self._model, self._dtype, device):
            return generate(
                self._model,
                prompts,
                config,
                pad_token_id=self._pad,
                stop_token_ids=self._stops,
                batch_size=self._batch_size,
                seed=hash(tuple(seeds)) % 2**63,  # of integers, so the same in every process
                keep_stop_token=True,
            )

    def release(self) -> None:
        """Forget the model."""
        self._model = None


def mixed_precision(model: Any, dtype: torch.dtype | None, device: str) -> torch.autocast:
    """Autocast to ``dtype``, switched on where the model's weights have another one."""
    half = dtype in (torch.bfloat16, torch.float16)
    on = half and any(p.dtype != dtype for p in model.parameters() if p.is_floating_point())
    return torch.autocast(device, dtype=dtype if half else torch.bfloat16, enabled=on)
