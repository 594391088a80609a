"""What the data modules of chats share: a tokenizer with a template, splits, questions, reports."""

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Generic

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset

from lit_llm.data.chat_cache import AnyCounts, ChatCache, ChatSettings
from lit_llm.data.chat_template import plain_prompt_ids, prompt_ids, stop_token_ids
from lit_llm.data.chat_tokenizer import load_chat_tokenizer
from lit_llm.data.conversations import Question
from lit_llm.data.mixture import Mixture
from lit_llm.data.module import SampleDataModule
from lit_llm.data.sample_table import SampleTable
from lit_llm.data.sources import source_labels
from lit_llm.data.splits import Split, check_fractions
from lit_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatDataModule(SampleDataModule, Generic[AnyCounts]):
    """The ground of the data modules whose samples are questions with answers.

    A subclass says what is kept of a sample (``open_cache``), what a sample is (``samples``), and
    how a format is described.

    Args:
        tokenizer: Folder, Hugging Face Hub name or .gguf file of the tokenizer.
        settings: Sources and how they are prepared.
        micro_batch_size: Samples that go through the model at once on each device in training.
        val_micro_batch_size: The same in validation and test; by default as in training.
        chat_template: File with a Jinja chat template; by default the tokenizer's own, and one of
            ours where it has none.
        pad_token: Text of the padding token; by default the tokenizer's own, or a special token
            without other use where that is missing or ends a text.
        cache_dir: Folder of the caches.
        num_workers: Processes that prepare batches ahead on each rank; 0 does it between the steps.
        seed: Seed of the order of the training samples.

    Raises:
        UserError: For a value that makes no sense.
    """

    unit = "sample"  # what is held out, for messages

    def __init__(
        self,
        *,
        tokenizer: str | None,
        settings: ChatSettings,
        micro_batch_size: int,
        val_micro_batch_size: int | None,
        chat_template: str | None,
        pad_token: str | None,
        cache_dir: str,
        num_workers: int,
        seed: int,
    ) -> None:
        if tokenizer is None:
            raise UserError(
                "data: no tokenizer is given; name a folder or a model (--data.tokenizer)."
            )
        super().__init__(
            tokenizer=tokenizer,
            labels=source_labels(settings.all_sources),
            sources=settings.sources,
            micro_batch_size=micro_batch_size,
            val_micro_batch_size=val_micro_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.settings = settings
        self.val_sources = settings.val_sources
        self.seq_len = settings.seq_len
        self.chat_template = chat_template
        self.pad_token = pad_token
        self.cache_dir = cache_dir
        self.check_least(seq_len=2)
        check_fractions(settings.val_fraction, settings.test_fraction)
        self._cache: ChatCache[AnyCounts] | None = None
        self._told = False

    # ----- what a subclass says -----------------------------------------------------------------

    def open_cache(self) -> ChatCache[AnyCounts]:
        """Open the tokens on disk; tokenise the data first where that was not done before."""
        raise NotImplementedError

    def samples(self, source: int, split: Split) -> Dataset[Any]:
        """The samples of one split of one source."""
        raise NotImplementedError

    def describe_format(self, name: str) -> str:
        """What a format holds and what becomes of it, in one line for the log."""
        raise NotImplementedError

    # ----- what follows from it -----------------------------------------------------------------

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer with a chat template and a padding token."""
        return load_chat_tokenizer(
            self.tokenizer_path, chat_template=self.chat_template, pad_token=self.pad_token
        )

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
    def cache(self) -> ChatCache[AnyCounts]:
        """The tokens on disk; ``prepare_data`` or ``setup`` opens them.

        Raises:
            UserError: When nothing of a source can be trained on.
        """
        if self._cache is None:
            cache = self.open_cache()
            for number, label in enumerate(self.source_labels[: len(self.sources)]):
                if not len(cache.table(number, "train")):
                    reason = cache.counts[number].why_empty(self.seq_len)
                    raise UserError(f"source {label}: {reason}")
            self._cache = cache
        return self._cache

    @functools.cached_property
    def train_parts(self) -> list[Dataset[Any]]:
        """Training samples of each source."""
        return [self.samples(number, "train") for number in range(len(self.sources))]

    @property
    def _split_sources(self) -> range:
        """Numbers of the sources that validation and test are made of."""
        return range(len(self.sources) + len(self.val_sources))

    def held_out_parts(self, split: Split) -> list[Dataset[Any]]:
        """Samples of a held-out split; empty when the settings ask for none.

        Raises:
            UserError: When they ask for some and there are none.
        """
        setting = "val_fraction" if split == "validation" else "test_fraction"
        wanted = getattr(self.settings, setting) > 0
        if not wanted and not (split == "validation" and self.val_sources):
            return []
        numbers = [k for k in self._split_sources if len(self.cache.table(k, split))]
        if not numbers:
            raise UserError(
                f"data: no {self.unit} fell into the {split} split; raise {setting}, give more "
                f"data, or set {setting} to 0 to do without."
            )
        return [self.samples(number, split) for number in numbers]

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
        queues = [self._questions(self.cache.table(k, split)) for k in self._split_sources]
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
            if about is None or "reference" not in about:
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
                "format": self.describe_format(source["format"]),
                "read": str(own),
                "splits": own.splits,
            }
        return {
            "tokenizer": self.tokenizer_path,
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
            rank_zero_info(f"  {label}: {self.describe_format(source['format'])}")
            rank_zero_info(f"  {label}: {own}")
            for split, numbers in own.splits.items():
                if numbers["samples"]:
                    rank_zero_info(f"  {label}, {split}: {own.split_line(split)}")
            for warning in own.warnings():
                rank_zero_warn(f"{label}: {warning}")

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
