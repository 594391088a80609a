"""What became of preferences on their way to the disk, in numbers and in sentences."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from lit_llm.data.chat_cache import ChatCounts, counts_line

_FEW = 10  # contradictions that may be chance
_MANY = 0.1  # share of what was cut or left out that is worth a warning


@dataclasses.dataclass
class PreferenceCounts(ChatCounts):
    """What became of the preferences of one source.

    Samples are prompts. Of those that are neither repeated nor held out the pairs are counted too:
    each is in a split or was left out for one of the reasons below.

    Attributes:
        unusable: Prompts without a pair: the record compares nothing.
        pairs: All pairs.
        empty: Pairs with an answer without text.
        identical: Pairs whose answers have the same text, but for white space around it.
        repeated: Pairs that a prompt has twice, or that came before among other answers.
        contradictory: Pairs that came before the other way round.
        unfit: Pairs with an answer that alone is longer than the context.
        plain: Prompts in a split that are plain text, without the chat template.
        unasked: Those of them that are empty.
        with_margin: Pairs in a split whose margin the data gives.
        negative_margin: Those of them where it is below 0.
    """

    units: ClassVar[tuple[str, ...]] = ("samples", "tokens", "pairs")

    unusable: int = 0
    pairs: int = 0
    empty: int = 0
    identical: int = 0
    repeated: int = 0
    contradictory: int = 0
    unfit: int = 0
    plain: int = 0
    unasked: int = 0
    with_margin: int = 0
    negative_margin: int = 0

    def __str__(self) -> str:
        """One line: what was left out or cut, and why."""
        left_out = {
            "repeated": self.duplicates,
            "with the beginning of one in another split": self.held_out,
            "without two answers to compare": self.unusable,
            "with answers longer than seq_len": self.too_long,
            "pairs with an empty answer": self.empty,
            "pairs of equal answers": self.identical,
            "repeated pairs": self.repeated,
            "pairs that contradict one read before": self.contradictory,
            "pairs with an answer longer than seq_len": self.unfit,
        }
        changed = {
            "prompts are plain text": self.plain,
            "pairs have a margin": self.with_margin,
            "lost the beginning of their prompt": self.prompt_cut,
            "hold the text of a special token": self.control_text,
            "have an answer that does not end with a stop token": self.unended,
        }
        read = f"{self.read:,} prompts read, with {self.pairs:,} pairs"
        return counts_line(read, left_out, changed)

    def split_line(self, split: str) -> str:
        """What a split holds, in words."""
        own = self.splits[split]
        return f"{own['samples']:,} prompts, {own['pairs']:,} pairs, {own['tokens']:,} tokens"

    @property
    def looks_swapped(self) -> bool:
        """Whether so many pairs contradict earlier ones that the columns must be swapped.

        People who judge the same pair disagree, but not most of the time. A prompt that is repeated
        as a whole counts as one pair that came twice the same way.
        """
        confirmed = self.repeated + self.duplicates
        return self.contradictory >= _FEW and self.contradictory > confirmed

    def why_empty(self, seq_len: int) -> str:
        """One sentence on why nothing is left for training, and what to do."""
        if self.pairs and self.identical == self.pairs:
            return (
                f"chosen and rejected are equal in all {self.pairs} pairs; the same column was "
                "given twice? Look at the data, and at rename and format of the source."
            )
        if self.pairs and self.empty == self.pairs:
            return (
                f"an answer is empty in all {self.pairs} pairs; look at the data, and at rename "
                "and format of the source."
            )
        if self.unfit and self.unfit == self.pairs - self.identical - self.empty - self.repeated:
            return (
                f"all {self.unfit} pairs are too long: one answer alone fills more than seq_len "
                f"{seq_len}; raise data.seq_len."
            )
        if self.contradictory > sum(own["pairs"] for own in self.splits.values()):
            return (
                f"{self.contradictory} of its {self.pairs} pairs contradict pairs that were read "
                "before; chosen and rejected may be swapped in one of the sources."
            )
        return (
            f"nothing of {self.read} prompts is left for training ({self}); give more data or "
            "smaller held-out fractions."
        )

    def warnings(self) -> Iterator[str]:
        """What is to be looked at before the data is trusted, each in one sentence."""
        yield from super().warnings()
        kept = sum(own["samples"] for own in self.splits.values())
        if self.prompt_cut > _MANY * kept:
            yield (
                f"{self.prompt_cut:,} of {kept:,} prompts lost their beginning; "
                "raise data.seq_len if it matters"
            )
        if self.unfit > _MANY * self.pairs:
            yield (
                f"{self.unfit:,} of {self.pairs:,} pairs are left out, for an answer is longer "
                "than seq_len; raise data.seq_len"
            )
        if self.contradictory:
            yield (
                f"{self.contradictory:,} pairs are left out that came before the other way round; "
                "people may disagree, but look whether chosen and rejected are swapped somewhere"
            )
        if self.plain:
            yield (
                f"{self.plain:,} prompts are plain text and go without the chat template; for a "
                "chat model set format: chat_preference (answers in a list: rename: "
                "{prompt: instruction})"
            )
        if self.unasked:
            yield (
                f"{self.unasked:,} prompts are empty; if the question stands in another field, "
                "rename it to prompt"
            )
        if self.negative_margin:
            yield (
                f"{self.negative_margin:,} of {self.with_margin:,} margins are negative, as if the "
                "rejected answer were the better one; look at the data"
            )
