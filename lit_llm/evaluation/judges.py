"""Judges: which of two answers is better, by a reward model, a function or a model behind a URL.

Legend: N pairs.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch

from lit_llm.errors import UserError
from lit_llm.evaluation.responses import preferred
from lit_llm.modules.rewards import RewardConfig, Rewards, as_rewards
from lit_llm.rollout.rewards import RewardSample, find_function


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, in the order a judge sees them.

    Attributes:
        prompt: What the user says last, or the plain text that is continued.
        first: An answer.
        second: Another one.
        messages: The conversation up to the answers; ``None`` where a plain text is continued.
        reference: The right answer, where there is one.
        stopped: Whether the first and the second answer ended by themselves.
    """

    prompt: str
    first: str
    second: str
    messages: list[dict[str, Any]] | None = None
    reference: str | None = None
    stopped: tuple[bool, bool] = (True, True)


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a pair.

    Attributes:
        score: 1 where the first answer is better, 0 where the second is, 0.5 for a tie.
        raw: What it was read from: a reply, or scores.
        readable: Whether it could be; otherwise the score is 0.5.
    """

    score: float
    raw: str = ""
    readable: bool = True


class Judge(Protocol):
    """Says which of two answers is better.

    Attributes:
        name: Name in reports.
        sees_order: Whether it is shown one answer after the other, so that the order may decide.
    """

    name: str
    sees_order: bool

    def judge(self, pairs: Sequence[Pair]) -> Sequence[Verdict]:
        """A verdict for each pair, in their order."""


def build_judge(
    spec: str,
    *,
    options: Mapping[str, Any] | None = None,
    label: int | str | None = None,
    batch_size: int = 16,
    device: str | None = None,
    model: str | None = None,
    concurrency: int = 4,
    timeout: float = 120.0,
) -> Judge:
    """A judge from what a command line says of it.

    Args:
        spec: A folder of a reward model, or its name on the Hugging Face Hub; a function,
            ``file.py:function`` or ``package.module:function``, or the name of a rule; or the
            address of an OpenAI-compatible endpoint, ``http://host:8000/v1``. A function that takes
            ``(prompt, first, second)`` is asked about pairs: 1 where the first is better, 0 where
            the second is, 0.5 for a tie. Any other is a reward, as PPO takes them: a list of
            samples in, one number each out, the higher the better.
        options: More arguments of a function, by name.
        label: Of a classifier with several classes, the one whose log-probability is the score.
        batch_size: Answers that a reward model scores at once.
        device: Where a reward model is; by default the GPU where there is one.
        model: Model behind an endpoint; by default the one it has.
        concurrency: Requests to an endpoint at once.
        timeout: Seconds that an endpoint may take for a request.

    Raises:
        UserError: There is no such judge, it does not take these options, or the endpoint does not
            answer.
    """
    if spec.startswith(("http://", "https://")):
        if options or label is not None:
            raise UserError(f"judge {spec}: an endpoint takes neither options nor a label.")
        from lit_llm.evaluation.judge_openai import EndpointJudge

        return EndpointJudge(spec, model=model, concurrency=concurrency, timeout=timeout)
    if model is not None:
        raise UserError(
            f"judge {spec!r}: a judge model ({model!r}) is that of an endpoint, which begins "
            "with http:// or https://."
        )
    try:
        (config,) = as_rewards([spec])
        config = dataclasses.replace(config, options=dict(options or {}) or None, label=label)
        if config.function is not None and ":" in config.function:
            function = find_function(config.function)
            if _takes_pairs(function, config.options or {}):
                return FunctionJudge(config, function)
        return RewardJudge(config, batch_size=batch_size, device=device)
    except UserError as error:
        # The sentences are those of rewards, which say what is wrong and what may stand there.
        told = str(error)
        for kind in ("reward function", "reward"):
            if told.startswith(f"{kind} "):
                raise UserError(f"judge {told.removeprefix(kind).lstrip()}") from error
        raise UserError(f"judge {spec!r}: {told}") from error


class RewardJudge:
    """Scores both answers by a reward of PPO: a model, a rule, or a function of samples.

    The order of the answers plays no part. A model reads text, through its own tokenizer and chat
    template, whatever wrote the answers.

    Args:
        config: The reward.
        batch_size: Answers that a model scores at once.
        device: Where the model is; by default the GPU where there is one.

    Raises:
        UserError: The reward cannot be loaded.
    """

    sees_order = False

    def __init__(
        self, config: RewardConfig, *, batch_size: int = 16, device: str | None = None
    ) -> None:
        self.name = config.own_name
        self._rewards = Rewards([config], tokenizer=_NoTokenizer(), batch_size=batch_size)
        self._rewards.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """The higher score is better; scores that differ by rounding only are a tie.

        Args:
            pairs: N pairs.

        Raises:
            UserError: The reward fails, or gives something else than one finite number an answer.
        """
        samples = [
            RewardSample(
                pair.prompt, text, _NoIds(), _NoIds(), stopped, pair.messages, pair.reference
            )
            for pair in pairs
            for text, stopped in zip((pair.first, pair.second), pair.stopped, strict=True)
        ]
        scores = self._rewards(samples).total.tolist() if samples else []
        verdicts = []
        for first, second in zip(scores[::2], scores[1::2], strict=True):
            verdicts.append(Verdict(preferred(first, second), f"{first:.6g}, {second:.6g}"))
        return verdicts


class FunctionJudge:
    """A function of the user's own: ``function(prompt, first, second)`` to a number from 0 to 1.

    Above one half the first answer wins, below it the second.

    Args:
        config: Its path and options.
        function: The function.

    Raises:
        UserError: It does not take the options.
    """

    sees_order = True

    def __init__(self, config: RewardConfig, function: Callable[..., Any]) -> None:
        self.name = config.own_name
        self._function = function
        self._options = dict(config.options or {})
        try:
            inspect.signature(function).bind("", "", "", **self._options)
        except TypeError as error:
            raise UserError(f"reward function {config.function}: {error}.") from error

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Ask about one pair after the other.

        Args:
            pairs: N pairs.

        Raises:
            UserError: The function fails, or gives something else than a number from 0 to 1.
        """
        verdicts = []
        for pair in pairs:
            try:
                given = self._function(pair.prompt, pair.first, pair.second, **self._options)
            except Exception as error:
                problem = f"failed with {type(error).__name__}: {' '.join(str(error).split())}"
                self._fail(problem, pair, error)
            try:
                value = math.nan if isinstance(given, str | bytes) else float(given)
            except (TypeError, ValueError, RuntimeError):
                value = math.nan
            if not 0 <= value <= 1:
                self._fail(
                    f"gave {given!r:.80}, where 1 (the first answer is better), 0 (the second) or "
                    "0.5 (a tie) is wanted",
                    pair,
                )
            # How sure it is does not count: a pair is won, lost or neither.
            verdicts.append(Verdict(preferred(value, 0.5), f"{value:.6g}"))
        return verdicts

    def _fail(self, problem: str, pair: Pair, cause: Exception | None = None) -> NoReturn:
        shown = f"the prompt is {pair.prompt!r:.160}"
        raise UserError(f"judge {self.name}: {problem}; {shown}.") from cause


def _takes_pairs(function: Callable[..., Any], options: Mapping[str, Any]) -> bool:
    """Whether a function takes a prompt and two answers, and not a list of samples."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # what is written in C may not say
        return False
    wanted = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [
        one
        for one in parameters
        if one.kind in wanted and one.default is one.empty and one.name not in options
    ]
    return len(needed) == 3


class _NoTokenizer:
    """Has no token of any reward model, which therefore reads text."""

    pad_token: None = None
    chat_template: None = None

    def get_vocab(self) -> dict[str, int]:
        return {}


class _NoIds(list[int]):
    """Token ids of an answer of which only the text is known; no reward may take it for empty."""

    def _refuse(self, *_: Any) -> NoReturn:
        raise UserError(
            "a judge is given texts without their token ids; use a reward that reads text, such as "
            "length_window with unit: words"
        )

    __len__ = __iter__ = __getitem__ = __bool__ = _refuse
