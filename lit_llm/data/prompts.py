"""The data module of reinforcement learning: prompts that a model answers by itself."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, default_collate

from lit_llm.data.chat import ChatDataModule
from lit_llm.data.chat_cache import ChatCache
from lit_llm.data.loader import Batch, SampleStream, held_out_loader
from lit_llm.data.mixture import Mixture
from lit_llm.data.prompt_cache import PromptCounts, PromptSettings, open_prompts
from lit_llm.data.prompt_formats import describe_prompt_format
from lit_llm.data.prompt_samples import Prompt, PromptSamples, left_padded
from lit_llm.data.records import RecordSource
from lit_llm.data.sources import PYTHON_DOCS, Source, as_sources
from lit_llm.data.splits import Split
from lit_llm.data.text import TextDataModule
from lit_llm.errors import UserError

__all__ = ["Prompt", "PromptDataModule"]

_DEFAULT_SOURCES: list[RecordSource | str] = [PYTHON_DOCS]
_FIRST_PROMPTS = 8  # enough to look at


class PromptDataModule(ChatDataModule[PromptCounts]):
    """Prompts for reinforcement learning: rendered, cut on the left, split and mixed.

    What is trained on is made from them during training: ``take_prompts`` hands out the next ones,
    and the stage that answers them says in ``experience_loader`` how its training batches are read.
    Validation and test batches are dicts of long tensors: ``place`` (B,), the index into
    ``held_out_prompts``, and ``labels`` (B, 1), 0, or -100 for a prompt that only fills up the last
    batch of a rank.

    Prompts that begin with the same question are never in two splits, and those that fine-tuning
    and preference training hold out of the same data at the same fractions are held out here.
    How far the prompts are read is one number, as in ``TextDataModule``, so training resumes
    exactly, with another number of ranks too.

    Legend: B prompts of a batch, T ``ptx_seq_len``.

    Args:
        tokenizer: Folder, Hugging Face Hub name or .gguf file of the tokenizer; on the command line
            by default the model's.
        sources: Sources of prompts, each a path, a Hub name, ``python-docs`` (questions about the
            functions of this Python) or the fields of a ``RecordSource``. The format is found from
            the fields: prompts alone, those of preferences, and conversations, whose last answer is
            left out and kept as the reference. Give a weight to all of them or to none; without
            weights each is drawn in proportion to its size.
        val_sources: Sources that are held out as a whole for validation; then nothing of
            ``sources`` is.
        prompt_len: Longest prompt, in tokens. Longer ones are cut on the left.
        val_prompts: How many of the held-out prompts each validation answers; 0 for none.
        test_prompts: How many of those held out for the test are answered there; 0 for none.
        val_batch_size: Prompts that each device answers at once in validation and test.
        val_fraction: Share of the prompts held out for validation; 0 for no validation.
        test_fraction: Share of the prompts held out for the test.
        first_words: Of texts (the fields ``text`` or, with the format ``plain_prompt``, ``prompt``)
            so many first words are the prompt, which is continued without the chat template; 0
            takes no prompts from texts, and plain prompts as they are.
        ptx_sources: Sources of text whose language modelling loss is added to keep what
            pre-training taught (Ouyang et al., 2022, https://arxiv.org/abs/2203.02155, section
            3.5), each as in ``TextDataModule``. Its default shares of them are held out here too.
        ptx_seq_len: Tokens of a sample of ``ptx_sources``.
        chat_template: File with a Jinja chat template; by default the tokenizer's own, and one of
            ours where it has none.
        pad_token: Text of the padding token; by default the tokenizer's own, or a special token
            without other use where that is missing or ends a text.
        cache_dir: Folder of the caches. What was tokenised before is read from here.
        seed: Seed of the order of the training prompts and of the texts.

    Raises:
        UserError: For a value that makes no sense.
    """

    unit = "prompt"
    settings: PromptSettings

    def __init__(
        self,
        tokenizer: str | None = None,
        sources: list[RecordSource | str] = _DEFAULT_SOURCES,
        val_sources: list[RecordSource | str] | None = None,
        prompt_len: int = 256,
        val_prompts: int = 32,
        test_prompts: int = 128,
        val_batch_size: int = 32,
        val_fraction: float = 0.05,
        test_fraction: float = 0.1,
        first_words: int = 0,
        ptx_sources: list[Source | str] | None = None,
        ptx_seq_len: int = 256,
        chat_template: str | None = None,
        pad_token: str | None = None,
        cache_dir: str = "runs/cache",
        seed: int = 0,
    ) -> None:
        self.prompt_len = prompt_len
        self.val_prompts = val_prompts
        self.test_prompts = test_prompts
        self.val_batch_size = val_batch_size
        self.first_words = first_words
        self.ptx_seq_len = ptx_seq_len
        # Before the ground checks what it has other names for.
        self.check_least(prompt_len=2, val_prompts=0, test_prompts=0, val_batch_size=1)
        self.check_least(first_words=0, ptx_seq_len=2)
        own = as_sources(sources, RecordSource)
        val_own = as_sources(val_sources, RecordSource) if val_sources else []
        super().__init__(
            tokenizer=tokenizer,
            settings=PromptSettings(
                sources=own,
                val_sources=val_own,
                seq_len=prompt_len,
                val_fraction=0.0 if val_own else val_fraction,
                test_fraction=test_fraction,
                first_words=first_words,
            ),
            micro_batch_size=1,
            val_micro_batch_size=val_batch_size,
            chat_template=chat_template,
            pad_token=pad_token,
            cache_dir=cache_dir,
            num_workers=0,
            seed=seed,
        )
        self.ptx_sources = as_sources(ptx_sources) if ptx_sources else []
        self.ptx: TextDataModule | None = None
        if self.ptx_sources:
            self.ptx = TextDataModule(
                tokenizer=self.tokenizer_path,
                sources=list(self.ptx_sources),
                seq_len=ptx_seq_len,
                cache_dir=cache_dir,
                seed=seed,
            )
        self.experience_loader: Callable[[], Any] | None = None
        """Makes the training loader: set by the stage that answers the prompts."""
        self._held_out: dict[Split, list[Prompt]] = {}

    # ----- what the data is ---------------------------------------------------------------------

    def open_cache(self) -> ChatCache[PromptCounts]:
        """Open the tokens on disk; tokenise the data first where that was not done before."""
        return open_prompts(self.cache_dir, self.settings, self.tokenizer, self.stop_token_ids)

    def describe_format(self, name: str) -> str:
        """What a format holds and what becomes of it, in one line for the log."""
        return describe_prompt_format(name)

    def samples(self, source: int, split: Split) -> PromptSamples:
        """The prompts of one split of one source."""
        return PromptSamples(self.cache.table(source, split), source)

    def held_out_parts(self, split: Split) -> list[Dataset[Any]]:
        """Prompts of a held-out split; empty when the settings ask for none.

        Raises:
            UserError: When they ask for some and there are none.
        """
        return super().held_out_parts(split) if self._wanted(split) else []

    def _wanted(self, split: Split) -> int:
        return self.val_prompts if split == "validation" else self.test_prompts

    def identity(self) -> dict[str, Any]:
        """Data, weights and seed, and the same of the texts."""
        return {
            "data": self.cache.key,
            "weights": self.weights,
            "seed": self.seed,
            "ptx": None if self.ptx is None else self.ptx.identity(),
        }

    def corpus_report(self) -> dict[str, Any]:
        """What the data holds and what was cut or left out, as plain data."""
        report = super().corpus_report()
        return report if self.ptx is None else {**report, "ptx": self.ptx.corpus_report()}

    # ----- how it is read -----------------------------------------------------------------------

    def take_prompts(self, count: int) -> list[Prompt]:
        """The next training prompts, the same on every rank; the stream of them has no end.

        Args:
            count: How many, over all ranks.
        """
        start = self._cursor.consumed
        self._cursor.consumed = start + count
        return _read(self.train_parts, self.mixture, start, count)

    def held_out_prompts(self, split: Split) -> list[Prompt]:
        """The prompts that are answered of a held-out split, always the same and in one order.

        Args:
            split: ``"validation"`` or ``"test"``.

        Returns:
            ``val_prompts`` or ``test_prompts`` of them, or as many as there are, from all over the
            split.

        Raises:
            UserError: When some are wanted and there are none.
        """
        if split not in self._held_out:
            parts = cast("list[PromptSamples]", self.held_out_parts(split))
            sizes = [len(part) for part in parts]
            count = min(self._wanted(split), sum(sizes))
            self._held_out[split] = _read(parts, Mixture(sizes), 0, count) if parts else []
        return self._held_out[split]

    def ptx_batch(self, position: int, rows: int) -> dict[str, Tensor]:
        """Blocks of the texts of ``ptx_sources``; their stream has no end.

        Args:
            position: How many blocks were read before.
            rows: How many blocks.

        Returns:
            ``input_ids`` and ``labels`` (rows, T), aligned (the model shifts them).

        Raises:
            UserError: When there are no texts.
        """
        if self.ptx is None:
            raise UserError("data: there are no texts to read; give some (--data.ptx_sources).")
        items = _read(self.ptx.train_parts, self.ptx.mixture, position, rows)
        return {
            name: torch.stack([item[name] for item in items]) for name in ("input_ids", "labels")
        }

    def first_batch(self) -> Batch:
        """The next training prompts, left-padded, read without moving the cursor."""
        count = min(_FIRST_PROMPTS, len(self.mixture))
        prompts = _read(self.train_parts, self.mixture, self._cursor.consumed, count)
        return left_padded(prompts, self.pad_token_id)

    # ----- what Lightning calls -----------------------------------------------------------------

    def prepare_data(self) -> None:
        """Tokenise the data where that was not done before, and log what it holds, once."""
        super().prepare_data()
        if self.ptx is not None:
            self.ptx.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Open the data and check that it has what the stage needs.

        Raises:
            UserError: When a split that is needed is empty, or the texts fill no sample.
        """
        super().setup(stage)
        if self.ptx is not None and stage in (None, "fit"):
            try:
                _ = self.ptx.mixture
            except UserError as error:
                raise UserError(f"ptx_sources: {error}") from error

    # The ground's loaders read what is there before training; these read what training makes.
    def train_dataloader(self) -> Any:
        """The training batches of the stage that answers the prompts.

        Raises:
            UserError: When the stage makes none.
        """
        if self.experience_loader is None:
            raise UserError(
                "data: prompts have no answers to train on; only PPO trains on them "
                "(recipes/ppo.py)."
            )
        return self.experience_loader()

    def _held_out_loader(self, split: Split) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        prompts = self.held_out_prompts(split)
        if not prompts:
            return []
        rank, world_size = self._place()
        return held_out_loader(
            _Places(len(prompts)),
            micro_batch_size=self.val_micro_batch_size,
            collate_fn=default_collate,
            rank=rank,
            world_size=world_size,
        )


def _read(parts: Sequence[Dataset[Any]], stream: SampleStream, start: int, count: int) -> list[Any]:
    """Items ``start ... start + count - 1`` of a stream over parts laid end to end."""
    items: ConcatDataset[Any] = ConcatDataset(parts)
    return [items[index] for index in stream.indices(start, start + count).tolist()]


class _Places(Dataset[Batch]):
    """Item ``i`` says that it is prompt ``i``."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Batch:
        return {"place": torch.tensor(index), "labels": torch.zeros(1, dtype=torch.long)}
