"""Critics: how much reward is still to come, at every token of a response.

Legend: B rows, T prompt and response, R response, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llm.models.build import build_model
from lit_llm.models.config import BaseModelConfig
from lit_llm.models.forward import hidden_states
from lit_llm.models.pretrained import load_config
from lit_llm.models.reward import RewardStatistics, read_statistics
from lit_llm.models.score_head import HEAD, is_classifier_config


class ValueHead(nn.Linear):
    """Hidden states to values, in float32 whatever the backbone computes in.

    It begins at 0: a critic that knows nothing promises nothing.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values of hidden states (..., D): (...) float32 (float64 of float64)."""
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        with torch.autocast(hidden.device.type, enabled=False):
            values = F.linear(hidden.to(wide), self.weight.to(wide), self.bias.to(wide))
        return values.squeeze(-1)


class ValueModel(nn.Module):
    """A critic with a backbone of its own.

    Args:
        backbone: A transformers model without an output head.
        head: Its value head.
    """

    def __init__(self, backbone: nn.Module, head: ValueHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, width: int) -> Tensor:
        """Values of the states before the last ``width`` tokens.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, T), 1 for real tokens.
            width: R.

        Returns:
            (B, R) float32.
        """
        hidden = hidden_states(self.backbone, input_ids, attention_mask)
        values: Tensor = self.head(hidden[:, -width - 1 : -1])
        return values


def build_value_model(config: BaseModelConfig, **settings: Any) -> ValueModel:
    """A critic from a causal language model or from a reward model.

    A reward model's own head goes along, on the scale of its standardised scores: the value before
    the last token then begins as the reward itself. That of a language model is new, and 0.

    Args:
        config: Which model, as for :func:`build_model`.
        settings: Longest sequence, vocabulary and special ids, as for :func:`build_model`.

    Raises:
        UserError: As for :func:`build_model`.
    """
    hf_config = None if config.pretrained is None else load_config(config)
    if hf_config is None or not is_classifier_config(hf_config):
        backbone: Any = build_model(config, **settings).base_model
        return ValueModel(backbone, ValueHead(width_of(backbone)))
    model: Any = build_model(config, heads=int(hf_config.num_labels or 1), **settings)
    head = ValueHead(width_of(model))
    _take_over(head, getattr(model, HEAD), read_statistics(hf_config))
    return ValueModel(model.base_model, head)


def width_of(model: Any) -> int:
    """D, the width of a model's hidden states."""
    return int(model.config.get_text_config().hidden_size)


@torch.no_grad()
def _take_over(head: ValueHead, scores: nn.Linear, statistics: RewardStatistics | None) -> None:
    """Make one head of those of a reward model: the mean of their standardised scores."""
    count = scores.out_features
    known = statistics or RewardStatistics([0.0] * count, [1.0] * count)
    mean, std = torch.tensor(known.mean), torch.tensor(known.std)
    bias = torch.zeros(count) if scores.bias is None else scores.bias.float()
    head.weight.copy_((scores.weight.float() / std[:, None]).mean(0, keepdim=True))
    head.bias.copy_(((bias - mean) / std).mean()[None])
