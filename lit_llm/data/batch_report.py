"""A batch as people see it: which tokens are trained on, and which are only read.

Legend: B batch, T sequence.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_llm.data.packing import IGNORED

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

# Signs beside the colours: the report goes to files and pipes too.
_OPEN, _CLOSE, _NEWLINE, _DOT = "«", "»", "⏎", "·"
_STYLES = {True: "green", False: "dim"}
_PADDING = "on grey23"
_MOST_DOTS = 40


def batch_report(batch: dict[str, Tensor], tokenizer: "PreTrainedTokenizerBase") -> "Text":
    """Show a batch of fine-tuning token by token, to be read before a run is trusted.

    A header counts the tokens; then comes every row, or every document of a packed row. What is
    trained on is green and stands in «», the rest is dim; special tokens are bold, a line feed is
    ⏎, padding is dots. The first token of a row counts as read, since nothing predicts it. Prompts
    that are yet to be answered are read only.

    Args:
        batch: ``input_ids`` and ``labels`` (B, T), with ``attention_mask`` (B, T) where rows are
            padded, or ``document_ids`` (B, T), -1 at padding, where they are packed; ``source``
            (B,) is shown where it is given. Of preferences also ``pairs`` (P, 2), rows of a better
            and a worse answer, and ``pair_source`` (P,). Prompts have no ``labels``, and padding on
            the left.
        tokenizer: What made the ids.
    """
    input_ids = batch["input_ids"]
    has_targets = "labels" in batch
    trained = batch.get("labels", torch.full_like(input_ids, IGNORED)) != IGNORED
    trained[:, 0] = False
    documents = batch.get("document_ids")
    if documents is None:  # a row is one document then
        documents = batch.get("attention_mask", torch.ones_like(input_ids)) - 1
    report = _header(trained, documents == -1, has_targets)
    for row, ids in enumerate(input_ids):
        name = f"row {row}{_about_row(batch, row)}"
        side = " on the left" if int(documents[row, 0]) == -1 else ""
        # Padding comes last, wherever it stands, so that what follows the title is the text.
        for document in sorted(documents[row].unique_consecutive().tolist(), key=(-1).__eq__):
            own = documents[row] == document
            size = int(own.sum())
            if document == -1:
                dots = _DOT * min(size, _MOST_DOTS)
                report.append(dots, _PADDING).append(f" {size} padding{side}\n")
                continue
            part = f"{name}, document {document}" if "document_ids" in batch else name
            about = f", {int(trained[row, own].sum())} trained on" if has_targets else ""
            report.append(f"\n{part}: {size} tokens{about}\n")
            _append_document(report, tokenizer, ids[own].tolist(), trained[row, own].tolist())
    return report


def _about_row(batch: dict[str, Tensor], row: int) -> str:
    if "pairs" not in batch:
        return f", source {int(batch['source'][row])}" if "source" in batch else ""
    about = ""
    for (better, worse), source in zip(
        batch["pairs"].tolist(), batch["pair_source"].tolist(), strict=True
    ):
        if row in (better, worse):
            about = about or f", source {source}"
            about += f", better than row {worse}" if row == better else f", worse than row {better}"
    return about


def _header(trained: Tensor, padding: Tensor, has_targets: bool) -> "Text":
    from rich.text import Text

    rows, width = trained.shape
    counts = {"trained on": int(trained.sum()), "padding": int(padding.sum())}
    counts["read"] = trained.numel() - sum(counts.values())
    shares = (
        f"{counts[name]} {name} ({counts[name] / trained.numel():.0%})"
        for name in ("trained on", "read", "padding")
        if has_targets or name != "trained on"
    )
    header = Text(f"{rows} rows x {width} tokens: {', '.join(shares)}\n")
    if has_targets:
        header.append(f"{_OPEN}trained on{_CLOSE}", _STYLES[True]).append(" ")
    header.append("read", _STYLES[False]).append(" ")
    header.append(_DOT * 3, _PADDING).append(f" padding {_NEWLINE} line feed\n")
    return header


def _append_document(
    report: "Text", tokenizer: "PreTrainedTokenizerBase", ids: list[int], trained: list[bool]
) -> None:
    open_ = False
    for text, is_trained, is_special in _pieces(tokenizer, ids, trained):
        if open_ and not is_trained:
            report.append(_CLOSE, _STYLES[True])
        if is_trained and not open_:
            report.append(_OPEN, _STYLES[True])
        open_ = is_trained
        style = _STYLES[is_trained] + (" bold" if is_special else "")
        report.append(text.replace("\n", f"{_NEWLINE}\n"), style)
    if open_:
        report.append(_CLOSE, _STYLES[True])
    if not report.plain.endswith("\n"):
        report.append("\n")


def _pieces(
    tokenizer: "PreTrainedTokenizerBase", ids: list[int], trained: list[bool]
) -> Iterator[tuple[str, bool, bool]]:
    """Text of runs of tokens of one kind: (text, trained on, special)."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    stop, before = 0, ""
    pairs = zip(trained, (index in special for index in ids), strict=True)
    for (is_trained, is_special), run in groupby(pairs):
        stop += len(list(run))
        # Decoded from the start: alone, a piece may lose the space before its first word.
        text = str(
            tokenizer.decode(
                ids[:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
        yield text[len(before) :], is_trained, is_special
        before = text
