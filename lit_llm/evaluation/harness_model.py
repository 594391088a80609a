"""A model in memory behind lm-evaluation-harness: its whole task library without a round trip.

The encodings are those of the harness's own ``hf`` model, so the scores are too. Import this module
inside functions only: it needs the extra ``eval``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.utils import postprocess_generated_text, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lit_llm.data.token_cache import tokenizer_hash
from lit_llm.errors import UserError
from lit_llm.evaluation.answer_settings import answer_settings
from lit_llm.evaluation.harness import ContextTooShortError
from lit_llm.evaluation.harness_encoding import HarnessEncoding
from lit_llm.evaluation.windows import (
    Item,
    Result,
    Window,
    WindowScore,
    batches,
    dealt,
    score_windows,
)
from lit_llm.rollout.engine import mixed_precision
from lit_llm.rollout.generation import GenerationConfig, generate

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

# Decoding keeps the keys and values of all tokens, which take less memory than what scoring has to
# hold for as many: so many times ``batch_tokens`` may be kept.
_CACHED = 4


class HarnessModel(HarnessEncoding):
    """A transformers model in memory, as lm-evaluation-harness wants one.

    Scores and answers are those of the harness's ``hf`` model in the same precision, with these
    differences: log-probabilities are taken in float32 whatever the weights are held in;
    continuations that let the model read the same tokens but begin at different places are each
    scored at their own (0.4.13 of the harness mixes them up); an answer ends at its first stop
    string even where that is a special token; and the model's own generation settings (a repetition
    penalty, say) do not count, but for its stop tokens.

    Towards the harness there is one rank: every process builds all requests, and this class deals
    them out and gathers the results, so that every process has them all.

    Paper of the harness: https://arxiv.org/abs/2405.14782.

    Args:
        model: A causal language model, possibly wrapped by peft, compiled, or in training: it is
            left as it was.
        tokenizer: Its tokenizer; nothing in it is changed.
        batch_tokens: Most tokens that go through the model at once, with padding.
        max_length: Most tokens the model reads; by default its positions.
        max_gen_toks: Most tokens of an answer, where the task does not say.
        dtype: What products are computed in, by autocast where the weights have another type;
            ``None`` is the weights' own.
        ranks: Group of processes that share the work; ``None`` for this process alone.
        seed: Seed of the answers that are sampled.

    Raises:
        UserError: The tokenizer has no token to begin a text with, or there is no room for text.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 4096,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        dtype: torch.dtype | None = None,
        ranks: Any = None,
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer)
        self.model = getattr(model, "_orig_mod", model)  # of torch.compile(model)
        self.batch_tokens = batch_tokens
        self.max_length = max_length or resolve_max_length(self.model.config, tokenizer)
        self.max_gen_toks = max_gen_toks
        self.dtype = dtype
        self.ranks = ranks
        self.seed = seed
        self._scored: list[Instance] = []
        self.stopped: list[bool] = []
        """Of the last answers, in the order of the requests: which ended by themselves."""
        self._device = next(self.model.parameters()).device
        if self.max_length < 2:
            raise UserError(
                f"the model's context of {self.max_length} tokens is too short to evaluate"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What beside its weights decides what it gives; not how many rows go through at once."""
        config = self.model.config.to_dict()
        tokens = self.tokenizer
        return {
            "tokenizer": tokenizer_hash(tokens),
            "special": [tokens.bos_token_id, tokens.eos_token_id, tokens.chat_template],
            # Such as the scaling of positions; not where it was loaded from.
            "config": {name: own for name, own in config.items() if name != "_name_or_path"},
            "stops": getattr(self.model.generation_config, "eos_token_id", None),
            "max_length": self.max_length,
            "max_gen_toks": self.max_gen_toks,
            "dtype": str(self.dtype),
            "seed": self.seed,
            "versions": [version(name) for name in ("lm_eval", "transformers", "torch")],
        }

    # ----- scores -------------------------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation given its context, in nats.

        Args:
            requests: With arguments ``(context, continuation)``.
            disable_tqdm: Show no progress.

        Returns:
            For each request the log-probability, and whether every token of the continuation was
            the most likely one.

        Raises:
            UserError: A continuation is empty.
            ContextTooShortError: One is longer than the model's context.
        """
        for request in requests:
            if request.args == ("", ""):
                raise UserError(f"{_named(request)}: the continuation to score is empty")
        self._scored = requests
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        windows = []
        for request, (_texts, context, continuation) in zip(self._scored, requests, strict=True):
            if not continuation:
                raise UserError(
                    f"{_named(request)}: the continuation {request.args[1]!r} adds no token to its "
                    "context"
                )
            if len(continuation) > self.max_length:
                raise ContextTooShortError(
                    f"{_named(request)}: the continuation has {len(continuation)} tokens, but the "
                    f"model's context is {self.max_length}; take a model with a longer one"
                )
            ids = (context + continuation)[-(self.max_length + 1) :]
            windows.append(Window(ids, len(continuation)))
        results = [(-score.nll, score.greedy) for score in self._score(windows)]
        for (texts, *_rest), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-probability of each text as a whole, in nats, from windows that do not overlap.

        Args:
            requests: With arguments ``(text,)``.
            disable_tqdm: Of no effect.
        """
        windows: list[Window] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, pairs):
                windows.append(Window(context + continuation, len(continuation)))
                owners.append(number)
        results = [0.0] * len(requests)
        for number, score in zip(owners, self._score(windows), strict=True):
            results[number] -= score.nll
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def token_scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """Log-probabilities of given tokens after given tokens, in nats; 0 of none.

        Args:
            pairs: Ids of context and continuation; the context may not be empty. Where both are
                longer than the model's context, their beginning is not read, nor scored.
        """
        windows = []
        for context, continuation in pairs:
            ids = (context + continuation)[-(self.max_length + 1) :]
            if continuation:
                windows.append(Window(ids, min(len(continuation), len(ids) - 1)))
        scores = iter(self._score(windows))
        return [-next(scores).nll if continuation else 0.0 for _, continuation in pairs]

    def dealt(
        self, work: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item]
    ) -> list[Result]:
        """Let each rank do its share, and all have all results, as :func:`windows.dealt` does.

        Args:
            work: Gives one result an item, in their order.
            items: The same on every rank.
        """
        return dealt(work, items, self.ranks)

    def _score(self, windows: Sequence[Window]) -> list[WindowScore]:
        return score_windows(
            self.model,
            windows,
            pad_token_id=self.pad_token_id,
            batch_tokens=self.batch_tokens,
            dtype=self.dtype,
            ranks=self.ranks,
        )

    # ----- answers ------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Answer each context, up to a stop string, a stop token or the longest length allowed.

        A context too long to leave room for the answer loses its beginning. ``stopped`` keeps which
        answers ended by themselves.

        Args:
            requests: With arguments ``(context, settings)``: ``until``, ``max_gen_toks``,
                ``do_sample``, ``temperature``, ``top_p`` and ``top_k``.
            disable_tqdm: Of no effect.

        Returns:
            The answers, without what ended them.

        Raises:
            UserError: There is no room for an answer in the model's context, or a setting is not
                one of those.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        found: dict[int, tuple[str, bool]] = {}
        for numbers in groups.values():
            config, until = answer_settings(
                requests[numbers[0]].args[1],
                eos=self.eos_text,
                max_length=self.max_length,
                max_gen_toks=self.max_gen_toks,
                task=_named(requests[numbers[0]]),
            )
            room = self.max_length - config.max_new_tokens
            prompts = [(n, self.tok_encode(requests[n].args[0])[-room:]) for n in numbers]
            prompts.sort(key=lambda prompt: -len(prompt[1]))
            answer = partial(self._answer, config=config, until=until)
            answers = self.dealt(answer, prompts)
            found.update(zip((number for number, _ in prompts), answers, strict=True))
        results = [found[number] for number in range(len(requests))]
        self.stopped = [stopped for _, stopped in results]
        for request, (text, _) in zip(requests, results, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return [text for text, _ in results]

    def _answer(
        self, prompts: Sequence[tuple[int, list[int]]], config: GenerationConfig, until: list[str]
    ) -> list[tuple[str, bool]]:
        """Answers, and whether they ended by themselves, to prompts with their numbers."""
        # EOS, and what the model's own generation settings stop at: the end of a turn, say.
        own = getattr(self.model.generation_config, "eos_token_id", None)
        ids = [self.eot_token_id, *(own if isinstance(own, list) else [own])]
        stops = sorted({token for token in ids if token is not None})
        # Bound by what is read at once, and by what is kept until all answers have ended.
        sizes = [
            max(len(ids), -(-(len(ids) + config.max_new_tokens) // _CACHED)) for _, ids in prompts
        ]
        found = []
        for batch in batches(prompts, sizes, self.batch_tokens):
            with mixed_precision(self.model, self.dtype, self._device.type):
                responses = generate(
                    self.model,
                    [ids or [self.prefix_token_id] for _, ids in batch],
                    config,
                    pad_token_id=self.pad_token_id,
                    stop_token_ids=stops,
                    batch_size=len(batch),
                    # Prompts may repeat: equal batches must not draw equal answers.
                    seed=hash((self.seed, batch[0][0])) % 2**63,
                    stop_strings=until,
                    tokenizer=self.tokenizer,
                )
            for response, stopped in responses:
                text = self.tokenizer.decode(response, skip_special_tokens=True)
                found.append((postprocess_generated_text(text, until, None), stopped))
        return found


def _named(request: Instance) -> str:
    """Name of the task and number of the item."""
    if request.task_name is None:
        return "evaluation"
    return f"task {request.task_name}, item {request.doc_id}"
