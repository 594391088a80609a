"""The data module of language modelling: sources of text in, packed blocks of tokens out."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import default_collate

from lit_llm.data.card import CorpusCard
from lit_llm.data.cleaning import Cleaning
from lit_llm.data.corpus import CorpusSettings, corpus_card, corpus_report, corpus_summary
from lit_llm.data.deduplication import Deduplication
from lit_llm.data.loader import Batch
from lit_llm.data.module import SampleDataModule
from lit_llm.data.packing import PackedBlocks
from lit_llm.data.sources import PYTHON_DOCS, Source, as_sources, source_labels
from lit_llm.data.splits import Split, check_fractions
from lit_llm.data.token_cache import TokenCache, open_cache, vocabulary_size
from lit_llm.data.tokenizer import token_bytes
from lit_llm.errors import UserError

_DEFAULT_SOURCES: list[Source | str] = [PYTHON_DOCS]
_DEFAULT_CLEANING = Cleaning()
_DEFAULT_DEDUPLICATION = Deduplication()


class TextDataModule(SampleDataModule):
    """Text for pre-training: cleaned, deduplicated, split, tokenised once, packed and mixed.

    Batches are dicts of long tensors: ``input_ids`` and ``labels`` (B, T), aligned (the model
    shifts them), -100 where there is no loss; ``source`` (B,), the index into ``source_labels``;
    with ``isolate_documents`` also ``document_ids`` and ``position_ids`` (B, T). Training batches
    also hold ``num_targets`` (), see ``ResumableLoader``.

    The order of the training samples depends on the seed, the weights and the corpus only. Its
    state is one number, so training resumes exactly, with another number of ranks or workers too.
    The trainer needs ``use_distributed_sampler=False``.

    Legend: B micro-batch size, T sequence length, V vocabulary.

    Args:
        tokenizer: Folder or Hugging Face Hub name of the tokenizer.
        sources: Sources of text, each a path, a Hub name, ``python-docs`` (the documentation that
            comes with this Python) or the fields of a ``Source``. Give a weight to all of them or
            to none; without weights each is drawn in proportion to its tokens.
        val_sources: Sources that are held out as a whole for validation. With them nothing of
            ``sources`` is held out for validation, and no text of theirs is trained on, as far as
            deduplication finds it.
        seq_len: Tokens of a sample, at least 2.
        micro_batch_size: Samples that go through the model at once on each device in training.
        val_micro_batch_size: The same in validation and test; by default as in training.
        val_fraction: Share of the documents held out for validation; 0 for no validation. Which
            documents these are depends on their texts only and stays when data is added.
        test_fraction: Share of the documents held out for the test.
        cleaning: How documents are cleaned before anything else.
        deduplication: Which documents count as the same, over all sources; the first is kept.
        isolate_documents: Keep the documents of a sample apart: batches get ``document_ids`` for
            block-diagonal attention and ``position_ids`` that restart with every document, and the
            first token of a document is not predicted.
        cache_dir: Folder of the token caches. A corpus that was prepared before is read from here.
        num_workers: Processes that prepare batches ahead on each rank; 0 does it between the steps.
        seed: Seed of the order of the training samples.

    Raises:
        UserError: For a value that makes no sense.
    """

    def __init__(
        self,
        tokenizer: str = "runs/tokenizer",
        sources: list[Source | str] = _DEFAULT_SOURCES,
        val_sources: list[Source | str] | None = None,
        seq_len: int = 512,
        micro_batch_size: int = 8,
        val_micro_batch_size: int | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        cleaning: Cleaning = _DEFAULT_CLEANING,
        deduplication: Deduplication = _DEFAULT_DEDUPLICATION,
        isolate_documents: bool = False,
        cache_dir: str = "runs/cache",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        own = as_sources(sources)
        self.val_sources = as_sources(val_sources) if val_sources else []
        super().__init__(
            tokenizer=tokenizer,
            labels=source_labels([*own, *self.val_sources]),
            sources=own,
            micro_batch_size=micro_batch_size,
            val_micro_batch_size=val_micro_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.seq_len = seq_len
        self.isolate_documents = isolate_documents
        self.cache_dir = cache_dir
        self.check_least(seq_len=2)
        check_fractions(val_fraction, test_fraction)
        self.settings = CorpusSettings(
            sources=own,
            val_sources=self.val_sources,
            cleaning=cleaning,
            deduplication=deduplication,
            val_fraction=0.0 if self.val_sources else val_fraction,
            test_fraction=test_fraction,
        )
        self._cache: TokenCache | None = None
        self._told = False

    # What the corpus is

    @functools.cached_property
    def token_bytes(self) -> Tensor:
        """(V,) long: bytes of text each token stands for."""
        return token_bytes(self.tokenizer)

    @property
    def cache(self) -> TokenCache:
        """The tokens on disk; ``prepare_data`` or ``setup`` opens them."""
        if self._cache is None:
            self._cache = open_cache(self.cache_dir, self.settings, self.tokenizer)
        return self._cache

    @functools.cached_property
    def train_parts(self) -> list[PackedBlocks]:
        """Training blocks of each source.

        Raises:
            UserError: When a source has too little text for one block.
        """
        blocks = [self._blocks(k, "train") for k in range(len(self.sources))]
        for label, own in zip(self.source_labels, blocks, strict=False):
            if not len(own):
                raise UserError(
                    f"source {label}: its {len(own.stream.tokens)} training tokens do not fill one "
                    f"sample of seq_len {self.seq_len}; give more text, a smaller seq_len or "
                    "smaller held-out fractions."
                )
        return blocks

    def tokens_seen(self) -> dict[str, int]:
        """Training tokens read so far from each source, over all ranks: T - 1 a sample."""
        return {
            label: count * (self.seq_len - 1)
            for label, count in zip(self.source_labels, self.samples_seen(), strict=False)
        }

    def token_counts(self, split: Split = "train") -> Tensor:
        """(V,) long: how often each token occurs in a split, all sources together."""
        counts = np.zeros(vocabulary_size(self.tokenizer), dtype=np.int64)
        for number in range(len(self.source_labels)):
            tokens = self.cache.split(number, split).tokens
            for start in range(0, len(tokens), 1 << 24):  # bincount widens what it counts
                counts += np.bincount(tokens[start : start + (1 << 24)], minlength=len(counts))
        return torch.from_numpy(counts)

    def heldout_texts(self, split: Literal["validation", "test"] = "validation") -> Iterator[str]:
        """The documents of a held-out split as they were tokenised."""
        for number in range(len(self.source_labels)):
            yield from self.cache.split(number, split).texts()

    def corpus_report(self) -> dict[str, Any]:
        """What the corpus holds and what was removed, as plain data (``corpus.corpus_report``)."""
        report = corpus_report(self.cache, self.settings, self.source_labels)
        return {"tokenizer": self.tokenizer_path, **report}

    def corpus_card(self, name: str, description: str = "") -> CorpusCard:
        """The card of the corpus, to be written with ``write_card``."""
        card = corpus_card(self.cache, self.settings, name=name, description=description)
        card.tokenizer = self.tokenizer_path
        return card

    # What Lightning calls

    def prepare_data(self) -> None:
        """Tokenise the corpus where that was not done before, and log what it holds, once."""
        if self._told:  # Lightning prepares for every fit, validate and test
            return
        self._told = True
        rank_zero_info(f"Corpus: {', '.join(self.source_labels)} (tokens in {self.cache_dir})")
        for line in corpus_summary(self.cache, self.source_labels):
            rank_zero_info(f"  {line}")

    def setup(self, stage: str | None = None) -> None:
        """Open the corpus and check that it has what the stage needs.

        Raises:
            UserError: When a split that is needed has too little text.
        """
        if stage in (None, "fit"):
            _ = self.mixture
        if stage in (None, "fit", "validate"):
            self.held_out_parts("validation")
        if stage in (None, "test"):
            self.held_out_parts("test")

    def identity(self) -> dict[str, Any]:
        """Corpus, sequence length, weights and seed."""
        return {
            "corpus": self.cache.key,
            "seq_len": self.seq_len,
            "weights": self.weights,
            "seed": self.seed,
        }

    def collate(self) -> Callable[[list[Any]], Batch]:
        """Blocks are equally long, so they only need stacking."""
        return default_collate

    def _blocks(self, source: int, split: Split) -> PackedBlocks:
        pad = self.tokenizer.pad_token_id
        return PackedBlocks(
            self.cache.split(source, split),
            self.seq_len,
            pad_id=self.tokenizer.eos_token_id if pad is None else pad,
            source=source,
            isolate=self.isolate_documents,
            keep_tail=split != "train",
        )

    def held_out_parts(self, split: Split) -> list[PackedBlocks]:
        """Blocks of a held-out split; empty when the settings ask for none."""
        wanted = self.settings.test_fraction > 0
        if split == "validation":
            wanted = self.settings.val_fraction > 0 or bool(self.val_sources)
        if not wanted:
            return []
        blocks = [self._blocks(k, split) for k in range(len(self.source_labels))]
        if not any(map(len, blocks)):
            setting = "val_fraction" if split == "validation" else "test_fraction"
            other = ", give val_sources" if split == "validation" else ""
            raise UserError(
                f"data: no document fell into the {split} split; raise {setting}, give more "
                f"text{other}, or set {setting} to 0 to do without."
            )
        return [own for own in blocks if len(own)]
