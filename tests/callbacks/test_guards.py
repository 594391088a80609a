"""Each guard lets a sound run pass and names what is wrong with another."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lit_llm.callbacks.guards import (
    check_answers,
    check_beginnings,
    check_data,
    check_learning_rate,
    check_padding,
    check_targets,
)
from lit_llm.errors import UserError
from lit_llm.modules.schedules import Schedule

BOS, END, PAD = 1, 2, 0


def tokenizer(**changes: Any) -> Any:
    values = {"pad_token": "<pad>", "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": BOS}
    names = {BOS: "<s>", END: "</s>", PAD: "<pad>"}
    return SimpleNamespace(
        **{**values, **changes}, convert_ids_to_tokens=lambda ids: [names[i] for i in ids]
    )


def packed(**changes: list[list[int]]) -> dict[str, torch.Tensor]:
    """Two short samples in one row, and padding."""
    rows = {
        "input_ids": [[BOS, 5, 6, END, BOS, 7, 8, END, PAD]],
        "labels": [[-100, -100, 6, END, -100, -100, 8, END, -100]],
        "document_ids": [[0, 0, 0, 0, 1, 1, 1, 1, -1]],
    }
    return {name: torch.tensor(row) for name, row in {**rows, **changes}.items()}


def unpacked(**changes: list[list[int]]) -> dict[str, torch.Tensor]:
    """The same samples in a row each; the second has padding."""
    rows = {
        "input_ids": [[BOS, 5, 6, END], [BOS, 7, END, PAD]],
        "labels": [[-100, -100, 6, END], [-100, -100, END, -100]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]],
    }
    return {name: torch.tensor(row) for name, row in {**rows, **changes}.items()}


@pytest.mark.parametrize("batch", [packed(), unpacked()], ids=["packed", "unpacked"])
def test_a_sound_batch_passes(batch: dict[str, torch.Tensor]) -> None:
    check_targets(batch)
    check_beginnings(batch, BOS, (END, PAD))
    check_answers(batch, [END], tokenizer())
    check_padding(tokenizer(), [END])


def test_a_batch_without_targets_is_refused() -> None:
    # A label in the first column is predicted by nothing.
    labels = [[BOS, -100, -100, -100], [BOS, -100, -100, -100]]
    with pytest.raises(UserError, match="every label is -100"):
        check_targets(unpacked(labels=labels))


def test_bos_twice_is_refused_also_within_a_pack() -> None:
    doubled = packed(input_ids=[[BOS, 5, 6, END, BOS, BOS, 8, END, PAD]])
    with pytest.raises(UserError, match=r"begins with BOS \(id 1\) twice"):
        check_beginnings(doubled, BOS, (END, PAD))
    check_beginnings(doubled, None, (END, PAD))
    check_beginnings(doubled, BOS, (BOS, PAD))  # EOS is the same token, which may stand twice


ALL_PACKED = [[BOS, 5, 6, END, BOS, 7, 8, END, -100]]
LATER_PACKED = [[-100, 5, 6, END, -100, 7, 8, END, -100]]  # the first token is no target
ALL_UNPACKED = [[-100, 5, 6, END], [-100, 7, END, -100]]


@pytest.mark.parametrize(
    "batch",
    [packed(labels=ALL_PACKED), packed(labels=LATER_PACKED), unpacked(labels=ALL_UNPACKED)],
)
def test_a_mask_that_marks_everything_is_refused(batch: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UserError, match="every token of the first batch is trained on"):
        check_answers(batch, [END], tokenizer())


def test_answers_without_an_end_are_refused() -> None:
    labels = [[-100, -100, 6, -100], [-100, 7, -100, -100]]
    with pytest.raises(UserError, match="no answer of the first batch ends with one of '</s>'"):
        check_answers(unpacked(labels=labels), [END], tokenizer())


def test_padding_that_is_an_end_is_refused_with_the_cure() -> None:
    with pytest.raises(UserError, match=r"'</s>', which also ends an answer.*data\.pad_token"):
        check_padding(tokenizer(pad_token="</s>", pad_token_id=END), [END])
    with pytest.raises(UserError, match=r"no padding token.*resize_embeddings"):
        check_padding(tokenizer(pad_token=None, pad_token_id=None), [END])


def trainer(
    lr: float, factor: Any = None, steps: int = 100, interval: str = "step", trainable: bool = True
) -> Any:
    """What Lightning knows once ``configure_optimizers`` has spoken."""
    parameter = nn.Parameter(torch.ones(2), requires_grad=trainable)
    optimizer = torch.optim.SGD([parameter], lr=lr)
    configs = []
    if factor is not None:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        configs = [SimpleNamespace(scheduler=scheduler, interval=interval)]
    return SimpleNamespace(
        optimizers=[optimizer],
        lr_scheduler_configs=configs,
        lightning_module=SimpleNamespace(total_steps=lambda: steps, parameters=lambda: [parameter]),
    )


@pytest.mark.parametrize("name", ["wsd", "cosine", "linear", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 100, 12345])
def test_every_schedule_of_ours_passes(name: Any, steps: int) -> None:
    schedule = Schedule(name=name, warmup_steps=0.1)
    check_learning_rate(trainer(0.1, lambda step: schedule.factor(step, steps), steps))


def test_a_learning_rate_of_zero_is_refused() -> None:
    with pytest.raises(UserError, match="the learning rate is 0; give one above 0"):
        check_learning_rate(trainer(0.0, lambda step: 1.0))


def test_a_learning_rate_that_falls_to_zero_after_the_warm_up_is_refused() -> None:
    with pytest.raises(UserError, match="0 in 90% of 100 steps, after the warm-up"):
        check_learning_rate(trainer(0.1, lambda step: float(step < 10)))


def test_a_schedule_that_counts_epochs_is_refused() -> None:
    with pytest.raises(UserError, match="moves once an epoch"):
        check_learning_rate(trainer(0.1, lambda step: 1.0, interval="epoch"))


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(UserError, match="no trainable parameter"):
        check_learning_rate(trainer(0.1, trainable=False))


def prompts(*rows: list[int], pad_id: int = PAD, stops: tuple[int, ...] = (END,)) -> Any:
    """A data module of prompts, which have no labels and are padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    batch = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    return SimpleNamespace(
        first_batch=lambda: batch,
        tokenizer=tokenizer(pad_token="</s>" if pad_id == END else "<pad>", pad_token_id=pad_id),
        stop_token_ids=list(stops),
    )


def test_prompts_need_no_targets() -> None:
    check_data(prompts([BOS, 5, 6, 7], [BOS, 8]))
    check_data(prompts([BOS, 5, END, BOS, 7], [8]))


def test_prompts_that_begin_with_bos_twice_are_refused() -> None:
    with pytest.raises(UserError, match=r"begins with BOS \(id 1\) twice"):
        check_data(prompts([5, 6, 7, 8], [BOS, BOS, 8]))


def test_padding_of_prompts_that_is_an_end_is_refused() -> None:
    with pytest.raises(UserError, match=r"'</s>', which also ends an answer"):
        check_data(prompts([BOS, 5], pad_id=END))


def test_a_batch_of_texts_still_needs_targets() -> None:
    data = prompts([BOS, 5, 6])
    data.first_batch = lambda: unpacked(labels=[[BOS, -100, -100, -100]] * 2)
    with pytest.raises(UserError, match="every label is -100"):
        check_data(data)
