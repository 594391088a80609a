"""Reward models: how good a text is, as one number or several.

Legend: N texts, T sequence, D width, H heads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llm.errors import UserError
from lit_llm.models.adapters import STATISTICS, unwrap
from lit_llm.models.build import build_model
from lit_llm.models.config import BaseModelConfig
from lit_llm.models.forward import hidden_states
from lit_llm.models.pretrained import Quantization, load_config
from lit_llm.models.score_head import HEAD, is_classifier_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Aggregation = Literal["mean", "min", "mean_minus_std"]


def build_reward_model(
    config: BaseModelConfig,
    *,
    heads: int = 1,
    seq_len: int | None = None,
    quantization: Quantization | None = None,
    **vocabulary: int | None,
) -> PreTrainedModel:
    """A model that scores whole texts: transformers' sequence classifier of the architecture.

    The weights of a causal language model get a new head, normal with a standard deviation of
    ``1 / sqrt(D + 1)`` (Stiennon et al. 2020, https://arxiv.org/abs/2009.01325). A reward model's
    folder keeps its own, but not its statistics: they are not those of a model that is trained on.
    :func:`load_reward_models` loads a model to be used.

    Args:
        config: A causal language model or a reward model, as for :func:`build_model`.
        heads: How many scores it gives. Several heads on one backbone are a cheap ensemble.
        seq_len: Longest sequence to be fed.
        quantization: Load pretrained weights in 4 bits, to train adapters on; the head stays whole.
        vocabulary: Size and special ids of the tokenizer, see :func:`vocabulary_of`.

    Returns:
        The model in train mode; :func:`score` runs it.

    Raises:
        UserError: As for :func:`build_model`; or transformers cannot score texts with this
            architecture, or the folder is that of a reward model with other heads.
    """
    model = build_model(
        config, heads=heads, seq_len=seq_len, quantization=quantization, **vocabulary
    )
    for field in STATISTICS:
        vars(model.config).pop(field, None)
    return model


def score(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Scores of whole texts, read at the last real token of each.

    transformers' own forward looks for the last token that is not padding by its id; here the mask
    says it, so the score depends neither on which token pads nor on side and amount of padding.

    Args:
        model: A model of :func:`build_reward_model`, possibly wrapped by peft.
        input_ids: (N, T) token ids.
        attention_mask: (N, T), 1 for real tokens and 0 for padding on either side; at least one 1
            in each row.

    Returns:
        (N, H) float32 scores (float64 of a float64 model).
    """
    hidden = hidden_states(model, input_ids, attention_mask)
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (attention_mask.to(places.dtype) * places).amax(1)
    hidden = hidden[torch.arange(len(last), device=last.device), last]
    head: Any = getattr(unwrap(model), HEAD)
    # In half precision scores that differ by little would be ties.
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.to(wide)
        return F.linear(hidden.to(wide), head.weight.to(wide), bias)


@dataclass(frozen=True)
class RewardStatistics:
    """The scale of a reward model's scores, and how its heads become one reward.

    Args:
        mean: Mean score of each head on some reference texts.
        std: Standard deviation of each head's scores there, positive.
        aggregation: What becomes of several heads: their ``mean``, the ``min``, or the mean less
            the standard deviation between them (``mean_minus_std``), which trusts a reward less
            where the heads disagree (Coste et al. 2023, https://arxiv.org/abs/2310.02743).
    """

    mean: list[float]
    std: list[float]
    aggregation: Aggregation = "mean"

    def __post_init__(self) -> None:
        lists = isinstance(self.mean, list) and isinstance(self.std, list)
        if (
            not lists
            or len(self.mean) != len(self.std)
            or not all(map(math.isfinite, [*self.mean, *self.std]))
            or not all(value > 0 for value in self.std)
            or self.aggregation not in get_args(Aggregation)
        ):
            raise UserError(
                f"reward statistics {asdict(self)}: give a mean and a positive standard deviation "
                f"for each head, and an aggregation of {', '.join(get_args(Aggregation))}."
            )


def standardised(scores: Tensor, statistics: RewardStatistics) -> Tensor:
    """Rewards on a scale of their own: every head to mean 0 and deviation 1, then aggregated.

    Args:
        scores: (N, H) scores of :func:`score`.
        statistics: The model's.

    Returns:
        (N,) rewards.

    Raises:
        ValueError: The statistics are those of another number of heads.
    """
    if scores.dim() != 2 or scores.shape[1] != len(statistics.mean):
        raise ValueError(
            f"scores must be (N, {len(statistics.mean)}), not {tuple(scores.shape)}: the "
            "statistics hold one mean a head"
        )
    mean, std = scores.new_tensor(statistics.mean), scores.new_tensor(statistics.std)
    return _aggregated((scores - mean) / std, statistics.aggregation)


def write_statistics(model: nn.Module, statistics: RewardStatistics) -> None:
    """Keeps the statistics in the model's config, and so in the folder it is exported to.

    Raises:
        ValueError: They are those of another number of heads.
    """
    config = unwrap(model).config
    if len(statistics.mean) != config.num_labels:
        raise ValueError(f"statistics of {len(statistics.mean)} heads, not {config.num_labels}")
    for field, value in zip(STATISTICS, asdict(statistics).values(), strict=True):
        setattr(config, field, value)


def read_statistics(config: PretrainedConfig) -> RewardStatistics | None:
    """What :func:`write_statistics` has left in a config; ``None`` if nothing.

    Raises:
        UserError: The config holds a part of it, or what makes no sense.
    """
    values: list[Any] = [getattr(config, field, None) for field in STATISTICS]
    if all(value is None for value in values):
        return None
    mean, std, aggregation = values
    statistics = RewardStatistics(mean, std, aggregation)
    if len(statistics.mean) != config.num_labels:
        raise UserError(
            f"the config holds reward statistics of {len(statistics.mean)} heads for "
            f"{config.num_labels}; remove {', '.join(STATISTICS)} from it."
        )
    return statistics


def statistics_of(model: nn.Module) -> RewardStatistics:
    """The statistics in a model's config; where there are none, those that leave scores alone.

    Raises:
        UserError: As for :func:`read_statistics`.
    """
    config = unwrap(model).config
    heads = int(config.num_labels or 1)
    return read_statistics(config) or RewardStatistics([0.0] * heads, [1.0] * heads)


def like_lengths(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Batches of row numbers, rows of like length together, so that little is padding."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@torch.no_grad()
def text_scores(
    model: nn.Module, input_ids: Sequence[Sequence[int]], *, batch_size: int = 16
) -> Tensor:
    """Scores of any number of texts, by :func:`score`.

    Args:
        model: A model of :func:`build_reward_model`, in evaluation mode.
        input_ids: Token ids of each text, at least one.
        batch_size: Texts to score at once.

    Returns:
        (N, H) float32 on the CPU, in the order of the texts.
    """
    inner: Any = unwrap(model)
    result = torch.zeros(len(input_ids), inner.config.num_labels, dtype=torch.float32)
    for rows in like_lengths([len(ids) for ids in input_ids], batch_size):
        texts = [torch.as_tensor(input_ids[row]) for row in rows]
        masks = [torch.ones_like(text) for text in texts]
        tokens, mask = (
            nn.utils.rnn.pad_sequence(part, batch_first=True).to(inner.device)
            for part in (texts, masks)
        )
        result[rows] = score(model, tokens, mask).float().cpu()
    return result


class RewardEnsemble:
    """Several reward models as one judge.

    Each model's scores are standardised by the statistics of its own config (as they are, where it
    has none), then the models are aggregated like the heads of one. A text is a list of token ids,
    so all models must share one tokenizer and chat template: who tokenises sees to that, and to the
    models' longest sequence.

    Args:
        models: Models of :func:`build_reward_model`; put into evaluation mode.
        aggregation: What becomes of several models, see :class:`RewardStatistics`.
        batch_size: Texts to score at once.

    Raises:
        UserError: There are no models.
    """

    def __init__(
        self,
        models: Iterable[nn.Module],
        aggregation: Aggregation = "mean",
        batch_size: int = 16,
    ) -> None:
        self.models = [model.eval() for model in models]
        if not self.models:
            raise UserError("an ensemble needs at least one reward model.")
        if aggregation not in get_args(Aggregation):
            known = ", ".join(get_args(Aggregation))
            raise UserError(f"reward aggregation {aggregation!r}: use one of {known}.")
        self.aggregation = aggregation
        self.batch_size = batch_size
        self._statistics = [statistics_of(model) for model in self.models]

    def scores(self, input_ids: Sequence[Sequence[int]]) -> Tensor:
        """Rewards of texts.

        Args:
            input_ids: Token ids of each text: prompt and answer, with the token that ends it.

        Returns:
            (N,) float32 on the CPU, in the order of the texts.

        Raises:
            ValueError: A text without tokens.
        """
        if not all(len(ids) for ids in input_ids):
            raise ValueError("a text without tokens has no score")
        if not len(input_ids):
            return torch.zeros(0)
        rewards = [
            standardised(text_scores(model, input_ids, batch_size=self.batch_size), statistics)
            for model, statistics in zip(self.models, self._statistics, strict=True)
        ]
        return _aggregated(torch.stack(rewards, 1), self.aggregation)


def load_reward_models(
    folders: Sequence[str | os.PathLike[str]],
    *,
    aggregation: Aggregation = "mean",
    batch_size: int = 16,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str | torch.device = "cpu",
    attn_implementation: str = "sdpa",
) -> RewardEnsemble:
    """The reward models of several folders as one judge.

    Args:
        folders: Folders that a reward model was exported to, or names on the Hugging Face Hub.
        aggregation: What becomes of several models, see :class:`RewardStatistics`.
        batch_size: Texts to score at once.
        dtype: Data type of the weights.
        device: Where to.
        attn_implementation: Attention of transformers.

    Returns:
        The ensemble; one of one model where there is one folder.

    Raises:
        UserError: No folders, or one that holds no reward model.
    """
    models = []
    for folder in folders:
        config = BaseModelConfig(
            pretrained=str(folder), dtype=dtype, attn_implementation=attn_implementation
        )
        hf_config = load_config(config)
        if not is_classifier_config(hf_config):
            found = " or ".join(hf_config.architectures or [hf_config.model_type])
            raise UserError(f"{str(folder)!r} holds no reward model, but a {found}.")
        model: nn.Module = build_model(config, heads=int(hf_config.num_labels or 1))
        models.append(model.to(device))
    return RewardEnsemble(models, aggregation, batch_size)


def _aggregated(scores: Tensor, aggregation: Aggregation) -> Tensor:
    """(N, H) -> (N,)."""
    if aggregation == "min":
        return scores.amin(1)
    mean = scores.mean(1)
    return mean - scores.std(1, correction=0) if aggregation == "mean_minus_std" else mean
