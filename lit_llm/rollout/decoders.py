"""Language models one step at a time, with a key-value cache that is allocated once.

Legend: B batch, P prompt, S places of the cache, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Decoder(Protocol):
    """Reads a batch of prompts, then one token of every row at a time."""

    def start(self, prompts: Sequence[Sequence[int]], new: int) -> Tensor:
        """Read prompts, forgetting what was read before.

        Args:
            prompts: Token ids, of unequal lengths.
            new: Most tokens that will follow.

        Returns:
            (B, V) logits of the next token.
        """

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token (B,) of every row; returns the logits (B, V) of the next."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch (ascending) only."""


class ModelDecoder:
    """A transformers model, by its own forward.

    Args:
        model: A model for which :func:`has_plain_cache` holds.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def start(self, prompts: Sequence[Sequence[int]], new: int) -> Tensor:
        """Read prompts; see :class:`Decoder`."""
        device = next(self._model.parameters()).device
        width = max(map(len, prompts))
        starts = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
        places = torch.arange(width + new, device=device)
        self._mask = (places >= starts[:, None]).long()
        self._starts, self._used = starts, width
        self._cache = _allocated_cache(self._model, width + new)
        # Which token fills up a prompt on its left is all the same: nothing looks at it.
        ids = [[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        positions = (places[:width] - starts[:, None]).clamp_(min=0)
        return self._forward(torch.tensor(ids, device=device), positions)

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token of every row; see :class:`Decoder`."""
        positions = (self._used - self._starts)[:, None]
        self._used += 1
        return self._forward(tokens[:, None], positions)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only; see :class:`Decoder`."""
        kept = torch.tensor(rows, device=self._starts.device)
        self._cache.batch_select_indices(kept)
        self._mask, self._starts = self._mask[kept], self._starts[kept]

    def _forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        output = self._model(
            input_ids=input_ids,
            attention_mask=self._mask[:, : self._used],
            position_ids=position_ids,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def has_plain_cache(model: Any) -> bool:
    """Whether keys and values of all tokens are all that a model's next step needs.

    They are not where layers carry a state or see a window only, where prompts are learned, and
    where a model prepares its inputs in a way of its own.
    """
    from transformers import DynamicCache, GenerationMixin
    from transformers.cache_utils import DynamicLayer

    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return False
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    prepare = getattr(type(base), "prepare_inputs_for_generation", None)
    if prepare is not GenerationMixin.prepare_inputs_for_generation:
        return False
    if not type(base).forward.__module__.startswith("transformers."):
        return False
    if getattr(base, "_is_stateful", False) or base.config.is_encoder_decoder:
        return False
    needed = {"input_ids", "attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
    if not needed <= set(inspect.signature(base.forward).parameters):
        return False
    layers = DynamicCache(config=base.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def with_half_weights(model: Any, dtype: torch.dtype | None) -> Any:
    """A copy whose matrices have the dtype that autocast would give them at every product.

    Embeddings, norms and biases are shared with the model, and so is everything where no matrix
    has another dtype: then the model itself is returned.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return model
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        shared = parameter.detach()
        if parameter.ndim == 2 and id(parameter) not in embeddings:
            shared = shared.to(dtype)
        memo[id(parameter)] = nn.Parameter(shared, requires_grad=False)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    if all(parameter.dtype == dtype for parameter in model.parameters() if parameter.ndim == 2):
        return model
    half = copy.deepcopy(model, memo)
    if isinstance(head, nn.Linear) and id(head.weight) in embeddings:  # tied
        base = half.get_base_model() if hasattr(half, "get_base_model") else half
        weight = nn.Parameter(head.weight.detach().to(dtype), requires_grad=False)
        base.get_output_embeddings().weight = weight
    return half


def _allocated_cache(model: Any, places: int) -> Any:
    from transformers import DynamicCache

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    cache = DynamicCache(config=base.config)
    cache.layers = [_cache_layer()(places) for _ in cache.layers]
    return cache


@functools.cache
def _cache_layer() -> Any:
    from transformers.cache_utils import DynamicLayer

    class AllocatedLayer(DynamicLayer):
        """Keys and values whose memory is there from the beginning: no step copies them."""

        def __init__(self, places: int) -> None:
            super().__init__()
            self.places = places

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            """Add the states of new tokens; returns those of all."""
            used = self.get_seq_length()
            end = used + key_states.shape[2]
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.all = [
                    states.new_empty(*states.shape[:2], self.places, states.shape[3])
                    for states in (key_states, value_states)
                ]
            for memory, states in zip(self.all, (key_states, value_states), strict=True):
                memory[:, :, used:end] = states
            self.keys, self.values = (memory[:, :, :end] for memory in self.all)
            return self.keys, self.values

        def batch_select_indices(self, indices: Tensor) -> None:
            """Keep these rows."""
            end = self.get_seq_length()
            self.all = [memory[indices] for memory in self.all]
            self.keys, self.values = (memory[:, :, :end] for memory in self.all)

    return AllocatedLayer
