"""The built-in rollout engine: a batched sampling loop with a key-value cache.

Legend: B batch, P prompt, R response, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_llm.errors import UserError
from lit_llm.rollout.decoders import Decoder, ModelDecoder, has_plain_cache, with_half_weights
from lit_llm.rollout.draws import choose, uniforms
from lit_llm.rollout.engine import TransformersEngine, mixed_precision
from lit_llm.rollout.generation import GenerationConfig, Response, aside, fit_prompts
from lit_llm.rollout.llama import LlamaDecoder, llama_like

_log = logging.getLogger(__name__)
_WORTH_DROPPING = 0.75  # of the batch: with no more rows going on, the others leave it


class SamplingEngine:
    """Samples in a loop of its own, faster than ``generate``, and each row by itself.

    The token of a row at some step depends on its prompt, its seed and the step only: not on the
    batch size, the order, the other prompts or the number of ranks (up to the rounding of logits,
    which other shapes change in the last digits). Architectures whose next step needs more than
    keys and values go to :class:`~lit_llm.rollout.engine.TransformersEngine`.

    Args:
        pad_token_id: Fills up shorter prompts; masked everywhere.
        stop_token_ids: Tokens that end a response.
        batch_size: Prompts to answer at once.
        dtype: What products are computed in; ``None`` is the weights' own.
        in_place: Sample by the model's own forward, which other ranks take part in: none of them
            stops before all can.

    Raises:
        UserError: ``batch_size`` is below 1; or ``in_place`` does not go with the model.
    """

    def __init__(
        self,
        *,
        pad_token_id: int,
        stop_token_ids: Sequence[int],
        batch_size: int,
        dtype: torch.dtype | None = None,
        in_place: bool = False,
    ) -> None:
        self._in_place = in_place
        if batch_size < 1:
            raise UserError(f"generation: batch_size must be at least 1, got {batch_size}")
        self._pad = pad_token_id
        self._stops = set(stop_token_ids)
        self._batch_size = batch_size
        self._dtype = dtype
        self._fallback = TransformersEngine(
            pad_token_id=pad_token_id,
            stop_token_ids=stop_token_ids,
            batch_size=batch_size,
            dtype=dtype,
        )
        self._model: Any = None
        self._decoder: Decoder | None = None
        self._told = False

    def load(self, model: Any) -> None:
        """Take the policy's weights as they are now; see :class:`RolloutEngine`."""
        self.release()
        self._model = model
        if self._in_place:
            if not has_plain_cache(model):
                raise UserError(
                    f"{type(model).__name__} needs more than keys and values to go on, so it "
                    "cannot be sampled from sharded weights; set model.ppo.sharded_rollouts to "
                    "false, or take another strategy (ddp)"
                )
            self._decoder = ModelDecoder(model)
            return
        if not has_plain_cache(model):
            self._tell()
            self._fallback.load(model)
            return
        with torch.no_grad():
            if llama_like(model):
                self._decoder = LlamaDecoder(model, self._dtype)
            else:
                self._model = with_half_weights(model, self._dtype)
                self._decoder = ModelDecoder(self._model)

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            _log.warning(
                "Responses are sampled by transformers' generate, as this architecture needs more "
                "than keys and values: they depend on the batch, so on the number of devices too."
            )

    def release(self) -> None:
        """Give back what ``load`` took."""
        self._model = self._decoder = None
        self._fallback.release()

    def generate(
        self, prompts: Sequence[Sequence[int]], config: GenerationConfig, *, seeds: Sequence[int]
    ) -> list[Response]:
        """Answer prompts; see :class:`RolloutEngine`.

        Raises:
            UserError: A prompt is empty.
        """
        if self._decoder is None:
            return self._fallback.generate(prompts, config, seeds=seeds)
        kept, new = fit_prompts(self._model, prompts, config.max_new_tokens)
        draws = uniforms(seeds, new)
        responses: dict[int, Response] = {}
        # The longest first, so that a batch that does not fit into memory fails at once.
        order = sorted(range(len(kept)), key=lambda index: -len(kept[index]))
        with self._aside():
            for first in range(0, len(order), self._batch_size):
                batch = order[first : first + self._batch_size]
                rows = self._answer([kept[index] for index in batch], config, draws[batch])
                responses.update(zip(batch, rows, strict=True))
        return [responses[index] for index in range(len(kept))]

    @contextmanager
    def _aside(self) -> Iterator[None]:
        device = next(self._model.parameters()).device.type
        with ExitStack() as stack:
            if isinstance(self._decoder, ModelDecoder):
                stack.enter_context(aside(self._model))
                stack.enter_context(mixed_precision(self._model, self._dtype, device))
            else:  # has weights and cache of its own, and runs no module
                stack.enter_context(torch.inference_mode())
                stack.enter_context(torch.autocast(device, enabled=False))
            yield

    def _answer(
        self, prompts: list[list[int]], config: GenerationConfig, draws: Tensor
    ) -> list[Response]:
        """Answer one batch, with random numbers (B, R)."""
        assert self._decoder is not None
        answers: list[list[int]] = [[] for _ in prompts]
        batch = list(range(len(prompts)))  # the rows that the decoder works on
        logits = self._decoder.start(prompts, draws.shape[1])
        draws = draws.to(logits.device)
        for step in range(draws.shape[1]):
            tokens = choose(logits, config, draws[:, step, None])
            for row, token in zip(batch, tokens.tolist(), strict=True):
                if not self._has_ended(answers[row]):
                    answers[row].append(token)
            going = [place for place, row in enumerate(batch) if not self._has_ended(answers[row])]
            if step + 1 == draws.shape[1] or not self._anybody(bool(going), logits.device):
                break
            going = going or [0]  # the other ranks need this one's part of the weights
            if len(going) <= _WORTH_DROPPING * len(batch):
                self._decoder.keep(going)
                tokens, draws, batch = tokens[going], draws[going], [batch[i] for i in going]
            logits = self._decoder.step(tokens)
        return [Response(ids, self._has_ended(ids)) for ids in answers]

    def _anybody(self, goes_on: bool, device: torch.device) -> bool:
        """Whether a rank goes on, where they have to go on together."""
        if not (self._in_place and dist.is_initialized()):
            return goes_on
        flag = torch.tensor(int(goes_on), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def _has_ended(self, answer: list[int]) -> bool:
        return bool(answer) and answer[-1] in self._stops
