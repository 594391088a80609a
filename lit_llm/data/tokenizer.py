"""Tokenizers: train one, load one, and count the bytes that tokens stand for."""

import json
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llm.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, START_OF_TURN, END_OF_TURN)

# Every byte is a token, so no text is unknown.
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")

# ChatML. Contents are trimmed, so that no white space of theirs merges with the line feed of the
# header: what the model is given to answer is then token by token what it was trained on.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] | trim + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] | trim + '<|im_end|>' -}}"
    "{%- endif -%}"
    "{{- '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)

# How text is cut before merging: words with the space before them, single digits, punctuation and
# line feeds, white space. It is Qwen 2's pattern, because beside a Qwen 2 config.json AutoTokenizer
# puts that pattern in place of the one in tokenizer.json: so it changes nothing.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 4096, *, min_frequency: int = 2
) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer on texts.

    Byte pair encoding: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909.
    Any Unicode text survives encoding and decoding. ``<|endoftext|>`` ends a document (EOS) and, as
    in GPT-2, stands before the first one (BOS); nothing is added on encoding. ``<|pad|>`` is a
    token of its own. The chat template is ChatML with generation markers, so
    ``return_assistant_tokens_mask`` marks the assistant's words and their ``<|im_end|>``.

    Args:
        texts: Training texts, read once.
        vocab_size: Number of tokens, special tokens included; fewer result when the texts hold
            fewer pairs.
        min_frequency: Times a pair has to occur to become a token.

    Raises:
        UserError: When ``vocab_size`` leaves no room for the bytes and special tokens, or there is
            no text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens need at least {SMALLEST_VOCABULARY}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Offsets keep the space before a word, so that they cover the whole text.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    count = 0

    def counted() -> Iterator[str]:
        nonlocal count
        for text in texts:
            count += bool(text)
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if count == 0:
        raise UserError("there is no text to train a tokenizer on.")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        additional_special_tokens=[START_OF_TURN, END_OF_TURN],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: str | Path) -> Path:
    """Save a tokenizer as a folder that ``AutoTokenizer.from_pretrained`` loads.

    Raises:
        UserError: When the folder cannot be written.
    """
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot save the tokenizer there ({error.strerror}).") from error
    return folder


def bytes_per_token(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str]) -> float:
    """Bytes of UTF-8 a token holds on average: how well a tokenizer compresses texts.

    Raises:
        UserError: When there is no text.
    """
    size = tokens = 0
    for text in texts:
        size += len(text.encode())
        tokens += len(tokenizer(text, add_special_tokens=False)["input_ids"])
    if tokens == 0:
        raise UserError("there is no held-out text to measure bytes per token on.")
    return size / tokens


def load_tokenizer(
    name_or_path: str | Path, *, revision: str | None = None
) -> "PreTrainedTokenizerBase":
    """Load a tokenizer from a folder or the Hugging Face Hub; code from the Hub is never run.

    Args:
        name_or_path: A folder that ``save_pretrained`` wrote, a .gguf file, or a name on the Hub.
        revision: Branch, tag or commit on the Hub.

    Raises:
        UserError: When there is no such folder, no tokenizer in it, or the tokenizer has no EOS
            token.
    """
    path = Path(name_or_path).expanduser()
    name = str(path if path.exists() else name_or_path)
    if path.suffix.lower() == ".gguf":
        return _with_eos(_from_gguf(path), name_or_path)
    if path.is_file():
        raise UserError(f"{name_or_path}: is a file; give the folder that holds the tokenizer.")
    # "runs/tokenizer" is a name the Hub might know, but not beside a folder "runs".
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    looks_local = looks_local or ("/" in name and path.parent.is_dir())
    if not path.is_dir() and looks_local:
        raise UserError(
            f"{name_or_path}: there is no such tokenizer folder; recipes/tokenizer.py makes one."
        )
    if path.is_dir() and not any((path / file).is_file() for file in _TOKENIZER_FILES):
        raise UserError(
            f"{name_or_path}: holds no tokenizer (no tokenizer.json); "
            "recipes/tokenizer.py makes one."
        )
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # AutoTokenizer lets the config.json beside it overrule tokenizer.json for some kinds of model.
    loader = PreTrainedTokenizerFast if _is_plain(path) else AutoTokenizer
    # Asked once and early, since the loader tries for most of a minute where there is no network.
    problem = None if path.is_dir() else _hub_problem(name, revision)
    try:
        tokenizer = loader.from_pretrained(
            name,
            revision=revision or "main",
            trust_remote_code=False,
            local_files_only=path.is_dir() or problem is not None,
        )
    # The Hub client, its transport and the tokenizer formats raise errors of their own.
    except Exception as error:
        reason = _one_line(problem or str(error) or type(error).__name__)
        where = "the folder" if path.is_dir() else "the Hugging Face Hub (there is no such folder)"
        raise UserError(
            f"{name_or_path}: cannot load a tokenizer from {where}: {reason}."
        ) from error
    return _with_eos(tokenizer, name_or_path)


