"""Rows that begin alike, such as the choices of one question after long examples: read once.

Legend: C tokens of the longest rest, P tokens of the common beginning, R rows, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_llm.functional import logits_statistics

LEAST = 128
"""Tokens that a common beginning has at least: a shorter one is read faster in a full batch."""

Row = tuple[int, ...]

# Rests at once, with padding, since their logits are held as a whole; and how many times as many
# places of keys and values as tokens go through a model otherwise.
_RESTS = 256
_CACHED = 4


def common_beginnings(rows: Mapping[Row, int]) -> dict[Row, list[Row]]:
    """Long beginnings that several rows share, and these rows.

    Args:
        rows: Ids that a model reads, and by how many of the last places something is predicted: no
            beginning reaches into them.
    """
    groups: dict[Row, list[Row]] = {}
    for row, places in rows.items():
        groups.setdefault(row[: len(row) - places], []).append(row)
    return {
        beginning: sorted(own, key=lambda row: -len(row))
        for beginning, own in groups.items()
        if len(beginning) >= LEAST and len(own) > 1
    }


@torch.no_grad()
def rest_statistics(
    model: Any,
    beginning: Row,
    rows: Sequence[Row],
    targets: Sequence[Sequence[Sequence[int]]],
    *,
    pad_token_id: int,
    batch_tokens: int,
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Negative log-likelihoods of targets (N,), and whether each was the likeliest token.

    Args:
        model: A transformers model with a plain cache of keys and values
            (:func:`lit_llm.rollout.decoders.has_plain_cache`), in evaluation.
        beginning: The ids that all rows begin with.
        rows: The rows, the longest first.
        targets: Of each row one or more lists of what follows its last places: N each, at most C.
        pad_token_id: Fills up the shorter rests on their right; masked.
        batch_tokens: Most tokens that go through the model at once otherwise.

    Yields:
        Of each row, in their order, one pair for each of its lists.
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    cache = DynamicCache(config=base.config)
    start = len(beginning)
    model(
        input_ids=torch.tensor([beginning], device=device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    first = 0
    while first < len(rows):
        width = len(rows[first]) - start
        held = max(1, _CACHED * batch_tokens // (start + width))
        chosen = slice(first, first + max(1, min(held, _RESTS // width)))
        rests = [row[start:] for row in rows[chosen]]
        ids = [[*rest] + [pad_token_id] * (width - len(rest)) for rest in rests]
        lengths = torch.tensor([len(rest) for rest in rests], device=device)
        places = torch.arange(width, device=device)
        mask = torch.cat(
            [
                torch.ones(len(rests), start, dtype=torch.long, device=device),
                (places < lengths[:, None]).long(),
            ],
            dim=1,
        )
        own = copy.deepcopy(cache)
        own.batch_repeat_interleave(len(rests))
        logits = model(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=mask,
            position_ids=(start + places).expand(len(rests), -1),
            past_key_values=own,
            use_cache=True,
        ).logits
        for row, rest, lists in zip(logits, rests, targets[chosen], strict=True):
            yield [
                logits_statistics(
                    row[len(rest) - len(wanted) : len(rest)], torch.tensor(wanted, device=device)
                )
                for wanted in lists
            ]
        first = chosen.stop
