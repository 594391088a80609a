"""The data module of supervised fine-tuning: conversations in, packed and masked tokens out."""

from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset

from lit_llm.data.bin_packing import PackedSamples, UnpackedSamples, best_fit
from lit_llm.data.chat import ChatDataModule
from lit_llm.data.chat_cache import ChatCache
from lit_llm.data.collation import PadCollator
from lit_llm.data.conversations import describe_format
from lit_llm.data.instruction_cache import (
    Counts,
    InstructionSettings,
    TrainOn,
    open_instructions,
)
from lit_llm.data.loader import Batch
from lit_llm.data.records import RecordSource
from lit_llm.data.sources import PYTHON_DOCS, as_sources
from lit_llm.data.splits import Split

_DEFAULT_SOURCES: list[RecordSource | str] = [PYTHON_DOCS]


class InstructionDataModule(ChatDataModule[Counts]):
    """Conversations for supervised fine-tuning: rendered, masked, cut to length, packed and mixed.

    Batches are dicts of long tensors: ``input_ids`` and ``labels`` (B, T), aligned (the model
    shifts them), -100 where there is no loss; ``source`` (B,); with packing ``document_ids`` (-1 at
    padding) and ``position_ids`` (B, T), without it ``attention_mask`` (B, T). T is the longest
    sample of the batch. Training batches also hold ``num_targets`` (), see
    ``ResumableLoader``.

    Conversations that begin with the same question are never in two splits. Exact resume and the
    trainer's settings are as in ``TextDataModule``.

    Legend: B micro-batch size, T sequence length.

    Args:
        tokenizer: Folder, Hugging Face Hub name or .gguf file of the tokenizer; on the command line
            by default the model's.
        sources: Sources of conversations, each a path, a Hub name, ``python-docs`` (questions about
            the functions of this Python) or the fields of a ``RecordSource``. The format is found
            from the fields. Give a weight to all of them or to none; without weights each is drawn
            in proportion to its size.
        val_sources: Sources that are held out as a whole for validation; then nothing of
            ``sources`` is.
        seq_len: Longest sample, and the length of a pack, in tokens.
        micro_batch_size: Packs (samples without packing) that go through the model at once on each
            device in training.
        val_micro_batch_size: The same in validation and test; by default as in training.
        train_on: Targets: what the ``assistant`` says, end-of-turn tokens included; only what it
            says ``last``; or ``all`` tokens.
        packing: Put several samples into one row of ``seq_len`` tokens, kept apart by attention and
            positions. Without it every sample is a row of its own, padded.
        val_fraction: Share of the conversations held out for validation; 0 for no validation.
        test_fraction: Share of the conversations held out for the test.
        chat_template: File with a Jinja chat template; by default the tokenizer's own, and one of
            ours where it has none.
        pad_token: Text of the padding token; by default the tokenizer's own, or a special token
            without other use where that is missing or ends a text.
        cache_dir: Folder of the caches. What was tokenised before is read from here.
        num_workers: Processes that prepare batches ahead on each rank; 0 does it between the steps.
        seed: Seed of the packing and of the order of the training samples.

    Raises:
        UserError: For a value that makes no sense.
    """

    unit = "conversation"
    settings: InstructionSettings

    def __init__(
        self,
        tokenizer: str | None = None,
        sources: list[RecordSource | str] = _DEFAULT_SOURCES,
        val_sources: list[RecordSource | str] | None = None,
        seq_len: int = 512,
        micro_batch_size: int = 8,
        val_micro_batch_size: int | None = None,
        train_on: TrainOn = "assistant",
        packing: bool = True,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        chat_template: str | None = None,
        pad_token: str | None = None,
        cache_dir: str = "runs/cache",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        own = as_sources(sources, RecordSource)
        val_own = as_sources(val_sources, RecordSource) if val_sources else []
        super().__init__(
            tokenizer=tokenizer,
            settings=InstructionSettings(
                sources=own,
                val_sources=val_own,
                seq_len=seq_len,
                train_on=train_on,
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
        self.packing = packing

    @property
    def masked_sources(self) -> list[int]:
        """Sources with prompts and answers, of which only the answers should be targets."""
        if self.settings.train_on == "all":
            return []
        whole = ("text", "tokens")  # what is trained there is what the data says
        formats = [source["format"] for source in self.cache.meta["sources"]]
        return [number for number, name in enumerate(formats) if name not in whole]

    def open_cache(self) -> ChatCache[Counts]:
        """Open the tokens on disk; tokenise the data first where that was not done before."""
        return open_instructions(self.cache_dir, self.settings, self.tokenizer, self.stop_token_ids)

    def samples(self, source: int, split: Split) -> Dataset[Any]:
        """The samples of one split of one source, packed or not."""
        table = self.cache.table(source, split)
        if not self.packing:
            return UnpackedSamples(table, source)
        bins = best_fit(table.lengths().tolist(), self.seq_len, seed=self.seed)
        return PackedSamples(table, bins, source)

    def describe_format(self, name: str) -> str:
        """What a format holds and what becomes of it, in one line for the log."""
        return describe_format(name)

    def collate(self) -> Callable[[list[Any]], Batch]:
        """Pads to the longest row of the batch."""
        return PadCollator(self.pad_token_id, max_len=self.seq_len)

    def identity(self) -> dict[str, Any]:
        """Data, packing, weights and seed."""
        return {
            "data": self.cache.key,
            "packing": self.packing,
            "weights": self.weights,
            "seed": self.seed,
        }

    def corpus_report(self) -> dict[str, Any]:
        """What the data holds and what was cut or left out, as plain data."""
        return {"train_on": self.settings.train_on, **super().corpus_report()}
