"""Loss, perplexity, bits per byte and token accuracy from sums over tokens.

Shapes: B batch, T sequence, K sources.
"""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenMetrics(Metric):
    """Sums of negative log-likelihood over target tokens, over batches and ranks.

    Perplexity is exp(total NLL / total tokens), never a mean of batch perplexities; bits per byte
    is total NLL / ln 2 / total bytes of the predicted text, comparable across tokenizers.

    Args:
        sources: Names of the sources; with more than one, each also gets a perplexity of its own.
    """

    full_state_update = False
    nll: Tensor
    tokens: Tensor
    correct: Tensor
    bytes: Tensor

    def __init__(self, sources: list[str] | None = None) -> None:
        super().__init__()
        self.sources = sources or ["all"]
        for name, dtype in (
            ("nll", torch.float64),
            ("tokens", torch.long),
            ("correct", torch.long),
            ("bytes", torch.long),
        ):
            zeros = torch.zeros(len(self.sources), dtype=dtype)
            self.add_state(name, default=zeros, dist_reduce_fx="sum")

    def update(
        self,
        nll: Tensor,
        correct: Tensor,
        mask: Tensor,
        source: Tensor | None = None,
        num_bytes: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            nll: Negative log-likelihood of each target token in nats, (B, T).
            correct: Whether the most likely token was the target, (B, T).
            mask: True where there is a target, (B, T).
            source: Index of each row's source, (B,); ``None`` is the first source.
            num_bytes: Bytes of text each target stands for, (B, T); ``None`` leaves bits per byte
                out.
        """
        if source is None:
            source = torch.zeros(mask.shape[0], dtype=torch.long, device=mask.device)
        self.nll.index_add_(0, source, (nll * mask).double().sum(1))
        self.tokens.index_add_(0, source, mask.sum(1))
        self.correct.index_add_(0, source, (correct & mask).sum(1))
        if num_bytes is not None:
            self.bytes.index_add_(0, source, (num_bytes * mask).sum(1))

    def compute(self) -> dict[str, float]:
        """Return loss, perplexity, token_accuracy, and bits_per_byte where bytes are known."""
        nll, tokens = float(self.nll.sum()), int(self.tokens.sum())
        if tokens == 0:
            return {}
        result = {
            "loss": nll / tokens,
            "perplexity": math.exp(min(nll / tokens, 700.0)),
            "token_accuracy": int(self.correct.sum()) / tokens,
        }
        num_bytes = int(self.bytes.sum())
        if num_bytes:
            result["bits_per_byte"] = nll / math.log(2) / num_bytes
        if len(self.sources) > 1:
            for index, name in enumerate(self.sources):
                if int(self.tokens[index]):
                    mean = float(self.nll[index]) / int(self.tokens[index])
                    result[f"perplexity/{name}"] = math.exp(min(mean, 700.0))
        return result
