"""What one step of the 135M model is made of: matrix products, attention, vocabulary head.

    python benchmarks/parts.py
    python benchmarks/parts.py --repeats 30

Shapes of SmolLM2-135M at 4 sequences of 512 tokens, bfloat16, medians. Contestants of one table
take turns, so their ratios hold on a machine that is not quiet.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llm.functional.attention import blocked_causal_attention
from lit_llm.functional.language_model import linear_cross_entropy

BATCH, LENGTH, WIDTH, HEADS, KEY_HEADS, HEAD_WIDTH, VOCABULARY = 4, 512, 576, 9, 3, 64, 49152
TOKENS = BATCH * LENGTH


def medians(work: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, function in work.items():
            start = time.perf_counter()
            function()
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(one) * 1e3 for name, one in times.items()}


def show(title: str, rows: dict[str, float], flop: float | dict[str, float] | None = None) -> None:
    """Print milliseconds, and GFLOP/s where the work is known."""
    print(f"\n{title}")
    for name, ms in rows.items():
        done = flop[name] if isinstance(flop, dict) else flop
        rate = f"{done / ms / 1e6:8.0f} GFLOP/s" if done else ""
        print(f"  {name:34} {ms:9.2f} ms {rate}")


def products(repeats: int) -> None:
    """Forward, gradient of the input and gradient of the weight of each kind of layer."""
    layers = {
        "q, o": (WIDTH, WIDTH),
        "k, v": (WIDTH, KEY_HEADS * HEAD_WIDTH),
        "q, k, v packed": (WIDTH, WIDTH + 2 * KEY_HEADS * HEAD_WIDTH),
        "gate, up": (WIDTH, 1536),
        "gate, up packed": (WIDTH, 3072),
        "down": (1536, WIDTH),
        "head": (WIDTH, VOCABULARY),
    }
    work: dict[str, Callable[[], object]] = {}
    flop: dict[str, float] = {}
    for name, (inner, outer) in layers.items():
        x = torch.randn(TOKENS, inner, dtype=torch.bfloat16)
        weight = torch.randn(outer, inner, dtype=torch.bfloat16)
        grad = torch.randn(TOKENS, outer, dtype=torch.bfloat16)
        one: dict[str, Callable[[], object]] = {
            f"{name}: forward": lambda x=x, weight=weight: F.linear(x, weight),
            f"{name}: gradient of x": lambda grad=grad, weight=weight: grad @ weight,
            f"{name}: gradient of weight": lambda grad=grad, x=x: grad.t() @ x,
        }
        work |= one
        flop |= dict.fromkeys(one, 2.0 * TOKENS * inner * outer)
    show("matrix products", medians(work, repeats), flop)


def _differentiated(function: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], object]:
    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        function(*leaves).sum().backward()

    return run


def attention(repeats: int) -> None:
    """torch's fused attention and ours, forward and backward, one layer."""

    def leaf(heads: int) -> Tensor:
        shape = (BATCH, heads, LENGTH, HEAD_WIDTH)
        return torch.randn(shape, dtype=torch.bfloat16).requires_grad_()

    def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    leaves = leaf(HEADS), leaf(KEY_HEADS), leaf(KEY_HEADS)
    work = {
        "scaled_dot_product_attention": _differentiated(fused, *leaves),
        "blocked_causal_attention": _differentiated(blocked_causal_attention, *leaves),
    }
    show("attention, forward + backward", medians(work, repeats))


def head(repeats: int) -> None:
    """Loss from hidden states and float32 weights under autocast, forward and backward."""
    targets = torch.randint(VOCABULARY, (TOKENS,))
    hidden = torch.randn(TOKENS, WIDTH).requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH) * 0.02).requires_grad_()

    def full(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = F.linear(hidden, weight)
        return F.cross_entropy(logits.float(), targets)

    def torchs(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)

    def ours(rows: int) -> Callable[[Tensor, Tensor], Tensor]:
        def run(hidden: Tensor, weight: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return linear_cross_entropy(hidden, weight, targets, chunk_size=rows).loss

        return run

    work = {"full logits": _differentiated(full, hidden, weight)}
    if hasattr(F, "linear_cross_entropy"):
        work["F.linear_cross_entropy"] = _differentiated(torchs, hidden, weight)
    for rows in (256, 512, 1024, 2048):
        work[f"linear_cross_entropy, {rows} rows"] = _differentiated(ours(rows), hidden, weight)
    flop = 6.0 * TOKENS * WIDTH * VOCABULARY
    show("vocabulary head and loss, forward + backward", medians(work, max(3, repeats // 4)), flop)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=12)
    repeats = parser.parse_args(argv).repeats
    products(repeats)
    attention(repeats)
    head(repeats)


if __name__ == "__main__":
    main()
