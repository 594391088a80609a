"""Perplexity and bits per byte of held-out texts, in strided windows where they are long.

Perplexity is exp(total NLL / total tokens), and depends on the tokenizer; bits per byte is total
NLL / ln 2 / total bytes of UTF-8, and compares models of any tokenizer. Both are weighted by
tokens, never means of a document's means. Strided windows: https://huggingface.co/docs/transformers
/perplexity, and "Shortformer" (Press et al. 2021, https://arxiv.org/abs/2012.15832, section 2).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lit_llm.data.cleaning import Cleaning
from lit_llm.data.deduplication import Deduplication
from lit_llm.data.sources import PYTHON_DOCS, Source, read_documents
from lit_llm.data.splits import split_corpus
from lit_llm.data.tokenizer import token_bytes
from lit_llm.errors import UserError
from lit_llm.evaluation.results import Items, Measurement, measure
from lit_llm.evaluation.windows import Window, score_windows, strided_windows
from lit_llm.rollout.generation import max_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_llm.evaluation.harness_model import HarnessModel

LONGEST_WINDOW = 2048

# Below that, resampling documents says little, and one long text would have no interval at all:
# the windows are resampled instead. Neighbours are alike, so that interval is rather too narrow.
FEW_DOCUMENTS = 20

_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)


class Part(NamedTuple):
    """What the targets of one window gave.

    Attributes:
        nll: Sum of their negative log-likelihoods, in nats.
        tokens: How many they are.
        bytes: Bytes of the text they cover, in UTF-8.
    """

    nll: float
    tokens: int
    bytes: int


class Texts(NamedTuple):
    """A data set to measure perplexity on.

    Attributes:
        name: Its name.
        documents: Its texts.
    """

    name: str
    documents: list[str]


@dataclass(frozen=True)
class TextScore:
    """What a model gave to a text.

    Attributes:
        key: What names the text, the same for every model.
        parts: What each window of it gave; every token is a target once.
    """

    key: str
    parts: list[Part]

    @property
    def whole(self) -> Part:
        """The sums over all windows."""
        return Part(
            math.fsum(part.nll for part in self.parts),
            sum(part.tokens for part in self.parts),
            sum(part.bytes for part in self.parts),
        )


def perplexity(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_tokens: int = 4096,
    dtype: torch.dtype | None = None,
    ranks: Any = None,
) -> list[TextScore]:
    """Score every token of some texts, each once, and leave the model as it was.

    A text begins with BOS (EOS where there is none), which is no target, so its first token counts
    too. The first window scores all of its targets, each later one its last ``stride``: those have
    at least ``window - stride`` tokens before them.

    Args:
        model: A transformers causal language model, possibly wrapped by peft.
        tokenizer: Its tokenizer. Names of special tokens in a text are text.
        texts: The texts.
        window: Tokens the model reads at once; by default its positions, 2,048 at most.
        stride: Tokens by which the windows move on; by default half a window.
        batch_tokens: Most tokens that go through the model at once, with padding.
        dtype: What products are computed in, by autocast where the weights have another type;
            ``None`` is the weights' own.
        ranks: Group of processes that share the work; each gets all scores.

    Returns:
        One score a text, in their order.

    Raises:
        UserError: A text is empty, or window and stride do not fit each other or the model.
    """
    window, stride = window_and_stride(model, window, stride)
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if prefix is None:
        raise UserError(
            "perplexity: the tokenizer has neither a BOS nor an EOS token to begin with"
        )
    sizes = _token_sizes(tokenizer)
    windows: list[Window] = []
    shares: list[tuple[str, list[tuple[int, int]]]] = []  # tokens and bytes of each window
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]
        if not ids:
            raise UserError(f"perplexity: text {number} is empty; leave it out")
        own = strided_windows([prefix, *ids], window, stride)
        windows += own
        counts = [part.targets for part in own]
        covered = _covered_bytes(ids, counts, len(text.encode()), sizes)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        shares.append((key, list(zip(counts, covered, strict=True))))
    scores = iter(
        score_windows(
            model,
            windows,
            pad_token_id=prefix,
            batch_tokens=batch_tokens,
            dtype=dtype,
            ranks=ranks,
        )
    )
    return [
        TextScore(key, [Part(next(scores).nll, tokens, size) for tokens, size in own])
        for key, own in shares
    ]


def perplexity_measurements(name: str, scores: Sequence[TextScore]) -> list[Measurement]:
    """Perplexity and bits per byte of a data set, with 95 % intervals.

    The items are documents, or windows where there are fewer than 20 documents. Windows of two
    models are items of the same name only where the texts were cut at the same places.

    Args:
        name: Name of the data set.
        scores: What a model gave to its texts.

    Raises:
        UserError: There are no texts.
    """
    if not scores:
        raise UserError(f"{name}: there is no text to measure perplexity on")
    if len(scores) < FEW_DOCUMENTS:
        found = [
            (f"{score.key}/{_layout(score)}/{number}", part)
            for score in scores
            for number, part in enumerate(score.parts)
        ]
    else:
        found = [(score.key, score.whole) for score in scores]
    keys = [key for key, _ in found]
    nats = [part.nll for _, part in found]
    tokens = Items(keys, nats, [float(part.tokens) for _, part in found])
    sizes = [float(part.bytes) for _, part in found]
    bits = Items(keys, [own / math.log(2) for own in nats], sizes)
    return [
        measure(name, "perplexity", tokens, better="lower", scale="exp"),
        measure(name, "bits_per_byte", bits, better="lower"),
    ]


def score_texts(
    lm: HarnessModel, texts: Texts, *, window: int | None = None, stride: int | None = None
) -> list[TextScore]:
    """:func:`perplexity` of a data set, under a model and the settings it came with.

    Args:
        lm: The model.
        texts: The texts.
        window: Tokens the model reads at once.
        stride: Tokens by which the windows move on.
    """
    return perplexity(
        lm.model,
        lm.tokenizer,
        texts.documents,
        window=window,
        stride=stride,
        batch_tokens=lm.batch_tokens,
        dtype=lm.dtype,
        ranks=lm.ranks,
    )


def named_path(spec: str) -> tuple[str, str]:
    """Name and path of ``NAME=PATH``, or of ``PATH`` with a name made from it.

    Args:
        spec: Either of them; a file whose own name holds ``=`` is a path.
    """
    named = _NAMED.fullmatch(spec)
    if named and not Path(spec).expanduser().exists():
        return named[1], named[2]
    return Source(spec).label, spec


def read_texts(spec: str, *, max_documents: int | None = None) -> Texts:
    """Read the texts to measure perplexity on, in an order that is always the same.

    A .txt or .md file is one document, which the windows stride over. ``python-docs`` gives its
    test split only, which pre-training with the default settings has not seen.

    Args:
        spec: ``NAME=PATH`` or ``PATH``: a file, folder or glob (.txt, .md, .jsonl, .parquet, each
            also with .gz or .zst), the name of a data set on the Hugging Face Hub, or
            ``python-docs``.
        max_documents: Read the first documents only.

    Returns:
        The texts and their name.

    Raises:
        UserError: Something cannot be read, or holds no text.
    """
    name, path = named_path(spec)
    source = Source(path, documents="file")
    source.check()
    texts = list(islice(_texts(source), max_documents))
    if not any(texts):
        raise UserError(f"{source.path}: there is no text in it to measure perplexity on")
    return Texts(name, texts)


def _texts(source: Source) -> Iterable[str]:
    if source.path == PYTHON_DOCS:
        return split_corpus([source], Cleaning(), Deduplication()).texts("test")
    return (document.text for document in read_documents(source))


def window_and_stride(model: Any, window: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride that a model's texts are read by, from those asked for.

    Args:
        model: The model.
        window: Tokens it reads at once; by default its positions, 2,048 at most.
        stride: Tokens by which the windows move on; by default half a window.

    Raises:
        UserError: They do not fit each other or the model.
    """
    positions = max_positions(model)
    if window is None:
        window = min(positions or LONGEST_WINDOW, LONGEST_WINDOW)
    if positions is not None and window > positions:
        raise UserError(
            f"perplexity: window {window} exceeds the {positions} positions of the model"
        )
    if window < 2:
        raise UserError(f"perplexity: a window of {window} tokens is too short; 2 are the least")
    stride = window // 2 if stride is None else stride
    if not 1 <= stride <= window:
        raise UserError(f"perplexity: stride {stride} must lie between 1 and the window, {window}")
    return window, stride


def _token_sizes(tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    try:
        return token_bytes(tokenizer).tolist()
    except UserError:
        return None


def _covered_bytes(
    ids: Sequence[int], counts: Sequence[int], size: int, sizes: Sequence[int] | None
) -> list[int]:
    """Bytes of the text that each window's targets cover; their sum is ``size``.

    Where the tokens do not add up to the text (SentencePiece puts a space before it, an unknown
    character is no byte) they are taken in proportion, and all alike where nothing is known.
    """
    each = [1] * len(ids) if sizes is None else [sizes[token] for token in ids]
    total, done, place = sum(each), 0, 0
    covered: list[int] = []
    for count in counts:
        done += sum(each[place : place + count])
        place += count
        end = size if place == len(ids) else round(size * done / max(total, 1))
        covered.append(end - sum(covered))
    return covered


def _layout(score: TextScore) -> str:
    """Names where a text was cut: numbers of windows mean the same only with the same cuts."""
    cuts = ",".join(str(part.bytes) for part in score.parts)
    return hashlib.sha256(cuts.encode()).hexdigest()[:8]
