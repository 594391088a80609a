"""Log-probabilities of a reference model, computed once and kept on disk.

Legend: B prompts of a batch, K answers of a prompt.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_llm.data.preference_samples import PreferenceSamples
from lit_llm.errors import UserError
from lit_llm.models.forward import causal_lm_log_probs


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without dropout; afterwards every module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def answer_log_probs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Log-probability of every answer of a batch given its prompt, summed over its tokens.

    Args:
        model: A transformers causal language model, possibly wrapped by peft.
        batch: ``input_ids``, ``labels`` and ``attention_mask``, each (N, T).

    Returns:
        (N,) float32, in nats.
    """
    return token_log_probs(model, batch).sum(1)


def token_log_probs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Log-probability of every token of the answers, (N, T), 0 elsewhere; in nats."""
    mask = batch["attention_mask"]
    return causal_lm_log_probs(model, batch["input_ids"], batch["labels"], attention_mask=mask)


@torch.no_grad()
def part_log_probs(
    model: Any,
    part: PreferenceSamples,
    collate: Callable[[list[Any]], dict[str, Tensor]],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    """Log-probabilities of all answers of a data set, each rank its share, the others' being 0.

    All ranks run the model equally often, as they must where its weights are sharded.

    Args:
        model: The reference.
        part: Prompts with their answers.
        collate: Makes a batch of them.
        batch_size: Prompts to look at together, B.
        rank: This process.
        world_size: Number of processes; their results add up.

    Returns:
        (answers,) float32, in the order of the data.
    """
    counts = [part.num_answers(index) for index in range(len(part))]
    starts = torch.tensor([0, *counts]).cumsum(0)
    found = torch.zeros(int(starts[-1]))
    order = sorted(range(len(part)), key=part.num_tokens)  # rows of like length, little padding
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    device = next(model.parameters()).device
    for first in range(0, len(batches), world_size):
        mine = first + rank
        rows = batches[min(mine, len(batches) - 1)]
        batch = collate([part[row] for row in rows])
        values = answer_log_probs(model, {name: value.to(device) for name, value in batch.items()})
        if mine >= len(batches):
            break  # the others had one more
        for row, own in zip(
            rows, values.float().cpu().split([counts[r] for r in rows]), strict=True
        ):
            found[starts[row] : starts[row + 1]] = own
    return found


def save_log_probs(path: Path, values: Sequence[Tensor]) -> None:
    """Write what ``load_log_probs`` reads, whole or not at all.

    Raises:
        UserError: The file cannot be written.
    """
    from safetensors.torch import save_file

    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({str(number): value for number, value in enumerate(values)}, partial)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"{path.parent}: the cache cannot be written here ({error.strerror or error}); "
            "give another data.cache_dir"
        ) from error


def load_log_probs(path: Path) -> list[Tensor] | None:
    """Read the log-probabilities of every part; ``None`` where there are none, or damaged ones."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        values = load_file(path)
    except (OSError, SafetensorError):
        return None
    return [values[str(number)] for number in range(len(values))]
