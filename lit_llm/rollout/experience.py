"""What the policy has lived through since its last rollout, in micro-batches that resume exactly.

Legend: N rows (responses of a rollout, over all ranks), T prompt and response, R response, E PPO
epochs, W ranks (data parallel).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lit_llm.errors import UserError

Batch = dict[str, Any]


@dataclass
class Experience:
    """The responses of one rollout and what is learned from each of their tokens.

    Every rank holds all rows: they are small beside any model, and so the order of the updates, and
    what a checkpoint has to keep, do not depend on the number of ranks. Values outside the mask are
    0.

    Attributes:
        input_ids: (N, T) long; prompts padded on the left, then responses padded on the right.
        attention_mask: (N, T) long, 1 for real tokens.
        response_mask: (N, R) long, 1 for sampled tokens, the one that ends a response included.
        logprobs: (N, R) of the tokens under the policy that sampled them.
        values: (N, R) of the states before the tokens, by the critic of that time.
        advantages: (N, R).
        returns: (N, R), what the critic is to learn.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_token_id: int
    ) -> Experience:
        """Lay prompts and responses out; what is learned from them is 0 until it is known.

        Args:
            prompts: Token ids of each prompt.
            responses: Those of each response, the token that ends it included.
            pad_token_id: Fills up the rows; the masks tell where.
        """
        before, after = max(map(len, prompts)), max(1, *map(len, responses))
        ids = torch.full((len(prompts), before + after), pad_token_id)
        real = torch.zeros_like(ids)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            start, stop = before - len(prompt), before + len(response)
            ids[row, start:stop] = torch.tensor([*prompt, *response])
            real[row, start:stop] = 1
        mask = real[:, before:].clone()
        empty = [torch.zeros(mask.shape) for _ in range(4)]
        return cls(ids, real, mask, *empty)

    def __len__(self) -> int:
        """N."""
        return len(self.input_ids)

    def rows(self, index: Tensor) -> Batch:
        """Some rows as a batch, without the columns that only other rows need.

        Args:
            index: (B,) long.
        """
        width = self.response_mask.shape[1]
        before = self.input_ids.shape[1] - width
        real = self.attention_mask[index]
        left = before - int(real[:, :before].sum(1).max())
        right = width - max(1, int(self.response_mask[index].sum(1).max()))
        stop = self.input_ids.shape[1] - right
        return {
            "input_ids": self.input_ids[index, left:stop],
            "attention_mask": real[:, left:stop],
            "response_mask": self.response_mask[index, : width - right],
        }


class ExperienceBuffer:
    """An experience and the order in which the updates go through it.

    One pass over a rollout is a PPO epoch; each is cut to minibatches, one optimizer step each, and
    every rank takes an equal part of a minibatch, a micro-batch at a time. Its length is that of
    the whole iteration, so Lightning fetches nothing ahead, from a rollout that is not there yet.

    Args:
        num_epochs: E.
        rollout_batch_size: N.
        minibatch_size: Rows of an optimizer step, over all ranks; N is a multiple of it.
        micro_batch_size: Rows that go through the models at once on each rank.
        rank: This process among the data-parallel ones.
        world_size: W.
        batches_done: Tells how many micro-batches of the iteration are behind when it is read
            (Lightning's own count).
    """

    def __init__(
        self,
        *,
        num_epochs: int,
        rollout_batch_size: int,
        minibatch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        batches_done: Callable[[], int] = lambda: 0,
    ) -> None:
        self.num_epochs = num_epochs
        self.rollout_batch_size = rollout_batch_size
        self.minibatch_size = minibatch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.batches_done = batches_done
        self.experience: Experience | None = None
        self._order = torch.zeros(0, dtype=torch.long)

    @property
    def accumulate(self) -> int:
        """Micro-batches of an optimizer step on each rank."""
        return self.minibatch_size // (self.micro_batch_size * self.world_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of an iteration."""
        return self.num_epochs * self.rollout_batch_size // self.minibatch_size

    def __len__(self) -> int:
        """Micro-batches of a whole iteration on each rank."""
        return self.steps * self.accumulate

    def shuffle(self, seed: int) -> None:
        """Draw the order of the next iteration's rows, an own one for each PPO epoch."""
        generator = torch.Generator().manual_seed(seed)
        orders = [
            torch.randperm(self.rollout_batch_size, generator=generator)
            for _ in range(self.num_epochs)
        ]
        self._order = torch.cat(orders)

    def first_epoch(self) -> list[Tensor]:
        """Rows (B,) of this rank's micro-batches of the first PPO epoch.

        What is computed of them before the updates is then computed on the very batches of the
        updates, so that the first ratio is exactly 1: another batch rounds differently.
        """
        return [self._rows(number) for number in range(len(self) // self.num_epochs)]

    def _rows(self, number: int) -> Tensor:
        step, part = divmod(number, self.accumulate)
        share = self.minibatch_size // self.world_size
        start = step * self.minibatch_size + self.rank * share + part * self.micro_batch_size
        return self._order[start : start + self.micro_batch_size]

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's micro-batches that are left of the iteration.

        Each also has ``rows`` (B,), what :meth:`learned` takes; ``num_targets``, the response
        tokens of its rank's whole minibatch, and ``minibatch``, the number of that in the
        iteration, both long (). There are no fractions in it: half precision would round them.
        """
        for number in range(self.batches_done(), len(self)):
            if self.experience is None:
                raise RuntimeError("there is no experience: the rollout comes before the updates")
            step = number // self.accumulate
            window = range(step * self.accumulate, (step + 1) * self.accumulate)
            rows = torch.cat([self._rows(k) for k in window])
            yield {
                **self.experience.rows(self._rows(number)),
                "rows": self._rows(number),
                "num_targets": self.experience.response_mask[rows].sum(),
                "minibatch": torch.tensor(step),
            }

    def learned(self, rows: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """What was found out of some rows before the updates, float32.

        Args:
            rows: (B,) long.
            mask: (B, R) their response mask; it says how many columns, and on which device.

        Returns:
            ``logprobs``, ``values``, ``advantages`` and ``returns``, (B, R) each.
        """
        assert self.experience is not None
        names = ("logprobs", "values", "advantages", "returns")
        return {
            name: getattr(self.experience, name)[rows.cpu(), : mask.shape[1]].to(mask.device)
            for name in names
        }

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint in the midst of an iteration needs: all rows, and their order."""
        if self.experience is None:
            return {}
        rows = {field.name: getattr(self.experience, field.name) for field in fields(Experience)}
        return {**rows, "order": self._order}

    def restore(self, kept: dict[str, Tensor]) -> None:
        """Take up what ``kept`` gave.

        Raises:
            UserError: It is an iteration of other sizes.
        """
        self.experience = None
        if kept:
            rows, passes = len(kept["input_ids"]), self.num_epochs * self.rollout_batch_size
            if rows != self.rollout_batch_size or len(kept["order"]) != passes:
                raise UserError(
                    f"the checkpoint is of an iteration of {rows} responses and "
                    f"{len(kept['order']) // rows} PPO epochs; go on with those "
                    "(model.ppo.rollout_batch_size, num_ppo_epochs), or start over "
                    "(--resume never)"
                )
            self._order = kept["order"]
            self.experience = Experience(**{f.name: kept[f.name] for f in fields(Experience)})

    # With these two Lightning knows that the iteration resumes, and does not warn that it cannot.
    # What it needs is in the module's own part of a checkpoint.
    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""
