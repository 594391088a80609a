"""How a task of lm-evaluation-harness wants its answers written, in our words."""

from __future__ import annotations

from typing import Any

from lit_llm.errors import UserError
from lit_llm.rollout.generation import GenerationConfig

# Settings of transformers' generate that tasks write down though they change nothing.
_NEUTRAL: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}


def answer_settings(
    asked: dict[str, Any], *, eos: str | None, max_length: int, max_gen_toks: int, task: str
) -> tuple[GenerationConfig, list[str]]:
    """Read a task's ``generation_kwargs`` as the harness reads them.

    Args:
        asked: ``until``, ``max_gen_toks`` (or one of its other names), ``do_sample``,
            ``temperature``, ``top_p`` and ``top_k``. A temperature alone asks for sampling.
        eos: Text of the token that ends an answer, which ends it as text too.
        max_length: Tokens that the model has room for.
        max_gen_toks: Longest answer, where the task does not say.
        task: What the sentence about a mistake begins with.

    Returns:
        How to sample, and the strings that end an answer.

    Raises:
        UserError: There is no room for an answer, or a setting is not one of those.
    """
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    given = dict(normalize_gen_kwargs(asked, max_gen_toks))
    until = handle_stop_sequences(given.pop("until"), eos=eos)
    new = given.pop("max_gen_toks")
    if new >= max_length:
        raise UserError(
            f"{task}: answers of up to {new} tokens leave no room for a question in the model's "
            f"context of {max_length}; take a model with a longer one"
        )
    temperature = given.pop("temperature", 1.0)
    config = GenerationConfig(
        max_new_tokens=new,
        temperature=float(temperature) if given.pop("do_sample") else 0.0,
        top_k=given.pop("top_k", None) or None,
        top_p=given.pop("top_p", 1.0),
    )
    for name, value in given.items():
        if name not in _NEUTRAL or value != _NEUTRAL[name]:
            raise UserError(f"{task}: the setting {name}={value} of its answers is not supported")
    return config, [string for string in until if string]
