"""The experience buffer: every row as often as any other, in one order whatever the ranks."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from lit_llm.rollout.experience import Experience, ExperienceBuffer

PAD = 0
# Of many lengths, and with the id that pads inside and at the end.
PROMPTS = [[10 + row] * (1 + row % 5) for row in range(16)]
RESPONSES = [[50 + row, *[PAD] * (row % 4), 2][: 1 + row % 6] for row in range(16)]
PARTS = ("logprobs", "values", "advantages", "returns")


def experience() -> Experience:
    made = Experience.of(PROMPTS, RESPONSES, PAD)
    for number, name in enumerate(PARTS, 1):
        columns = torch.arange(made.response_mask.shape[1])
        values = 1000.0 * number + 10.0 * torch.arange(16)[:, None] + columns
        setattr(made, name, values * made.response_mask)
    return made


def buffer(rank: int = 0, world_size: int = 1, **changes) -> ExperienceBuffer:
    settings = {"num_epochs": 3, "rollout_batch_size": 16, "minibatch_size": 8}
    settings |= {"micro_batch_size": 2, "rank": rank, "world_size": world_size} | changes
    made = ExperienceBuffer(**settings)
    made.shuffle(5)
    made.experience = experience()
    return made


def rows_of(batch) -> list[int]:
    """Which rows a batch holds: the first token of a prompt tells."""
    starts = batch["attention_mask"].argmax(1)
    return [int(ids[start]) - 10 for ids, start in zip(batch["input_ids"], starts, strict=True)]


def minibatches(ranks: list[ExperienceBuffer]) -> list[list[int]]:
    """The rows of every optimizer step, those of all ranks one after the other."""
    found: list[list[int]] = [[] for _ in range(ranks[0].steps)]
    for one in ranks:
        for batch in one:
            found[int(batch["minibatch"])] += rows_of(batch)
    return found


def test_prompts_and_responses_meet_in_one_column() -> None:
    made = Experience.of([[7, 8, 9], [5]], [[1], [3, PAD, 2]], PAD)
    assert made.input_ids.tolist() == [[7, 8, 9, 1, 0, 0], [0, 0, 5, 3, 0, 2]]
    assert made.attention_mask.tolist() == [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]
    assert made.response_mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert len(made) == 2
    for name in PARTS:
        assert getattr(made, name).tolist() == [[0.0] * 3] * 2
    without = Experience.of([[7]], [[]], PAD)  # still a column, and nothing in it
    assert without.response_mask.tolist() == [[0]]
    assert without.input_ids.tolist() == [[7, 0]]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_row_comes_once_an_epoch(world_size: int) -> None:
    ranks = [buffer(rank, world_size) for rank in range(world_size)]
    assert {len(one) for one in ranks} == {3 * 16 // (2 * world_size)}
    assert {len(list(one)) for one in ranks} == {len(ranks[0])}
    assert {(one.steps, one.accumulate) for one in ranks} == {(6, 4 // world_size)}
    steps = minibatches(ranks)
    assert [len(step) for step in steps] == [8] * 6
    epochs = [steps[2 * epoch] + steps[2 * epoch + 1] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(16))
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(range(16))


def test_the_ranks_share_the_minibatches_of_one() -> None:
    expected = minibatches([buffer()])
    for world_size in (2, 4):
        found = minibatches([buffer(rank, world_size) for rank in range(world_size)])
        assert found == expected  # in the very order, so that sums round alike
    assert minibatches([buffer(micro_batch_size=8)]) == expected
    other = buffer()
    other.shuffle(6)
    assert minibatches([other]) != expected


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_targets_are_those_of_a_ranks_minibatch(world_size: int) -> None:
    lengths = [len(response) for response in RESPONSES]
    for rank in range(world_size):
        own = buffer(rank, world_size)
        batches = list(own)
        for step in range(own.steps):
            window = batches[step * own.accumulate : (step + 1) * own.accumulate]
            expected = sum(lengths[row] for batch in window for row in rows_of(batch))
            assert {int(batch["num_targets"]) for batch in window} == {expected}
            assert {int(batch["minibatch"]) for batch in window} == {step}
    total = sum(
        int(batch["num_targets"])
        for rank in range(world_size)
        for batch in list(buffer(rank, world_size))[:: 4 // world_size]
    )
    assert total == 3 * sum(lengths)


def test_trimming_takes_padding_only() -> None:
    made = experience()
    for rows in ([3], [0, 6, 12], list(range(16)), [5, 0]):
        batch = made.rows(torch.tensor(rows))
        own = buffer()
        own.experience = made
        batch |= own.learned(torch.tensor(rows), batch["response_mask"])
        before = max(len(PROMPTS[row]) for row in rows)
        after = max(len(RESPONSES[row]) for row in rows)
        assert batch["input_ids"].shape == (len(rows), before + after)
        assert batch["attention_mask"].shape == (len(rows), before + after)
        for name in ("response_mask", *PARTS):
            assert batch[name].shape == (len(rows), after), name
        for place, row in enumerate(rows):
            real = batch["attention_mask"][place] == 1
            assert batch["input_ids"][place][real].tolist() == PROMPTS[row] + RESPONSES[row]
            kept = batch["response_mask"][place] == 1
            assert batch["input_ids"][place][-after:][kept].tolist() == RESPONSES[row]
            for number, name in enumerate(PARTS, 1):
                expected = [1000 * number + 10 * row + k for k in range(len(RESPONSES[row]))]
                assert batch[name][place][kept].tolist() == expected, name
                assert not bool(batch[name][place][~kept].any()), name


def test_the_first_epoch_is_known_before_the_updates() -> None:
    """The very batches that the updates read."""
    for world_size in (1, 4):
        for rank in range(world_size):
            own = buffer(rank, world_size)
            expected = [rows_of(batch) for batch in own][: len(own) // 3]
            assert [rows.tolist() for rows in own.first_epoch()] == expected


@pytest.mark.parametrize("done", [0, 1, 7, 12, 23, 24])
def test_it_goes_on_where_it_was(done: int) -> None:
    whole = [rows_of(batch) for batch in buffer()]
    kept = buffer().kept()
    resumed = buffer(batches_done=lambda: done)
    resumed.shuffle(99)
    resumed.experience = None
    resumed.restore({name: value.clone() for name, value in kept.items()})
    assert [rows_of(batch) for batch in resumed] == whole[done:]
    assert len(resumed) == 24  # of the whole iteration
    assert resumed.experience is not None
    for field in fields(Experience):
        assert torch.equal(getattr(resumed.experience, field.name), kept[field.name])


def test_what_is_kept_is_plain_tensors() -> None:
    kept = buffer().kept()
    assert kept.keys() == {field.name for field in fields(Experience)} | {"order"}
    assert all(type(value) is torch.Tensor for value in kept.values())
    empty = buffer()
    empty.experience = None
    assert empty.kept() == {}
    full = buffer()
    full.restore({})
    assert full.experience is None


def test_updates_without_a_rollout_are_an_error() -> None:
    empty = buffer()
    empty.experience = None
    with pytest.raises(RuntimeError, match="the rollout comes before the updates"):
        next(iter(empty))
