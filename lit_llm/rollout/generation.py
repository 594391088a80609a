"""Sampling from a causal language model, in batches or token by token.

Legend: B batch, P prompt, R response.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig as TransformersConfig


@dataclass(frozen=True)
class GenerationConfig:
    """How to sample. Nothing else decides it: a model's own generation config is not read.

    Args:
        max_new_tokens: Most tokens to add to a prompt.
        temperature: Divides the logits; 0 takes the most likely token at every step.
        top_k: Sample from this many most likely tokens only; by default from all of them.
        top_p: Sample from the smallest set of most likely tokens that holds this much probability
            (nucleus sampling, https://arxiv.org/abs/1904.09751); 1 is off.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Refuse numbers that nothing can be sampled with."""
        if self.max_new_tokens < 1:
            raise UserError(
                f"generation: max_new_tokens must be at least 1, got {self.max_new_tokens}"
            )
        # Below that, logits divided by it overflow into NaN.
        if self.temperature != 0 and not 1e-3 <= self.temperature < math.inf:
            raise UserError(
                f"generation: temperature must be 0 (the most likely token) or at least 0.001, "
                f"got {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(
                f"generation: top_k must be at least 1, got {self.top_k}; leave it out for all "
                "tokens"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(
                f"generation: top_p must lie above 0 and be at most 1, got {self.top_p}; 1 is off"
            )


class Response(NamedTuple):
    """What a model answered.

    Attributes:
        ids: The sampled tokens, without the stop token (unless it was asked for) and what follows.
        stopped: Whether a stop token was sampled; otherwise the answer was cut off.
    """

    ids: list[int]
    stopped: bool


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    pad_token_id: int,
    stop_token_ids: Sequence[int],
    batch_size: int = 8,
    seed: int = 0,
    keep_stop_token: bool = False,
    stop_strings: Sequence[str] = (),
    tokenizer: Any = None,
) -> list[Response]:
    """Continue prompts in batches of similar length, with a key-value cache.

    Leaves no trace: the global random state and every module's train or eval mode are put back, and
    compiled blocks run eagerly, since each length would be compiled anew. Sampling depends on the
    seed and on all the prompts, as those of a batch share the random numbers; greedy answers
    (temperature 0) depend on their own prompt only.

    Args:
        model: A transformers causal language model, possibly wrapped by peft.
        prompts: Token ids of each prompt. Where prompt and ``config.max_new_tokens`` exceed the
            model's positions, the prompt loses its beginning; at least one token of it is kept.
        config: How to sample.
        pad_token_id: Fills up the shorter prompts of a batch on their left; masked everywhere.
        stop_token_ids: Tokens that end a response. Stop tokens within the prompt do not count.
        batch_size: Prompts to continue at once.
        seed: Seed of the sampling.
        keep_stop_token: Leave the token that ended a response at its end.
        stop_strings: Texts that end a response too, however they are cut into tokens. The response
            keeps the token that completed one, and with it the text, and what that token adds to
            it. Those within the prompt do not count.
        tokenizer: Reads the response for ``stop_strings``.

    Returns:
        One response a prompt, in the order of the prompts.

    Raises:
        UserError: A prompt is empty, or ``batch_size`` is below 1.
        ValueError: A stop string is empty, or no tokenizer was given to read them.
    """
    if batch_size < 1:
        raise UserError(f"generation: batch_size must be at least 1, got {batch_size}")
    if not all(stop_strings) or (stop_strings and tokenizer is None):
        raise ValueError("stop strings must not be empty, and need a tokenizer")
    kept, new = fit_prompts(model, prompts, config.max_new_tokens)
    settings = _settings(config, new, pad_token_id, stop_token_ids)
    responses: dict[int, Response] = {}
    # The longest first, so that a batch that does not fit into memory fails at once.
    order = sorted(range(len(kept)), key=lambda index: -len(kept[index]))
    with aside(model, seed):
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            texts = _StopStrings(stop_strings, tokenizer, len(kept[batch[0]]), len(batch))
            stops = [texts] if stop_strings else []
            output = _run(model, [kept[index] for index in batch], settings, stops=stops)
            for index, row, end in zip(batch, output.tolist(), texts.ends, strict=True):
                response = _cut(row[:end], stop_token_ids, keep_stop_token)
                responses[index] = response._replace(stopped=response.stopped or end is not None)
    return [responses[index] for index in range(len(kept))]


def stream(
    model: Any,
    prompt: Sequence[int],
    config: GenerationConfig,
    *,
    pad_token_id: int,
    stop_token_ids: Sequence[int],
    seed: int = 0,
) -> Generator[int, None, None]:
    """Continue one prompt and yield each token as it is sampled, without the stop token.

    The same tokens as those of :func:`generate` for this prompt alone. Closing the iterator ends
    the sampling. Until its end the global random state is not the caller's.

    Args:
        model: As for :func:`generate`.
        prompt: Token ids.
        config: How to sample.
        pad_token_id: The padding token.
        stop_token_ids: Tokens that end the response.
        seed: Seed of the sampling.

    Yields:
        Token ids.

    Raises:
        UserError: The prompt is empty.
    """
    (kept,), new = fit_prompts(model, [prompt], config.max_new_tokens)
    settings = _settings(config, new, pad_token_id, stop_token_ids)
    streamer, stops = _Streamer(), set(stop_token_ids)

    def sample() -> None:
        try:
            with aside(model, seed):
                _run(model, [kept], settings, streamer, [streamer.stop])
            streamer.tokens.put(None)
        except BaseException as error:  # raised again where the tokens are read
            streamer.tokens.put(error)

    thread = threading.Thread(target=sample, name="sampling", daemon=True)
    thread.start()
    try:
        while (token := streamer.tokens.get()) is not None:
            if isinstance(token, BaseException):
                raise token
            if token not in stops:
                yield token
    finally:
        streamer.cancelled = True
        thread.join()


def max_positions(model: Any) -> int | None:
    """Tokens that prompt and response may have together; ``None`` where the model has no limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


class _Streamer:
    """Hands tokens from the sampling thread to the one that reads them (a BaseStreamer)."""

    def __init__(self) -> None:
        self.tokens: queue.Queue[int | BaseException | None] = queue.Queue()
        self.cancelled = False
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Take the prompt first, then one token at a time."""
        if not self._prompt:
            self.tokens.put(int(value))
        self._prompt = False

    def end(self) -> None:
        """Nothing is held back."""

    def stop(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Stop every row once nobody reads any more (a StoppingCriteria)."""
        return torch.full((input_ids.shape[0],), self.cancelled, device=input_ids.device)


class _StopStrings:
    """Stops the rows whose response holds one of some texts (a StoppingCriteria).

    ``ends`` tells how many tokens each response had when it first did.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any, width: int, rows: int) -> None:
        self.ends: list[int | None] = [None] * rows
        self._strings, self._tokenizer, self._width = strings, tokenizer, width
        # A token holds a byte at least. One more, since SentencePiece takes the space off the first
        # word of what it decodes.
        self._tokens = 1 + max((len(string.encode()) for string in strings), default=0)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        count = input_ids.shape[1] - self._width
        for row, ids in enumerate(input_ids[:, self._width :][:, -self._tokens :].tolist()):
            if self.ends[row] is None:
                text = self._tokenizer.decode(ids, skip_special_tokens=False)
                if any(string in text for string in self._strings):
                    self.ends[row] = count
        return torch.tensor([end is not None for end in self.ends], device=input_ids.device)


def fit_prompts(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[list[list[int]], int]:
    """Cut prompts, and the length of the responses, to the model's positions.

    Args:
        model: A transformers causal language model, possibly wrapped by peft.
        prompts: Token ids of each prompt.
        max_new_tokens: Most tokens to add.

    Returns:
        The ends of the prompts that leave room, and how many tokens are added at most.

    Raises:
        UserError: A prompt is empty, or the model has no room for any token.
    """
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"generation: prompt {index} is empty; give at least one token")
    positions = max_positions(model)
    if positions is None:
        return [list(prompt) for prompt in prompts], max_new_tokens
    if positions < 2:
        raise UserError("generation: the model has one position only, so it can add no token")
    new = min(max_new_tokens, positions - 1)
    return [list(prompt[-(positions - new) :]) for prompt in prompts], new


def _settings(
    config: GenerationConfig, new: int, pad_token_id: int, stop_token_ids: Sequence[int]
) -> TransformersConfig:
    from transformers import GenerationConfig as TransformersConfig

    sampling: dict[str, Any] = {"do_sample": False}
    if config.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": config.temperature,
            "top_k": config.top_k or 0,  # 50 where nothing is said
            "top_p": config.top_p,
        }
    return TransformersConfig(
        max_new_tokens=new,
        use_cache=True,
        pad_token_id=pad_token_id,
        eos_token_id=list(stop_token_ids) or None,
        **sampling,
    )


