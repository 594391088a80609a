"""The data module of reward models and DPO: prompts with answers of which one is better."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_llm.data.chat import ChatDataModule
from lit_llm.data.chat_cache import ChatCache
from lit_llm.data.corpus import SPLITS
from lit_llm.data.length_groups import LengthGroups
from lit_llm.data.loader import Batch, SampleStream
from lit_llm.data.packing import IGNORED
from lit_llm.data.preference_cache import PreferenceSettings, open_preferences, trained_key
from lit_llm.data.preference_counts import PreferenceCounts
from lit_llm.data.preference_samples import PreferenceCollator, PreferenceSamples, count_prompts
from lit_llm.data.preferences import describe_preference_format
from lit_llm.data.records import RecordSource
from lit_llm.data.sources import PYTHON_DOCS, as_sources
from lit_llm.data.splits import Split
from lit_llm.errors import UserError

_DEFAULT_SOURCES: list[RecordSource | str] = [PYTHON_DOCS]


class PreferenceDataModule(ChatDataModule[PreferenceCounts]):
    """Preferences for reward models and DPO: rendered, cut to length, compared, grouped and mixed.

    A sample is a prompt with its K answers and all their pairs, so that each answer goes through
    the model once and a prompt with many pairs weighs as much as one with a single pair (Ouyang et
    al., 2022, https://arxiv.org/abs/2203.02155, section 3.5). Each answer is a row: prompt and
    answer, ending with the token that ends the answer.

    Batches are dicts of long tensors: ``input_ids``, ``labels`` (-100 but at the answers, aligned:
    the model shifts them) and ``attention_mask`` (N, T), padded on the right; ``pairs`` (P, 2), the
    rows of the better and the worse answer; ``pair_source``, ``pair_row`` and ``pair_index`` (P,),
    where a pair stands in the data (see ``pair_about``), and ``pair_group`` (P,), which prompt it
    is; ``source`` (B,); and, float32, ``pair_weights`` (P,), one over the pairs of the prompt,
    and ``margins`` (P,), how much better, 0 where the data does not say. ``ref_logprobs`` (N,),
    float32, are there once ``reference_parts`` were given theirs. Training batches also hold
    ``num_targets`` (), here the prompts of the accumulation window, see ``ResumableLoader``.

    Preferences that begin with the same question are never in two splits. Exact resume and the
    trainer's settings are as in ``TextDataModule``.

    Legend: B prompts of a micro-batch, N their answers, P their pairs, T longest sequence of them.

    Args:
        tokenizer: Folder, Hugging Face Hub name or .gguf file of the tokenizer; on the command line
            by default the model's.
        sources: Sources of preferences, each a path, a Hub name, ``python-docs`` (right and wrong
            answers about the functions of this Python) or the fields of a ``RecordSource``. The
            format is found from the fields. Give a weight to all of them or to none; without
            weights each is drawn in proportion to its size.
        val_sources: Sources that are held out as a whole for validation; then nothing of
            ``sources`` is.
        ood_sources: A second set that is only tested, beside the test of ``sources`` (out of
            distribution). What begins as a sample of training or validation is left out of it.
        seq_len: Longest sequence of prompt and answer, in tokens. Prompts are cut on the left,
            answers never.
        micro_batch_size: Prompts, each with all its answers, that go through the model at once on
            each device in training.
        val_micro_batch_size: The same in validation and test; by default as in training.
        group_by_length: Put prompts with answers of similar length into one micro-batch, which
            saves padding. Each epoch still has every sample.
        val_fraction: Share of the prompts held out for validation; 0 for no validation.
        test_fraction: Share of the prompts held out for the test.
        chat_template: File with a Jinja chat template; by default the tokenizer's own, and one of
            ours where it has none.
        pad_token: Text of the padding token; by default the tokenizer's own, or a special token
            without other use where that is missing or ends a text.
        cache_dir: Folder of the caches. What was tokenised before is read from here.
        num_workers: Processes that prepare batches ahead on each rank; 0 does it between the steps.
        seed: Seed of the order of the training samples.

    Raises:
        UserError: For a value that makes no sense.
    """

    unit = "prompt"
    settings: PreferenceSettings

    def __init__(
        self,
        tokenizer: str | None = None,
        sources: list[RecordSource | str] = _DEFAULT_SOURCES,
        val_sources: list[RecordSource | str] | None = None,
        ood_sources: list[RecordSource | str] | None = None,
        seq_len: int = 512,
        micro_batch_size: int = 8,
        val_micro_batch_size: int | None = None,
        group_by_length: bool = True,
        val_fraction: float = 0.05,
        test_fraction: float = 0.1,
        chat_template: str | None = None,
        pad_token: str | None = None,
        cache_dir: str = "runs/cache",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        own = as_sources(sources, RecordSource)
        val_own, ood_own = (
            as_sources(given, RecordSource) if given else [] for given in (val_sources, ood_sources)
        )
        super().__init__(
            tokenizer=tokenizer,
            settings=PreferenceSettings(
                sources=own,
                val_sources=val_own,
                ood_sources=ood_own,
                seq_len=seq_len,
                val_fraction=0.0 if val_own else val_fraction,
                test_fraction=test_fraction,
            ),
            micro_batch_size=micro_batch_size,
            val_micro_batch_size=val_micro_batch_size,
            chat_template=chat_template,
            pad_token=pad_token,
            cache_dir=cache_dir,
            num_workers=num_workers,
            seed=seed,
        )
        if ood_own and test_fraction == 0:
            raise UserError(
                "data: ood_sources are told beside the test of the other sources; give a "
                "test_fraction above 0, or do without them (--data.ood_sources null)."
            )
        self.ood_sources = ood_own
        self.group_by_length = group_by_length
        self._samples: dict[tuple[int, Split], PreferenceSamples] = {}

    # ----- what the data is ---------------------------------------------------------------------

    def open_cache(self) -> ChatCache[PreferenceCounts]:
        """Open the tokens on disk; tokenise the data first where that was not done before.

        Raises:
            UserError: When the better and the worse answers of a source look swapped.
        """
        cache = open_preferences(self.cache_dir, self.settings, self.tokenizer, self.stop_token_ids)
        for label, counts in zip(self.source_labels, cache.counts, strict=True):
            if counts.looks_swapped:
                raise UserError(
                    f"source {label}: {counts.contradictory:,} of its {counts.pairs:,} pairs "
                    "prefer the answer that an earlier pair of the same prompt rejects; chosen and "
                    "rejected look swapped, here or in a source read before. Swap them with rename "
                    "({chosen: rejected, rejected: chosen}), or keep one judgement of each pair."
                )
        return cache

    def describe_format(self, name: str) -> str:
        """What a format holds and what becomes of it, in one line for the log."""
        return describe_preference_format(name)

    def samples(self, source: int, split: Split) -> PreferenceSamples:
        """The samples of one split of one source, always the same object."""
        if (source, split) not in self._samples:
            table = self.cache.table(source, split)
            self._samples[source, split] = PreferenceSamples(table, source)
        return self._samples[source, split]

    def reference_parts(self) -> list[PreferenceSamples]:
        """The samples of all sources and splits that have any, in an order that is always the same.

        Each takes the log-probabilities of a reference model (``set_reference``), which then come
        with the batches.
        """
        parts = [
            self.samples(number, split)
            for number in range(len(self.source_labels))
            for split in SPLITS
        ]
        return [part for part in parts if len(part)]

    def ood_parts(self) -> list[PreferenceSamples]:
        """Samples of ``ood_sources``; empty when there are none of these.

        Raises:
            UserError: When none of their samples is left.
        """
        first = len(self._split_sources)
        parts = [self.samples(first + k, "test") for k in range(len(self.ood_sources))]
        if parts and not any(map(len, parts)):
            raise UserError(
                "data: nothing of ood_sources is left to test "
                f"({'; '.join(map(str, self.cache.counts[first:]))}); give others, or leave them "
                "out."
            )
        return [part for part in parts if len(part)]

    # ----- how it is read -----------------------------------------------------------------------

    @functools.cached_property
    def stream(self) -> SampleStream:
        """The order of the training samples, those of similar length side by side."""
        if not self.group_by_length:
            return self.mixture
        lengths = [
            max(_about(self.samples(number, "train"), row)["lengths"])
            for number, size in enumerate(self.mixture.sizes)
            for row in range(size)
        ]
        return LengthGroups(self.mixture, lengths, self.micro_batch_size, seed=self.seed)

    def count_targets(self, batch: Batch) -> int:
        """What the loss of a batch is divided by: its prompts."""
        return count_prompts(batch)

    def collate(self) -> Callable[[list[Any]], Batch]:
        """Pads to the longest answer of the batch."""
        return PreferenceCollator(self.pad_token_id, max_len=self.seq_len)

    def identity(self) -> dict[str, Any]:
        """Data, grouping, weights and seed; with grouping also the size of the groups."""
        identity: dict[str, Any] = {"data": self.cache.key, "group_by_length": self.group_by_length}
        if self.group_by_length:
            identity["micro_batch_size"] = self.micro_batch_size
        return {**identity, "weights": self.weights, "seed": self.seed}

    def trained_identity(self) -> dict[str, Any]:
        """The same without ``ood_sources``, so that a model can be judged by others later.

        They yield to training and validation and are read last, so what is trained on cannot depend
        on them.
        """
        return {**self.identity(), "data": self._trained_key}

    @functools.cached_property
    def _trained_key(self) -> str:
        return trained_key(self.cache, self.settings, self.tokenizer, self.stop_token_ids)

    def test_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Test micro-batches of this rank; with ``ood_sources`` a second loader reads those."""
        own = super().test_dataloader()
        parts = self.ood_parts()
        if not parts or isinstance(own, list):
            return own
        return [own, self._loader_of(parts)]

    def setup(self, stage: str | None = None) -> None:
        """Open the data and check that it has what the stage needs.

        Raises:
            UserError: When a split that is needed is empty.
        """
        super().setup(stage)
        if stage in (None, "test"):
            self.ood_parts()

    # ----- what is told about it ----------------------------------------------------------------

    def pair_about(self, source: int, split: Split, row: int) -> dict[str, Any]:
        """A prompt and its answers, for people.

        Args:
            source: Number of the source, the index into ``source_labels``.
            split: The split that the prompt is in.
            row: Its row there (``pair_row`` of a batch).

        Returns:
            ``prompt``: text of what stands before the answers; ``answers``: their K texts;
            ``pairs``: numbers of the better and the worse answer of each pair; ``kinds``: one a
            pair, or None.
        """
        samples = self.samples(source, split)
        item, about = samples[row], _about(samples, row)
        sequences = item["input_ids"].split(about["lengths"])
        labels = item["labels"].split(about["lengths"])
        begins = [int((own != IGNORED).nonzero()[0]) for own in labels]
        return {
            "prompt": self._text(sequences[0][: begins[0]]),
            "answers": [
                self._text(own[begin:]) for own, begin in zip(sequences, begins, strict=True)
            ],
            "pairs": about["pairs"],
            "kinds": about.get("kinds"),
        }

    def _text(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def train_pair_lengths(self) -> Tensor:
        """(P, 2) long: tokens of the better and the worse answer of each training pair.

        They are what a judge needs that knows nothing but lengths. Only the answers' own tokens
        count, not those of the prompt.
        """
        found = [torch.empty(0, 2, dtype=torch.long)]
        for number in range(len(self.sources)):
            samples = self.samples(number, "train")
            for row in range(len(samples)):
                item = samples[row]
                ends = (item["labels"] != IGNORED).cumsum(0)[item["lengths"].cumsum(0) - 1]
                found.append(ends.diff(prepend=ends.new_zeros(1))[item["pairs"]])
        return torch.cat(found)


def _about(samples: PreferenceSamples, row: int) -> dict[str, Any]:
    about = samples.table.about(row)
    assert about is not None
    return about
