"""What the data modules of all stages share: the order of samples, resume, held-out loaders."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from lit_llm.data.loader import Batch, Cursor, ResumableLoader, SampleStream, held_out_loader
from lit_llm.data.mixture import Mixture
from lit_llm.data.packing import count_targets
from lit_llm.data.sources import DataSource
from lit_llm.data.splits import Split
from lit_llm.data.tokenizer import load_tokenizer
from lit_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SampleDataModule(pl.LightningDataModule):
    """The ground of the data modules: sources of samples in, micro-batches that resume exactly out.

    A subclass says what its samples are: ``train_parts`` and ``held_out_parts``, one dataset for
    each source, ``collate`` and ``identity``. The order of the training samples depends on the
    seed, the weights and the samples only. Its state is one number, so training resumes exactly,
    with another number of ranks or workers too. The trainer needs
    ``use_distributed_sampler=False``.

    Args:
        tokenizer: Folder or Hugging Face Hub name of the tokenizer.
        labels: Names of all sources, those held out as a whole last.
        sources: The sources that are trained on.
        micro_batch_size: Samples that go through the model at once on each device in training.
        val_micro_batch_size: The same in validation and test; by default as in training.
        num_workers: Processes that prepare batches ahead on each rank; 0 does it between the steps.
        seed: Seed of the order of the training samples.

    Raises:
        UserError: For a value that makes no sense.
    """

    def __init__(
        self,
        *,
        tokenizer: str,
        labels: list[str],
        sources: Sequence[DataSource],
        micro_batch_size: int,
        val_micro_batch_size: int | None,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.tokenizer_path = tokenizer
        self.source_labels = labels
        self.sources: list[DataSource] = list(sources)
        self.micro_batch_size = micro_batch_size
        self.val_micro_batch_size = (
            micro_batch_size if val_micro_batch_size is None else val_micro_batch_size
        )
        self.num_workers = num_workers
        self.seed = seed
        self.check_least(micro_batch_size=1, val_micro_batch_size=1, num_workers=0, seed=0)
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            without = self.sources[weighted.index(False)].label
            raise UserError(
                f"data: source {without} has no weight but others have; give all a weight or none."
            )
        self.before_loading: Callable[[], None] | None = None
        """Called when a loader is made, where a stage has to add something to the samples."""
        self._cursor = Cursor()
        self._mixture: Mixture | None = None
        self._counted: tuple[int, list[int]] = (-1, [])
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def check_least(self, **least: int) -> None:
        """Check that attributes are not below their smallest sensible values.

        Raises:
            UserError: For the first that is.
        """
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise UserError(
                    f"data: {name} is {getattr(self, name)}, it must be at least {smallest}."
                )

    # ----- what a subclass says -----------------------------------------------------------------

    @property
    def train_parts(self) -> Sequence[Dataset[Any]]:
        """Training samples of each source."""
        raise NotImplementedError

    def held_out_parts(self, split: Split) -> Sequence[Dataset[Any]]:
        """Held-out samples of each source that has any; empty when none are wanted."""
        raise NotImplementedError

    def collate(self) -> Callable[[list[Any]], Batch]:
        """What makes a batch of samples."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What the data is and how it is read, as plain data."""
        raise NotImplementedError

    def trained_identity(self) -> dict[str, Any]:
        """What of it must be the same for a checkpoint to be resumed: what is trained on."""
        return self.identity()

    # ----- what follows from it -----------------------------------------------------------------

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, loaded when it is first asked for."""
        if self._tokenizer is None:
            self._tokenizer = self.load_tokenizer()
        return self._tokenizer

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer."""
        return load_tokenizer(self.tokenizer_path)

    @property
    def weights(self) -> list[float] | None:
        """Weight of each source, or None when they are drawn in proportion to their size."""
        weights = [source.weight for source in self.sources if source.weight is not None]
        return weights or None

    @property
    def mixture(self) -> Mixture:
        """The training samples of all sources, mixed by their weights."""
        if self._mixture is None:
            self._mixture = Mixture(
                [len(part) for part in self.train_parts],  # type: ignore[arg-type]
                self.weights,
                seed=self.seed,
                names=self.source_labels[: len(self.sources)],
            )
        return self._mixture

    @property
    def stream(self) -> SampleStream:
        """The order of the training samples; one that holds each epoch's samples of the mixture."""
        return self.mixture

    def count_targets(self, batch: Batch) -> int:
        """What the loss of a batch is divided by: its target tokens."""
        return count_targets(batch)

    def samples_seen(self) -> list[int]:
        """Training samples read so far from each source, over all ranks."""
        consumed = self._cursor.consumed
        if self.stream is self.mixture:
            return self.mixture.counts(consumed)
        # Within an epoch the stream has an order of its own. What was counted before is kept, so
        # that asking after every step reads no sample's place twice.
        start, counts = self._counted
        epoch_start = consumed - consumed % len(self.mixture)
        if not epoch_start <= start <= consumed:
            start, counts = epoch_start, self.mixture.counts(epoch_start)
        borders = np.cumsum(self.mixture.sizes)
        source = np.searchsorted(borders, self.stream.indices(start, consumed), side="right")
        new = np.bincount(source, minlength=len(counts)).tolist()
        self._counted = consumed, [a + b for a, b in zip(counts, new, strict=True)]
        return self._counted[1]

    def train_dataloader(self) -> ResumableLoader:
        """Training micro-batches of this rank, from where the last run stopped."""
        if self.before_loading is not None:
            self.before_loading()
        return self._train_loader(self._cursor)

    def first_batch(self) -> Batch:
        """The next training batch of this rank, read without moving the cursor.

        It is not asked how many batches of the epoch are done: where a run goes on from the end of
        an epoch, that is all of them.
        """
        loader = self._train_loader(Cursor(self._cursor.consumed))
        loader.num_workers, loader.accumulate, loader.batches_done = 0, 1, lambda: 0
        return next(iter(loader))

    def _train_loader(self, cursor: Cursor) -> ResumableLoader:
        rank, world_size = self._place()
        total = len(self.mixture) // (self.micro_batch_size * world_size)
        if not total:
            raise UserError(
                f"data: there are {len(self.mixture)} training samples, fewer than one "
                f"micro-batch of {self.micro_batch_size} on each of {world_size} devices; give "
                "more data or lower micro_batch_size or seq_len."
            )
        return ResumableLoader(
            ConcatDataset(self.train_parts),
            self.stream,
            cursor,
            micro_batch_size=self.micro_batch_size,
            collate_fn=self.collate(),
            count_targets=self.count_targets,
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
        return self._train_loader(self._cursor).epoch_batches

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Validation micro-batches of this rank; none with ``val_fraction`` 0."""
        return self._held_out_loader("validation")

    def test_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Test micro-batches of this rank; none with ``test_fraction`` 0."""
        return self._held_out_loader("test")

    def state_dict(self) -> dict[str, Any]:
        """How far training has read, and in what: plain numbers, strings and lists."""
        return {"consumed": self._cursor.consumed, **self.trained_identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint's training stopped; evaluating a checkpoint needs none of it.

        Raises:
            UserError: When the checkpoint was trained on something else.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        for name, value in self.trained_identity().items():
            if state_dict.get(name) != value:
                raise UserError(
                    f"the checkpoint was trained with another {name} ({state_dict.get(name)}) than "
                    f"this run ({value}), so it cannot be resumed exactly; give the same data "
                    "settings, or start a new run from its exported model."
                )
        self._cursor.consumed = state_dict["consumed"]

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

    def _held_out_loader(self, split: Split) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        parts = self.held_out_parts(split)
        return self._loader_of(parts) if parts else []

    def _loader_of(self, parts: Sequence[Dataset[Any]]) -> DataLoader[Batch]:
        """Held-out micro-batches of this rank: each sample of the parts once, over all ranks."""
        # Before the workers begin, which get a copy of the samples.
        if self.before_loading is not None:
            self.before_loading()
        sizes = [len(part) for part in parts]  # type: ignore[arg-type]
        rank, world_size = self._place()
        # All sources mixed, so that limit_val_batches leaves a fair sample; each sample comes once.
        order = Mixture(sizes).indices(0, sum(sizes))
        return held_out_loader(
            Subset(ConcatDataset(parts), order.tolist()),
            micro_batch_size=self.val_micro_batch_size,
            collate_fn=self.collate(),
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
        )
