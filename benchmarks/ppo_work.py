"""The work of the PPO benchmark, and the process that does it; torch and transformers only.

The contestants run in different environments, so what they share, weights, prompts and tokenizer,
is a folder on disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants import peak_memory

LEARNING_RATE, BETAS, EPS = 1e-6, (0.9, 0.95), 1e-5
KL_COEF, VF_COEF, CLIP_RANGE, GAMMA, GAE_LAMBDA = 0.05, 0.1, 0.2, 1.0, 0.95
PAD, END = "<|pad|>", "<|endoftext|>"

SHAPES: dict[str, dict[str, int]] = {
    # SmolLM2-135M's width with 8 of its 30 layers.
    "full": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "prompts": 16,
        "prompt_len": 64,
        "new_tokens": 64,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "prompts": 8,
        "prompt_len": 6,
        "new_tokens": 5,
    },
}


@dataclass(frozen=True)
class Work:
    """One size of the benchmark.

    Attributes:
        size: Which of ``SHAPES``.
        repeats: Iterations, or rollouts.
        folder: Where ``prepare`` wrote what all contestants read.
    """

    size: str
    repeats: int
    folder: Path
    num_minibatches: int = 4

    @property
    def prompts(self) -> int:
        """Prompts of an iteration, each answered once."""
        return SHAPES[self.size]["prompts"]

    @property
    def prompt_len(self) -> int:
        """Tokens of every prompt."""
        return SHAPES[self.size]["prompt_len"]

    @property
    def new_tokens(self) -> int:
        """Tokens of every response: nothing stops one before."""
        return SHAPES[self.size]["new_tokens"]

    @property
    def policy(self) -> Path:
        """Folder of the policy, which is the reference too."""
        return self.folder / "policy"

    @property
    def reward(self) -> Path:
        """Folder of the reward model, which the value model starts from."""
        return self.folder / "reward"

    @property
    def texts(self) -> Path:
        """File with the prompts as texts, one JSON record a line."""
        return self.folder / "prompts.jsonl"


def prepare(work: Work) -> None:
    """Write models with random weights, a tokenizer of as many words, and prompts."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    shape = dict(SHAPES[work.size])
    for name in ("prompts", "prompt_len", "new_tokens"):
        shape.pop(name)
    words = shape["vocab_size"] - 2
    config = LlamaConfig(
        **shape,
        max_position_embeddings=max(256, work.prompt_len + work.new_tokens),
        initializer_range=0.041666666666666664,
        tie_word_embeddings=True,
        pad_token_id=words,
        bos_token_id=None,
        eos_token_id=words + 1,
    )
    tokenizer = _tokenizer(words)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(work.policy)
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(work.reward)
    tokenizer.save_pretrained(work.policy)
    tokenizer.save_pretrained(work.reward)
    count = work.prompts * work.repeats
    rows = torch.randint(words, (count, work.prompt_len)).tolist()
    with work.texts.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"prompt": " ".join(f"w{token}" for token in row)}) + "\n")


def _tokenizer(words: int) -> Any:
    """Words ``w0``, ``w1`` ... parted by spaces, then the two special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{number}": number for number in range(words)} | {PAD: words, END: words + 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, padding_side="left"
    )


def read_prompts(work: Work, tokenizer: Any) -> list[list[int]]:
    """Token ids of all prompts."""
    lines = work.texts.read_text(encoding="utf-8").splitlines()
    return [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]


class Clock:
    """Takes the time of repeats, from the end of one to the end of the next.

    A contestant calls ``tick`` when a repeat is done, and ``sampled`` when it has sampled.
    """

    def __init__(self) -> None:
        self.ticks: list[float] = []
        self.lengths: list[float] = []
        self.rollouts: list[float] = []

    def tick(self) -> None:
        """A repeat is done."""
        self.ticks.append(time.perf_counter())

    def sampled(self, length: float, seconds: float) -> None:
        """Responses of that mean length were sampled in that time."""
        self.lengths.append(length)
        self.rollouts.append(seconds)

    def measures(self, warmup: int) -> dict[str, float]:
        """Medians of the repeats after the first ones, and this process's peak of memory."""
        seconds = [after - before for before, after in pairwise(self.ticks)]
        return {
            "seconds": statistics.median(seconds[warmup - 1 :]),
            "rollout_seconds": statistics.median(self.rollouts[warmup:]),
            "response_length": statistics.mean(self.lengths),
            "peak_bytes": peak_memory(),
        }


Contestant = Callable[[Work, Clock], None]


def run(contestants: dict[str, Contestant]) -> None:
    """Run the contestant that the command line names; the last line is its measures as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("contestant", choices=contestants)
    parser.add_argument("--size", choices=SHAPES, required=True)
    parser.add_argument("--iterations", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    clock = Clock()
    with redirect_stdout(sys.stderr):
        contestants[args.contestant](
            Work(args.size, args.iterations + args.warmup, args.folder), clock
        )
    print(json.dumps(clock.measures(args.warmup)), flush=True)
