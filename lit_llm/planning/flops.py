"""Floating-point operations of a training step, and what a device can do a second."""

import time
from typing import Any

import torch
from torch import nn


def training_flops_per_token(model: nn.Module, seq_len: int) -> float:
    """FLOPs of forward and backward for one token: 6 N + 4 F + 12 L D T.

    N and F, the trained parameters and the frozen ones (for which no gradient of their own is
    computed), are those that multiply activations: all but the input embeddings, with a tied output
    head counted once (PaLM, https://arxiv.org/abs/2204.02311, appendix B). Recomputation is not
    counted, as MFU asks for useful work.

    Args:
        model: A transformers causal language model.
        seq_len: Tokens a sequence.

    Returns:
        FLOPs a token.
    """
    config: Any = model.config
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]

    def flops(parameter: nn.Parameter) -> float:
        return (6.0 if parameter.requires_grad else 4.0) * parameter.numel()

    total = sum(map(flops, model.parameters()))
    if head is None or head.weight is not embeddings.weight:
        total -= flops(embeddings.weight)
    positions = getattr(getattr(model, "transformer", None), "wpe", None)
    if positions is not None:
        total -= flops(positions.weight)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return total + 12.0 * config.num_hidden_layers * heads * head_dim * seq_len


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOPs a second that one device can do: the vendor's number, or a measurement on a CPU.

    Args:
        device: Where the run computes.
        dtype: The type its matrix products are done in.

    Returns:
        FLOPs a second; ``None`` for a device that nobody has listed.
    """
    if device.type == "cpu":
        return _measured_matmul_flops(dtype)
    from lightning.fabric.utilities.throughput import get_available_flops

    available = get_available_flops(device, dtype)
    return None if available is None else float(available)


def _measured_matmul_flops(dtype: torch.dtype, size: int = 2048, repeats: int = 3) -> float:
    """Best of a few square products; takes a fraction of a second."""
    generator = torch.Generator().manual_seed(0)  # leaves the global random state alone
    a = torch.randn(size, size, generator=generator).to(dtype)
    b = torch.randn(size, size, generator=generator).to(dtype)
    torch.mm(a, b)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