def _with_eos(
    tokenizer: "PreTrainedTokenizerBase", name_or_path: str | Path
) -> "PreTrainedTokenizerBase":
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{name_or_path}: the tokenizer has no EOS token, so documents could not be ended; "
            'set "eos_token" in its tokenizer_config.json.'
        )
    return tokenizer


def _from_gguf(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer inside a model file of llama.cpp."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such .gguf file.")
    if find_spec("gguf") is None:
        raise UserError(f"{path}: reading it needs gguf; pip install 'lit_llm[gguf]'.")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    # A damaged file shows in whatever the bytes happen to mean.
    except Exception as error:
        reason = _one_line(str(error) or type(error).__name__)
        raise UserError(f"{path}: the tokenizer in it cannot be read: {reason}.") from error


def _hub_problem(name: str, revision: str | None) -> str | None:
    """Why the Hub cannot give a model's files, or None when it can."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, revision=revision, timeout=10)
    # A copy in the cache may still do: the error is shown only when it does not.
    except Exception as error:
        return str(error) or type(error).__name__
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300].rstrip(". ")


def _is_plain(folder: Path) -> bool:
    """Whether tokenizer.json says it all: no class of a model family is asked for."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        kind = config.get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        return False
    plain = ("TokenizersBackend", "PreTrainedTokenizerFast")
    return kind in plain and (folder / "tokenizer.json").is_file()


def token_bytes(tokenizer: "PreTrainedTokenizerBase") -> "torch.Tensor":
    """Bytes of UTF-8 text that each token stands for, for bits per byte.

    The sum over the tokens of a text is its length in bytes; where a SentencePiece tokenizer puts a
    space before the first word, that space counts too. Special tokens are no text and count 0.

    Returns:
        Long tensor of shape (V,), V = largest id + 1, which is ``len(tokenizer)`` where ids have no
        gaps.

    Raises:
        UserError: For a tokenizer that is neither byte-level nor of the SentencePiece kind.
    """
    import torch

    vocabulary = tokenizer.get_vocab()
    byte_level = _is_byte_level(tokenizer, vocabulary)
    added = tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in added.items() if token.special}
    sizes = torch.zeros(max(vocabulary.values()) + 1, dtype=torch.long)
    for token, index in vocabulary.items():
        if index in special:
            continue
        if index in added:
            sizes[index] = len(token.encode())
        elif byte_level:
            sizes[index] = len(token)
        else:
            sizes[index] = _sentencepiece_bytes(token)
    return sizes


def _is_byte_level(tokenizer: "PreTrainedTokenizerBase", vocabulary: dict[str, int]) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    state = json.loads(decoder.__getstate__()) if decoder is not None else {}
    kinds: list[Any] = [step["type"] for step in state.get("decoders", [state]) if step]
    if "ByteLevel" in kinds:
        return True
    if "<0x0A>" in vocabulary or any(token.startswith("\u2581") for token in vocabulary):
        return False
    raise UserError(
        f"{tokenizer.name_or_path or 'the tokenizer'}: cannot tell how many bytes its "
        "tokens stand for; bits per byte needs a byte-level or SentencePiece tokenizer."
    )


def _sentencepiece_bytes(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("\u2581", " ").encode())
