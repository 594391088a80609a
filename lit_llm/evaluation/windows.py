"""Windows of tokens, scored in batches of similar length, the work shared between ranks.

What the tasks of a harness and the perplexity of long texts have in common.

Legend: B rows of a batch, T longest row, N target tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lit_llm.errors import UserError
from lit_llm.evaluation.prefixes import Row, common_beginnings, rest_statistics
from lit_llm.functional import logits_statistics, token_statistics
from lit_llm.models.forward import full_logits, hidden_states, output_head, supports_fused_head
from lit_llm.rollout.decoders import has_plain_cache
from lit_llm.rollout.engine import mixed_precision
from lit_llm.rollout.generation import aside

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Window:
    """Tokens of which the last ones are scored, each given all that stand before it.

    Attributes:
        ids: Token ids. The last one is only a target, so the model reads one less.
        targets: How many ids are scored; at least 1 and less than all.
    """

    ids: list[int]
    targets: int


class WindowScore(NamedTuple):
    """What a model gives to the targets of a window.

    Attributes:
        nll: Sum of their negative log-likelihoods, in nats.
        greedy: Whether each of them was the most likely token.
    """

    nll: float
    greedy: bool


def score_windows(
    model: nn.Module,
    windows: Sequence[Window],
    *,
    pad_token_id: int,
    batch_tokens: int = 4096,
    dtype: torch.dtype | None = None,
    ranks: Any = None,
) -> list[WindowScore]:
    """Score windows; their order and their company in a batch change nothing.

    Leaves no trace in the model. Windows that let the model read the same ids, as the choices of
    one token do, share one row, and what rows begin with, as choices after long examples do, is
    read once where the architecture allows it. The head is applied at the targets only, a chunk at
    a time, and its softmax is taken in float32.

    Args:
        model: A transformers causal language model, possibly wrapped by peft.
        windows: What to score.
        pad_token_id: Fills up the shorter rows of a batch on their right; masked everywhere.
        batch_tokens: Most tokens of a batch with its padding; a row longer than that is a batch.
        dtype: What products are computed in, by autocast where the weights have another type;
            ``None`` is the weights' own.
        ranks: Group of processes that share the work and all hold the model and these windows;
            each gets all scores. ``None`` for this process alone.

    Returns:
        One score a window, in their order.

    Raises:
        UserError: ``batch_tokens`` is below 1.
    """
    rows: dict[Row, list[int]] = {}
    for number, window in enumerate(windows):
        rows.setdefault(tuple(window.ids[:-1]), []).append(number)
    device = next(model.parameters()).device.type
    groups: dict[Row, list[Row]] = {}
    if has_plain_cache(model):
        groups = common_beginnings(
            {ids: max(windows[number].targets for number in own) for ids, own in rows.items()}
        )
    grouped = {ids for own in groups.values() for ids in own}
    # The longest first, so that a batch that does not fit into memory fails at once.
    order = sorted(rows.keys() - grouped, key=lambda ids: (-len(ids), ids))
    beginnings = sorted(groups, key=lambda ids: (-len(ids) * len(groups[ids]), ids))

    def score_groups(share: Sequence[Row]) -> list[list[list[WindowScore]]]:
        found = []
        with aside(model), mixed_precision(model, dtype, device):
            for beginning in share:
                own = groups[beginning]
                statistics = rest_statistics(
                    model,
                    beginning,
                    own,
                    [
                        [w.ids[-w.targets :] for w in map(windows.__getitem__, rows[ids])]
                        for ids in own
                    ],
                    pad_token_id=pad_token_id,
                    batch_tokens=batch_tokens,
                )
                found.append([[_window_score(*pair) for pair in pairs] for pairs in statistics])
        return found

    def score(share: Sequence[Row]) -> list[list[WindowScore]]:
        found = []
        with aside(model), mixed_precision(model, dtype, device):
            for batch in batches(share, [len(ids) for ids in share], batch_tokens):
                own = [[windows[number] for number in rows[ids]] for ids in batch]
                found += _score(model, batch, own, pad_token_id)
        return found

    scores: dict[int, WindowScore] = {}
    for beginning, of_rows in zip(beginnings, dealt(score_groups, beginnings, ranks), strict=True):
        for ids, own in zip(groups[beginning], of_rows, strict=True):
            scores.update(zip(rows[ids], own, strict=True))
    for ids, own in zip(order, dealt(score, order, ranks), strict=True):
        scores.update(zip(rows[ids], own, strict=True))
    return [scores[number] for number in range(len(windows))]


def strided_windows(ids: Sequence[int], window: int, stride: int) -> list[Window]:
    """Cut a text into windows that score every id but the first once.

    Args:
        ids: Token ids, the first of them the prefix.
        window: Most tokens the model reads at once.
        stride: Most targets of every window after the first.
    """
    windows, scored = [], 1
    while scored < len(ids):
        end = min(len(ids), scored + (window if scored == 1 else stride))
        windows.append(Window(list(ids[max(0, end - window - 1) : end]), end - scored))
        scored = end
    return windows


def batches(
    items: Sequence[Item], lengths: Sequence[int], batch_tokens: int
) -> Iterator[Sequence[Item]]:
    """Cut items, the longest first, into batches of at most so many tokens with padding.

    Args:
        items: What to batch.
        lengths: Their lengths, falling.
        batch_tokens: Most tokens of a batch; an item longer than that is a batch.

    Raises:
        UserError: ``batch_tokens`` is below 1.
    """
    if batch_tokens < 1:
        raise UserError(f"evaluation: batch_tokens must be at least 1, got {batch_tokens}")
    first = 0
    while first < len(items):
        count = max(1, batch_tokens // max(1, lengths[first]))
        yield items[first : first + count]
        first += count


def dealt(
    work: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item], ranks: Any
) -> list[Result]:
    """Let each rank do its share of some work, and all of them have all results.

    Args:
        work: Gives one result an item, in their order. It is not called without items.
        items: The same on every rank; best sorted by length, so that every rank gets as much.
        ranks: Group of processes that share the work, or ``None``.
    """
    if ranks is None:
        return work(items) if items else []
    import torch.distributed as dist

    count = dist.get_world_size(ranks)
    share = items[dist.get_rank(ranks) :: count]
    parts: list[Any] = [None] * count
    dist.all_gather_object(parts, work(share) if share else [], group=ranks)
    return [parts[number % count][number // count] for number in range(len(items))]


def _score(
    model: nn.Module,
    rows: Sequence[Row],
    windows: Sequence[Sequence[Window]],
    pad_token_id: int,
) -> list[list[WindowScore]]:
    """Score the windows of each row of a batch; the longest row is the first."""
    width = len(rows[0])
    places: list[int] = []
    targets: list[int] = []
    counts: list[int] = []
    for row, (ids, sharing) in enumerate(zip(rows, windows, strict=True)):
        end = row * width + len(ids)
        for window in sharing:
            places += range(end - window.targets, end)
            targets += window.ids[-window.targets :]
            counts.append(window.targets)
    device = next(model.parameters()).device
    padded = [[*ids] + [pad_token_id] * (width - len(ids)) for ids in rows]
    lengths = torch.tensor([len(ids) for ids in rows], device=device)
    nll, correct = _statistics(
        model,
        torch.tensor(padded, device=device),
        (torch.arange(width, device=device) < lengths[:, None]).long(),
        torch.tensor(places, device=device),
        torch.tensor(targets, device=device),
    )
    own_nll, own_correct = nll.cpu().split(counts), correct.cpu().split(counts)
    scores = iter(map(_window_score, own_nll, own_correct))
    return [[next(scores) for _ in sharing] for sharing in windows]


def _window_score(nll: Tensor, correct: Tensor) -> WindowScore:
    return WindowScore(float(nll.double().sum()), bool(correct.all()))


def _statistics(
    model: nn.Module, input_ids: Tensor, mask: Tensor, places: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood (N,) of each target, and whether it was the most likely token.

    Args:
        model: The model.
        input_ids: (B, T).
        mask: (B, T), 1 for real tokens.
        places: (N,) which of the B * T places predicts each target.
        targets: (N,).
    """
    if supports_fused_head(model):
        hidden = hidden_states(model, input_ids, mask).flatten(0, 1)
        weight, bias = output_head(model)
        return token_statistics(hidden[places], weight, targets, bias=bias)
    logits, _ = full_logits(model, input_ids, mask)
    return logits_statistics(logits.flatten(0, 1)[places], targets)
