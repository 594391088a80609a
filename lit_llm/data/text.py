"""The data module of language modelling: sources of text in, packed blocks of tokens out."""

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset, default_collate

from lit_llm.data.card import CorpusCard
from lit_llm.data.cleaning import Cleaning
from lit_llm.data.corpus import CorpusSettings, corpus_card, corpus_report, corpus_summary
from lit_llm.data.deduplication import Deduplication
from lit_llm.data.loader import Batch, Cursor, ResumableLoader, held_out_loader
from lit_llm.data.mixture import Mixture
from lit_llm.data.packing import PackedBlocks, count_targets
from lit_llm.data.sources import PYTHON_DOCS, Source, as_sources, source_labels
from lit_llm.data.splits import Split, check_fractions
from lit_llm.data.token_cache import TokenCache, open_cache, vocabulary_size
from lit_llm.data.tokenizer import load_tokenizer, token_bytes
from lit_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DEFAULT_SOURCES: list[Source | str] = [PYTHON_DOCS]
_DEFAULT_CLEANING = Cleaning()
_DEFAULT_DEDUPLICATION = Deduplication()


class TextDataModule(pl.LightningDataModule):
    """Text for pre-training: cleaned, deduplicated, split, tokenised once, packed and mixed.

    Batches are dicts of long tensors: ``input_ids`` and ``labels`` (B, T), aligned (the model
    shifts them), -100 where there is no loss; ``source`` (B,), the index into ``source_labels``;
    with ``isolate_documents`` also ``document_ids`` and ``position_ids`` (B, T). Training batches
    also hold ``num_target_tokens`` (), see ``ResumableLoader``.

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
        super().__init__()
        self.tokenizer_path = tokenizer
        self.sources = as_sources(sources)
        self.val_sources = as_sources(val_sources) if val_sources else []
        self.seq_len = seq_len
        self.micro_batch_size = micro_batch_size
        self.val_micro_batch_size = (
            micro_batch_size if val_micro_batch_size is None else val_micro_batch_size
        )
        self.isolate_documents = isolate_documents
        self.cache_dir = cache_dir
        self.num_workers = num_workers
        self.seed = seed
        self._check()
        check_fractions(val_fraction, test_fraction)
        self.settings = CorpusSettings(
            sources=self.sources,
            val_sources=self.val_sources,
            cleaning=cleaning,
            deduplication=deduplication,
            val_fraction=0.0 if self.val_sources else val_fraction,
            test_fraction=test_fraction,
        )
        self.source_labels = source_labels(self.settings.all_sources)
        self._cursor = Cursor()
        self._cache: TokenCache | None = None
        self._told = False

    def _check(self) -> None:
        least = {"seq_len": 2, "micro_batch_size": 1, "val_micro_batch_size": 1, "num_workers": 0}
        for name, smallest in {**least, "seed": 0}.items():
            if getattr(self, name) < smallest:
                raise UserError(
                    f"data: {name} is {getattr(self, name)}, it must be at least {smallest}."
                )
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            without = self.sources[weighted.index(False)].label
            raise UserError(
                f"data: source {without} has no weight but others have; give all a weight or none."
            )

    # What the corpus is

    @functools.cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, loaded when it is first asked for."""
        return load_tokenizer(self.tokenizer_path)

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
    def train_blocks(self) -> list[PackedBlocks]:
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

    @functools.cached_property
    def mixture(self) -> Mixture:
        """The order of the training samples."""
        return Mixture(
            [len(blocks) for blocks in self.train_blocks],
            self.weights,
            seed=self.seed,
            names=self.source_labels[: len(self.sources)],
        )

    @property
    def weights(self) -> list[float] | None:
        """Weight of each source, or None when they are drawn in proportion to their tokens."""
        weights = [source.weight for source in self.sources if source.weight is not None]
        return weights or None

    def tokens_seen(self) -> dict[str, int]:
        """Training tokens read so far from each source, over all ranks: T - 1 a sample."""
        counts = self.mixture.counts(self._cursor.consumed)
        return {
            label: count * (self.seq_len - 1)
            for label, count in zip(self.source_labels, counts, strict=False)
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
            self._held_out("validation")
        if stage in (None, "test"):
            self._held_out("test")

    def train_dataloader(self) -> ResumableLoader:
        """Training micro-batches of this rank, from where the last run stopped."""
        rank, world_size = self._place()
        total = len(self.mixture) // (self.micro_batch_size * world_size)
        if not total:
            raise UserError(
                f"data: the corpus has {len(self.mixture)} training samples of seq_len "
                f"{self.seq_len}, fewer than one micro-batch of {self.micro_batch_size} on each of "
                f"{world_size} devices; give more text or lower micro_batch_size or seq_len."
            )
        return ResumableLoader(
            ConcatDataset(self.train_blocks),
            self.mixture,
            self._cursor,
            micro_batch_size=self.micro_batch_size,
            collate_fn=default_collate,
            count_targets=count_targets,
            accumulate=self.trainer.accumulate_grad_batches if self.trainer else 1,
            rank=rank,
            world_size=world_size,
            batches_done=self._batches_done if self.trainer else None,
            length=self._run_length() or total,
            max_batches=self._limit(self._run_length() or total),
            num_workers=self.num_workers,
            seed=self.seed,
        )

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of a training epoch on each rank, ``limit_train_batches`` counted in."""
        return self.train_dataloader().epoch_batches

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Validation micro-batches of this rank; none with ``val_fraction`` 0."""
        return self._held_out_loader("validation")

    def test_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Test micro-batches of this rank; none with ``test_fraction`` 0."""
        return self._held_out_loader("test")

    def state_dict(self) -> dict[str, Any]:
        """How far training has read, and in what: plain numbers, strings and lists."""
        return {"consumed": self._cursor.consumed, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint's training stopped; evaluating a checkpoint needs none of it.

        Raises:
            UserError: When the checkpoint was trained on something else.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        for name, value in self._identity().items():
            if state_dict.get(name) != value:
                raise UserError(
                    f"the checkpoint was trained with another {name} ({state_dict.get(name)}) than "
                    f"this run ({value}), so it cannot be resumed exactly; give the same data "
                    "settings, or start a new run from its exported model."
                )
        self._cursor.consumed = state_dict["consumed"]

    def _identity(self) -> dict[str, Any]:
        return {
            "corpus": self.cache.key,
            "seq_len": self.seq_len,
            "weights": self.weights,
            "seed": self.seed,
        }

    def _place(self) -> tuple[int, int]:
        """Rank and number of data-parallel processes; tensor-parallel ones read the same."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer else None
        if kwargs is None:
            return 0, 1
        # Lightning would share the held-out samples out a second time.
        if self.trainer and self.trainer._accelerator_connector.use_distributed_sampler:
            raise UserError(
                "trainer: set use_distributed_sampler to false; the data is shared out already."
            )
        return kwargs["rank"], kwargs["num_replicas"]

    def _batches_done(self) -> int:
        assert self.trainer is not None
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _run_length(self) -> int | None:
        """Micro-batches of a run measured in steps, which is one epoch to Lightning."""
        if self.trainer is None or self.trainer.max_steps < 1 or self.trainer.max_epochs != -1:
            return None
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def _limit(self, total: int) -> int | None:
        limit = self.trainer.limit_train_batches if self.trainer else None
        return int(total * limit) if isinstance(limit, float) else limit

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

    def _held_out(self, split: Split) -> list[PackedBlocks]:
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

    def _held_out_loader(self, split: Split) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        blocks = self._held_out(split)
        if not blocks:
            return []
        rank, world_size = self._place()
        # All sources mixed, so that limit_val_batches leaves a fair sample; each block comes once.
        order = Mixture([len(own) for own in blocks]).indices(0, sum(map(len, blocks)))
        return held_out_loader(
            Subset(ConcatDataset(blocks), order.tolist()),
            micro_batch_size=self.val_micro_batch_size,
            collate_fn=default_collate,
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
        )
