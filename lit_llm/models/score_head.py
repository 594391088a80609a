"""A head that scores whole texts, in place of the one that predicts tokens.

transformers calls such a model a sequence classifier. Ours are causal language models with one
linear layer ``score`` on the hidden state of the last token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from lit_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

HEAD = "score"
_CLASS_ENDS = "ForSequenceClassification"


def is_classifier(model: nn.Module) -> bool:
    """Whether a model (unwrapped) scores whole texts."""
    # By the bases' names, since strategies put classes of their own on top of transformers'.
    return any(cls.__name__.endswith(_CLASS_ENDS) for cls in type(model).__mro__)


def is_classifier_config(hf_config: PretrainedConfig) -> bool:
    """Whether a config came with the weights of a model that scores whole texts."""
    return any(name.endswith(_CLASS_ENDS) for name in hf_config.architectures or [])


def auto_class(classifier: bool) -> Any:
    """The class of transformers that builds and loads such models."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if classifier else AutoModelForCausalLM


def ask_for_heads(hf_config: PretrainedConfig, heads: int, name: str) -> None:
    """Changes a config, so that transformers builds a model that gives ``heads`` scores.

    Args:
        hf_config: The config of a causal language model, or of a model that scores already.
        heads: How many scores.
        name: The model, for people.

    Raises:
        UserError: transformers has no such model, or the weights are those of another number.
    """
    if heads < 1:
        raise UserError(f"a reward model needs at least one head, not {heads}.")
    own_code = getattr(hf_config, "auto_map", None) or {}
    known = auto_class(True)
    if type(hf_config) not in known._model_mapping and known.__name__ not in own_code:
        raise UserError(
            f"{name} cannot become a reward model: transformers has no "
            f"{known.__name__.removeprefix('AutoModel')} of type {hf_config.model_type}; use e.g. "
            "llama, qwen3 or gpt2."
        )
    if is_classifier_config(hf_config) and hf_config.num_labels != heads:
        raise UserError(
            f"{name} gives {hf_config.num_labels} scores, not {heads}; set heads to "
            f"{hf_config.num_labels}, or begin with a causal language model."
        )
    hf_config.num_labels = heads
    hf_config.problem_type = "regression"


def check_head(model: PreTrainedModel) -> nn.Linear:
    """The layer that gives the scores.

    Raises:
        UserError: It is not one linear layer.
    """
    head = getattr(model, HEAD, None)
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise UserError(
            f"{type(model).__name__} cannot be a reward model here: it has no linear layer named "
            f"{HEAD!r}; use e.g. llama, qwen3 or gpt2."
        )
    return head


def initialise_head(model: PreTrainedModel) -> None:
    """New weights, normal with a standard deviation of ``1 / sqrt(D + 1)``.

    Stiennon et al. 2020, https://arxiv.org/abs/2009.01325: after a final norm, the first scores
    vary by about 1. The weights come from torch's global generator.
    """
    head = check_head(model)
    nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
