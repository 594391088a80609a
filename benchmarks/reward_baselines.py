"""What a reward model must beat on preference data: the length of an answer, and its words.

    python benchmarks/reward_baselines.py --sources python-docs
    python benchmarks/reward_baselines.py --sources "data/hh/*.jsonl.gz:hh" pairs.jsonl

The judges see the answers only. They learn from the training split of a source and are measured on
its test split, which the fractions make as a PreferenceDataModule with the same ones does (it also
leaves out what is repeated or too long). Lengths are characters.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from lit_llm.data.preferences import read_preferences
from lit_llm.data.records import RecordFormat, RecordSource
from lit_llm.data.sources import as_sources, source_labels
from lit_llm.data.splits import Split, assign_split, check_fractions
from lit_llm.errors import UserError
from lit_llm.evaluation.intervals import Rate, rate


@dataclass
class Pairs:
    """Texts of the better and the worse answers of one split, and whose pairs they are."""

    better: list[str] = field(default_factory=list)
    worse: list[str] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)

    def correct(self, better: Tensor, worse: Tensor) -> Rate:
        """Accuracy of scores of both, (P,) each; ties count one half."""
        right = (better > worse).double() + 0.5 * (better == worse).double()
        return rate(right, torch.tensor(self.prompts))


def parse_source(text: str, max_records: int | None = None) -> RecordSource:
    """A source from ``PATH`` or ``PATH:FORMAT``."""
    path, _, name = text.rpartition(":")
    known = bool(path) and name in get_args(RecordFormat)
    fields = {"path": path, "format": name} if known else {"path": text}
    return as_sources(fields | {"max_records": max_records}, RecordSource)[0]


def read_splits(
    source: RecordSource, val_fraction: float, test_fraction: float
) -> dict[Split, Pairs]:
    """The pairs of a source by split."""
    splits: dict[Split, Pairs] = {"train": Pairs(), "validation": Pairs(), "test": Pairs()}
    for number, preference in enumerate(read_preferences(source)):
        pairs = splits[
            assign_split(preference.group, val_fraction=val_fraction, test_fraction=test_fraction)
        ]
        texts = [answer_text(answer) for answer in preference.answers]
        for better, worse in preference.pairs:
            if texts[better] != texts[worse]:
                pairs.better.append(texts[better])
                pairs.worse.append(texts[worse])
                pairs.prompts.append(number)
    return splits


def answer_text(answer: list[dict[str, Any]] | str) -> str:
    """Text of an answer, its messages one after the other."""
    if isinstance(answer, str):
        return answer
    return "\n".join(str(message.get("content") or "") for message in answer)


def judge_length(train: Pairs, test: Pairs) -> tuple[str, Rate]:
    """Take the longer answer, or the shorter where that is right more often in training."""

    def lengths(texts: Iterable[str]) -> Tensor:
        return torch.tensor([float(len(text)) for text in texts])

    learned = train.correct(lengths(train.better), lengths(train.worse)).value
    sign, name = (1, "longer") if learned >= 0.5 else (-1, "shorter")
    found = test.correct(sign * lengths(test.better), sign * lengths(test.worse))
    return f"always the {name} answer", found


def judge_words(train: Pairs, test: Pairs) -> Rate:
    """TF-IDF of words and signs, logistic regression on better - worse.

    Every pair is there twice, the other way round too, and there is no intercept: the judge cannot
    tell which answer stands first. The pairs of a prompt share its weight.
    """
    import numpy as np
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    # Signs are words too: code and lists are made of them.
    words = TfidfVectorizer(token_pattern=r"(?u)\w+|[^\w\s]", sublinear_tf=True)
    words.fit([*train.better, *train.worse])
    differences = words.transform(train.better) - words.transform(train.worse)
    _, place, counts = np.unique(train.prompts, return_inverse=True, return_counts=True)
    weights = 1 / counts[place]
    labels = np.repeat([1, 0], len(train.better))
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    model.fit(vstack([differences, -differences]), labels, np.tile(weights, 2))
    weight = model.coef_[0]
    better, worse = (words.transform(texts) @ weight for texts in (test.better, test.worse))
    return test.correct(torch.from_numpy(better), torch.from_numpy(worse))


def baselines(splits: dict[Split, Pairs]) -> dict[str, Rate]:
    """Accuracy of each judge on the test split; nothing where a split is empty."""
    train, test = splits["train"], splits["test"]
    if not train.better or not test.better:
        return {}
    name, length = judge_length(train, test)
    return {name: length, "bag of words": judge_words(train, test)}


def table(rates: dict[str, Rate]) -> str:
    """A Markdown table."""
    lines = ["| judge | accuracy | 95 % interval | pairs | prompts |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {name} | {100 * one.value:.1f} % | {100 * one.low:.1f} to {100 * one.high:.1f} % "
        f"| {one.pairs:,} | {one.prompts:,} |"
        for name, one in rates.items()
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, dict[str, Rate]]:
    """Print a table for each source, and return what they hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sources",
        nargs="+",
        required=True,
        metavar="PATH[:FORMAT]",
        help="files, folders, globs, python-docs, or names of data sets on the Hub",
    )
    parser.add_argument("--val_fraction", type=float, default=0.05)
    parser.add_argument("--test_fraction", type=float, default=0.1)
    parser.add_argument("--max_records", type=int, help="read at most that many of each source")
    args = parser.parse_args(argv)
    results = {}
    try:
        check_fractions(args.val_fraction, args.test_fraction)
        sources = [parse_source(text, args.max_records) for text in args.sources]
        for label, source in zip(source_labels(sources), sources, strict=True):
            splits = read_splits(source, args.val_fraction, args.test_fraction)
            results[label] = baselines(splits)
            counts = ", ".join(f"{name} {len(one.better):,}" for name, one in splits.items())
            print(f"\n## {label}\n\nPairs: {counts}.\n")
            nothing = "There are too few to train on or to measure on."
            print(table(results[label]) if results[label] else nothing, flush=True)
    except UserError as error:
        parser.error(str(error))
    return results


if __name__ == "__main__":
    main()
