"""The data module of supervised fine-tuning: conversations in, packed and masked tokens out."""

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset

from lit_llm.data.bin_packing import PackedSamples, UnpackedSamples, best_fit
from lit_llm.data.chat_template import plain_prompt_ids, prompt_ids, stop_token_ids
from lit_llm.data.chat_tokenizer import load_chat_tokenizer
from lit_llm.data.collation import PadCollator
from lit_llm.data.conversations import Question, describe_format
from lit_llm.data.instruction_cache import (
    Counts,
    InstructionCache,
    InstructionSettings,
    TrainOn,
    open_instructions,
)
from lit_llm.data.loader import Batch
from lit_llm.data.mixture import Mixture
from lit_llm.data.module import SampleDataModule
from lit_llm.data.records import RecordSource
from lit_llm.data.sample_table import SampleTable
from lit_llm.data.sources import PYTHON_DOCS, as_sources, source_labels
from lit_llm.data.splits import Split, check_fractions
from lit_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DEFAULT_SOURCES: list[RecordSource | str] = [PYTHON_DOCS]


class InstructionDataModule(SampleDataModule):
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
        if tokenizer is None:
            raise UserError(
                "data: no tokenizer is given; name a folder or a model (--data.tokenizer)."
            )
        own = as_sources(sources, RecordSource)
        self.val_sources = as_sources(val_sources, RecordSource) if val_sources else []
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
        self.packing = packing
        self.chat_template = chat_template
        self.pad_token = pad_token
        self.cache_dir = cache_dir
        self.check_least(seq_len=2)
        check_fractions(val_fraction, test_fraction)
        self.settings = InstructionSettings(
            sources=own,
            val_sources=self.val_sources,
            seq_len=seq_len,
            train_on=train_on,
            val_fraction=0.0 if self.val_sources else val_fraction,
            test_fraction=test_fraction,
        )
        self._cache: InstructionCache | None = None
        self._told = False

    # ----- what the data is ---------------------------------------------------------------------

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer with a chat template and a padding token."""
        return load_chat_tokenizer(
            self.tokenizer_path, chat_template=self.chat_template, pad_token=self.pad_token
        )

    @property
    def masked_sources(self) -> list[int]:
        """Sources with prompts and answers, of which only the answers should be targets."""
        if self.settings.train_on == "all":
            return []
        whole = ("text", "tokens")  # what is trained there is what the data says
        formats = [source["format"] for source in self.cache.meta["sources"]]
        return [number for number, name in enumerate(formats) if name not in whole]

    @functools.cached_property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end an answer: the template's end of turn, and EOS."""
        return stop_token_ids(self.tokenizer)

    @property
    def pad_token_id(self) -> int:
        """The padding token; padding is told by masks, so any id serves."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    @property
    def cache(self) -> InstructionCache:
        """The tokens on disk; ``prepare_data`` or ``setup`` opens them.

        Raises:
            UserError: When nothing of a source can be trained on.
        """
        if self._cache is None:
            cache = open_instructions(
                self.cache_dir, self.settings, self.tokenizer, self.stop_token_ids
            )
            for number, label in enumerate(self.source_labels[: len(self.sources)]):
                if not len(cache.table(number, "train")):
                    reason = _why_empty(cache.counts[number], self.seq_len)
                    raise UserError(f"source {label}: {reason}")
            self._cache = cache
        return self._cache

    @functools.cached_property
    def train_parts(self) -> list[Dataset[Any]]:
        """Training samples of each source, packed or not."""
        return [self._samples(number, "train") for number in range(len(self.sources))]

    def held_out_parts(self, split: Split) -> list[Dataset[Any]]:
        """Samples of a held-out split; empty when the settings ask for none."""
        fraction = getattr(
            self.settings, "val_fraction" if split == "validation" else "test_fraction"
        )
        if fraction == 0 and not (split == "validation" and self.val_sources):
            return []
        numbers = [k for k in range(len(self.source_labels)) if len(self.cache.table(k, split))]
        if not numbers:
            setting = "val_fraction" if split == "validation" else "test_fraction"
            raise UserError(
                f"data: no conversation fell into the {split} split; raise {setting}, give more "
                f"data, or set {setting} to 0 to do without."
            )
        return [self._samples(number, split) for number in numbers]

    def _samples(self, source: int, split: Split) -> Dataset[Any]:
        table = self.cache.table(source, split)
        if not self.packing:
            return UnpackedSamples(table, source)
        bins = best_fit(table.lengths().tolist(), self.seq_len, seed=self.seed)
        return PackedSamples(table, bins, source)

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

    def tokens_seen(self) -> dict[str, int]:
        """Training tokens read so far from each source, over all ranks, by the mean of a sample."""
        seen = {}
        for number, count in enumerate(self.samples_seen()):
            tokens = self.cache.counts[number].splits["train"]["tokens"]
            size = len(self.train_parts[number])  # type: ignore[arg-type]
            seen[self.source_labels[number]] = round(count * tokens / size)
        return seen

    def heldout_questions(self, split: Split, count: int) -> list[Question]:
        """Questions of a held-out split from all over it, always the same, its sources in turn.

        Args:
            split: ``"validation"`` or ``"test"``.
            count: How many at most.
        """
        queues = [
            self._questions(self.cache.table(number, split))
            for number in range(len(self.source_labels))
        ]
        questions: list[Question] = []
        while queues and len(questions) < count:
            queue = queues.pop(0)
            if (question := next(queue, None)) is not None:
                questions.append(question)
                queues.append(queue)
        return questions

    def _questions(self, table: SampleTable) -> Iterator[Question]:
        if not len(table):
            return
        # In a random order, as data is sorted more often than not.
        for index in Mixture([len(table)]).indices(0, len(table)).tolist():
            about = table.about(index)
            if about is None:
                continue
            if "prompt" in about:
                ids, form = plain_prompt_ids(self.tokenizer, about["prompt"]), None
                prompt = about["prompt"]
            else:
                messages, form = about["messages"], about["answer_format"]
                ids = prompt_ids(
                    self.tokenizer, messages, about["tools"], about["template_options"]
                )
                prompt = messages[-1].get("content") or ""
            if 0 < len(ids) < self.seq_len:
                yield Question(ids, prompt, about["reference"], form)

    def corpus_report(self) -> dict[str, Any]:
        """What the data holds and what was cut or left out, as plain data."""
        sources = {}
        for label, source, own in zip(
            self.source_labels, self.cache.meta["sources"], self.cache.counts, strict=True
        ):
            sources[label] = {
                "path": source["path"],
                "format": describe_format(source["format"]),
                "read": str(own),
                "splits": own.splits,
            }
        return {
            "tokenizer": self.tokenizer_path,
            "train_on": self.settings.train_on,
            "sha256": self.cache.meta["sha256"],
            "python": self.cache.meta["python"],
            "sources": sources,
        }

    # ----- what Lightning calls -----------------------------------------------------------------

    def prepare_data(self) -> None:
        """Tokenise the data where that was not done before, and log what it holds, once."""
        if self._told:  # Lightning prepares for every fit, validate and test
            return
        self._told = True
        rank_zero_info(f"Data: {', '.join(self.source_labels)} (tokens in {self.cache_dir})")
        for label, source, own in zip(
            self.source_labels, self.cache.meta["sources"], self.cache.counts, strict=True
        ):
            rank_zero_info(f"  {label}: {describe_format(source['format'])}")
            rank_zero_info(f"  {label}: {own}")
            for split, counts in own.splits.items():
                if counts["samples"]:
                    rank_zero_info(
                        f"  {label}, {split}: {counts['samples']:,} samples, "
                        f"{counts['tokens']:,} tokens, {counts['trained']:,} of them trained on"
                    )
            if own.control_text:
                rank_zero_warn(
                    f"{label}: {own.control_text} samples hold the text of a special token, which "
                    "the tokenizer turns into that token; look at them if you did not write them"
                )

    def setup(self, stage: str | None = None) -> None:
        """Open the data and check that it has what the stage needs.

        Raises:
            UserError: When a split that is needed is empty.
        """
        if stage in (None, "fit"):
            _ = self.mixture
        if stage in (None, "fit", "validate"):
            self.held_out_parts("validation")
        if stage in (None, "test"):
            self.held_out_parts("test")


def _why_empty(counts: Counts, seq_len: int) -> str:
    if counts.too_long and counts.too_long >= counts.read - counts.duplicates - counts.unanswered:
        return (
            f"all {counts.too_long} samples are too long: their answers alone fill more than "
            f"seq_len {seq_len}; raise data.seq_len."
        )
    if counts.unanswered:
        return (
            f"not one of {counts.read} samples holds anything to train on; the chat template marks "
            "no turn of an assistant, or no message has the role 'assistant'. Give a template with "
            "{% generation %} markers (data.chat_template), or set data.train_on to all."
        )
    return (
        f"nothing of {counts.read} samples is left for training ({counts}); give more data or "
        "smaller held-out fractions."
    )
