"""Rewards of responses: reward models, rules and functions, several of them weighted.

Legend: N samples.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lit_llm.errors import UserError
from lit_llm.modules.scoring_model import ScoringModel
from lit_llm.rollout.rewards import (
    RewardSample,
    load_reward_function,
    rule_names,
    score_samples,
)


@dataclass
class RewardConfig:
    """One reward: a model's score, or a function's.

    Args:
        model: Folder of a reward model, or its name on the Hugging Face Hub: any model of
            transformers that scores or classifies whole texts. One with the policy's own tokenizer
            and chat template reads the tokens as they were sampled, any other the text: through its
            own chat template, where it has one, or else the prompt and the response as a pair of
            texts, or as one text where a plain text was continued. The scores of a reward model of
            ours have the mean 0 and the standard deviation 1 on its validation split.
        function: In place of a model, a function: the name of a rule (``exact_match``,
            ``length_window``, ``regex``), ``file.py:function`` or ``package.module:function``. It
            gets a list of samples (``lit_llm.rollout.rewards.RewardSample``) and returns one number
            for each.
        options: The function's arguments after the samples, by name, e.g. ``{longest: 100}``.
        weight: Factor of the scores in the sum of all rewards. Negative ones turn a reward round,
            0 only logs it.
        name: Name in logs and reports; by default that of the folder or the function.
        label: Of a classifier with several classes, the one whose log-probability is the score: its
            number or its name.
    """

    model: str | None = None
    function: str | None = None
    options: dict[str, Any] | None = None
    weight: float = 1.0
    name: str | None = None
    label: int | str | None = None

    def __post_init__(self) -> None:
        """Refuse what can be no reward."""
        if (self.model is None) == (self.function is None):
            raise UserError("a reward needs either a model or a function; give one of them.")
        told = f"reward {self.own_name}"
        if self.options and self.model is not None:
            raise UserError(f"{told}: options are a function's; a model has none.")
        if self.label is not None and self.function is not None:
            raise UserError(f"{told}: a label belongs to a classifier; a function has none.")
        if not math.isfinite(self.weight):
            raise UserError(f"{told}: the weight must be a finite number, got {self.weight}.")
        if self.name is not None and not re.fullmatch(r"[\w.-]+", self.name):
            raise UserError(
                f"{told}: a name is a part of the names of metrics; use letters, digits, '_', '-' "
                "and '.'."
            )

    @property
    def own_name(self) -> str:
        """The name given, or one from the folder or the function."""
        if self.name is not None:
            return self.name
        if self.function is not None:
            return self.function.rpartition(":")[2]
        folder = Path(str(self.model)).expanduser()
        # Stages export to "runs/NAME/model".
        parts = [part for part in folder.parts if part not in ("model", "..", folder.anchor)]
        return re.sub(r"[^\w.-]+", "-", parts[-1]) if parts else "model"


def as_rewards(rewards: Sequence[RewardConfig | dict[str, Any] | str]) -> list[RewardConfig]:
    """Rewards from what a command line or a checkpoint says of them.

    Args:
        rewards: Each a config, its fields, or one text: a folder of a reward model or its name on
            the Hugging Face Hub (``organisation/name``), the name of a rule, or a function.

    Raises:
        UserError: A text that is none of these, or a config of something that can be no reward.
    """
    return [
        _from_text(one)
        if isinstance(one, str)
        else (RewardConfig(**one) if isinstance(one, dict) else one)
        for one in rewards
    ]


def _from_text(text: str) -> RewardConfig:
    if text.lstrip().startswith(("[", "{")):
        names = ", ".join(field.name for field in fields(RewardConfig))
        raise UserError(
            f"reward {text!r}: these are not the fields of a reward, or hold a value of the wrong "
            f"kind; the fields are {names}."
        )
    if text and Path(text).expanduser().is_dir():
        return RewardConfig(model=text)
    if ":" in text or text in rule_names():
        return RewardConfig(function=text)
    if text.count("/") == 1 and not text.startswith((".", "~")) and not text.endswith(".py"):
        return RewardConfig(model=text)
    raise UserError(
        f"reward {text!r}: there is no such folder of a reward model, and no such rule "
        f"({', '.join(rule_names())}); a function of your own is 'file.py:function' or "
        "'package.module:function'."
    )


class RewardScores(NamedTuple):
    """Scores of samples, on the CPU.

    Attributes:
        total: (N,) float32, the weighted sum of all rewards.
        parts: Each reward by its name, (N,) float32, without its weight.
    """

    total: Tensor
    parts: dict[str, Tensor]


def reward_names(configs: Sequence[RewardConfig]) -> list[str]:
    """A name for each reward; those that would share one are numbered.

    Raises:
        UserError: Two were given the same name.
    """
    given = [config.name for config in configs if config.name is not None]
    if twice := [name for name in given if given.count(name) > 1]:
        raise UserError(f"two rewards have the name {twice[0]!r}; give each its own.")
    names: list[str] = []
    for config in configs:
        taken = {*names, *given} if config.name is None else set()
        name, number = config.own_name, 2
        while name in taken:
            name, number = f"{config.own_name}_{number}", number + 1
        names.append(name)
    return names


class Rewards(nn.Module):
    """All rewards of a run: samples in, scores out.

    Its models are frozen submodules, in evaluation mode whatever mode the training is in.

    Args:
        configs: The rewards; none give scores of 0.
        tokenizer: The policy's.
        max_length: Most tokens that prompt and response have together; none means not known.
        batch_size: Texts that a model scores at once.
        dtype: Data type of the models' weights, and of what they compute, mixed precision or not.

    Raises:
        UserError: A reward cannot be loaded, or two have one name.
    """

    def __init__(
        self,
        configs: Sequence[RewardConfig],
        *,
        tokenizer: Any,
        max_length: int | None = None,
        batch_size: int = 16,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"rewards: batch_size must be at least 1, got {batch_size}.")
        self.names = reward_names(configs)
        self.weights = [config.weight for config in configs]
        self._scorers: list[Callable[[Sequence[RewardSample]], Tensor]] = []
        models: list[Any] = []
        for name, config in zip(self.names, configs, strict=True):
            if config.function is not None:
                function = load_reward_function(config.function, config.options)
                self._scorers.append(partial(score_samples, name, function))
                continue
            scorer = ScoringModel(
                name,
                str(config.model),
                label=config.label,
                tokenizer=tokenizer,
                max_length=max_length,
                batch_size=batch_size,
                dtype=dtype,
            )
            self._scorers.append(scorer)
            models.append(scorer.model)
        self.models = nn.ModuleList(models).requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Rewards":
        """Stay in evaluation mode: dropout would blur the scores."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, samples: Sequence[RewardSample]) -> RewardScores:
        """Score samples by all rewards.

        Args:
            samples: N samples.

        Returns:
            The weighted sum and the rewards it is made of.

        Raises:
            UserError: A reward fails, or gives something else than one finite number a sample.
        """
        parts: dict[str, Tensor] = {}
        mistakes: list[UserError] = []
        for name, score in zip(self.names, self._scorers, strict=True):
            try:
                parts[name] = score(samples)
            except UserError as error:  # other ranks go on, and may need this one's weights
                mistakes.append(error)
        if mistakes:
            raise mistakes[0]
        total = torch.zeros(len(samples), dtype=torch.float32)
        for weight, values in zip(self.weights, parts.values(), strict=True):
            total += weight * values
        return RewardScores(total, parts)