def _run(
    model: Any,
    prompts: list[list[int]],
    settings: TransformersConfig,
    streamer: _Streamer | None = None,
    stops: Sequence[Any] = (),
) -> Tensor:
    """Continue one batch: the sampled tokens (B, R), stopped rows filled up with padding."""
    from transformers import StoppingCriteriaList

    width = max(map(len, prompts))
    device = next(model.parameters()).device
    pad = settings.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),  # transformers derives the position ids from it
        generation_config=settings,
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList(stops),
    )
    return output[:, width:]


@contextmanager
def aside(model: Any, seed: int = 0) -> Iterator[None]:
    """Sample without a trace in the training: its random numbers, modes and compiled graphs."""
    from transformers import GenerationConfig as TransformersConfig

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # What a generation config leaves open, transformers fills in from the model's own.
    own, base.generation_config = base.generation_config, TransformersConfig()
    modes = {module: module.training for module in model.modules()}
    model.eval()  # gradient checkpointing, too, would turn the cache off in train mode
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            torch.manual_seed(seed)
            yield
    finally:
        base.generation_config = own
        for module, mode in modes.items():
            module.training = mode


def _cut(row: list[int], stop_token_ids: Sequence[int], keep_stop_token: bool) -> Response:
    """Truncate at the first stop token, whatever follows it."""
    stops = set(stop_token_ids)
    end = next((place for place, token in enumerate(row) if token in stops), None)
    kept = end + 1 if end is not None and keep_stop_token else end
    return Response(row[:kept], end is not None)
