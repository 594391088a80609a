"""Preferences as samples and batches: prompts with their answers, and which is better than which.

Legend: B prompts of a batch, K answers of a prompt, N answers of all prompts together, p pairs of a
prompt, P pairs of all prompts together, n tokens of a prompt's K sequences together, T tokens of a
row of the batch.
"""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_llm.data.collation import PadCollator
from lit_llm.data.packing import IGNORED
from lit_llm.data.sample_table import SampleTable


class PreferenceSamples(Dataset[dict[str, Tensor]]):
    """Item ``i`` is prompt ``i`` with its K answers, each a sequence of prompt and answer.

    An item is a dict of ``input_ids`` and ``labels`` (n,), the sequences one after the other, with
    label -100 at the prompt; ``lengths`` (K,), the tokens of each sequence; ``pairs`` (p, 2), the
    better and the worse answer of each pair, counted from 0; ``margins`` (p,), how much better, 0
    where the data does not say; ``source`` () and ``row`` (), which prompt of its table it is;
    ``group`` (), a number that preferences of one prompt share over all rows. The margins are
    float32, all else is long. Once the log-probabilities of a reference model are given, there is
    also ``ref_logprobs`` (K,), float32.

    Args:
        table: Rows with the sequences of a prompt; beside the tokens ``lengths``, ``pairs``,
            ``group`` and, where the data has them, ``margins``.
        source: Index of the source, copied into every item.
    """

    def __init__(self, table: SampleTable, source: int) -> None:
        self.table = table
        self.source = source
        self._reference: Tensor | None = None
        self._ends: list[int] = []

    def __len__(self) -> int:
        """The number of prompts."""
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Prompt ``index``, counted from 0."""
        about = self._about(index)
        pairs = about["pairs"]
        item = {
            **self.table[index],
            "lengths": torch.tensor(about["lengths"]),
            "pairs": torch.tensor(pairs, dtype=torch.long).reshape(-1, 2),
            "margins": torch.tensor(about.get("margins") or [0.0] * len(pairs), dtype=torch.float),
            "source": torch.tensor(self.source),
            "row": torch.tensor(index),
            "group": torch.tensor(about["group"]),
        }
        if self._reference is not None:
            end = self._ends[index]
            item["ref_logprobs"] = self._reference[end - len(about["lengths"]) : end]
        return item

    def num_answers(self, index: int) -> int:
        """Answers of prompt ``index``, K."""
        return len(self._about(index)["lengths"])

    def num_tokens(self, index: int) -> int:
        """Tokens of prompt ``index`` with all its answers, n."""
        return sum(self._about(index)["lengths"])

    def set_reference(self, logprobs: Tensor) -> None:
        """Give every answer its log-probability under the reference model.

        Args:
            logprobs: (answers,) of all rows, in order.

        Raises:
            ValueError: When they are not one for each answer of the table.
        """
        ends = np.cumsum([len(self._about(index)["lengths"]) for index in range(len(self))])
        answers = int(ends[-1]) if len(ends) else 0
        if logprobs.shape != (answers,):
            raise ValueError(
                f"{answers} answers need as many log-probabilities, not {tuple(logprobs.shape)}"
            )
        self._ends = ends.tolist()
        self._reference = logprobs.detach().to("cpu", torch.float32)

    def _about(self, index: int) -> dict[str, list[int]]:
        about = self.table.about(index)
        assert about is not None
        return about


class PreferenceCollator:
    """Make a batch of prompts, their answers padded on the right to the longest of all.

    The batch has ``input_ids``, ``labels`` and ``attention_mask`` (N, T), a row for each answer,
    those of a prompt one after the other; ``source`` (B,); ``pairs`` (P, 2), rows of the better and
    the worse answer; and for each pair, (P,): ``pair_weights``, one over the pairs of its prompt,
    so that each prompt counts as one; ``margins``; ``pair_source`` and ``pair_row``, the source and
    the row in its table; ``pair_group``, which prompt it is over all rows; ``pair_index``, which
    pair of the row it is. ``ref_logprobs`` (N,) are there where all items have them. Weights,
    margins and log-probabilities are float32, all else is long.

    An item without any target (see ``held_out_loader``) has rows and pairs of weight 0.

    Args:
        pad_id: Token that fills the rows.
        multiple_of: T is a multiple of this, so that few shapes occur.
        max_len: T is never above it, whatever ``multiple_of`` says; none means no limit.
    """

    def __init__(self, pad_id: int, multiple_of: int = 8, max_len: int | None = None) -> None:
        self.pad = PadCollator(pad_id, multiple_of, max_len)

    def __call__(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Make a batch.

        Raises:
            ValueError: When a sequence is longer than ``max_len``.
        """
        answers = [answer for item in items for answer in _answers(item)]
        counts = torch.tensor([len(item["lengths"]) for item in items])
        sizes = torch.tensor([len(item["pairs"]) for item in items])
        counted = torch.tensor([bool((item["labels"] != IGNORED).any()) for item in items])
        first_rows = (counts.cumsum(0) - counts).repeat_interleave(sizes)
        batch = {
            **self.pad(answers),
            "source": torch.stack([item["source"] for item in items]),
            "pairs": torch.cat([item["pairs"] for item in items]) + first_rows[:, None],
            "pair_weights": (counted.float() / sizes).repeat_interleave(sizes),
            "margins": torch.cat([item["margins"] for item in items]),
            "pair_index": torch.cat([torch.arange(int(size)) for size in sizes]),
        }
        for name in ("source", "row", "group"):
            values = torch.stack([item[name] for item in items])
            batch[f"pair_{name}"] = values.repeat_interleave(sizes)
        if all("ref_logprobs" in item for item in items):
            batch["ref_logprobs"] = torch.cat([item["ref_logprobs"] for item in items])
        return batch


def count_prompts(batch: dict[str, Tensor]) -> int:
    """Prompts of a batch that count: each has pairs whose weights sum to 1."""
    return round(float(batch["pair_weights"].sum()))


def _answers(item: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The K sequences of an item, as items of their own."""
    lengths = item["lengths"].tolist()
    return [
        {"input_ids": input_ids, "labels": labels, "source": item["source"]}
        for input_ids, labels in zip(
            item["input_ids"].split(lengths), item["labels"].split(lengths), strict=True
        )
    ]
