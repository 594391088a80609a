"""What the updates of an iteration have done so far, as sums over response tokens."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_llm.functional.policy_gradient import PolicyLoss, ValueLoss
from lit_llm.modules.ppo_config import PPOConfig

_SUMS = (
    "tokens",
    "policy",
    "clipped",
    "approxkl",
    "ratio",
    "entropy",
    "value",
    "value_clipped",
    "value_tokens",
    "ptx",
    "ptx_tokens",
)


class UpdateSums:
    """Sums over the response tokens of a minibatch, or of an iteration, and the largest ratios.

    Kept as sums, since means over micro-batches of unequal token counts are no means over tokens.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = dict.fromkeys(_SUMS, torch.tensor(0.0))
        self._largest = torch.zeros(2)
        self.steps = 0
        """Minibatches that were learned from."""
        self.skipped = 0
        """Minibatches that were not, as the policy had moved too far."""
        self.first_ratio_error = 0.0
        """Largest distance of a ratio from 1 in the first minibatch, where all should be 1."""

    def add(
        self, policy: PolicyLoss, value: ValueLoss | None, entropy: Tensor, mask: Tensor
    ) -> None:
        """Add a micro-batch.

        Args:
            policy: Sums of the policy's loss.
            value: Sums of the critic's loss.
            entropy: Sum of the entropies, 0-dim.
            mask: (B, R), which tokens were summed over.
        """
        tokens = mask.sum()
        added = {
            "tokens": tokens,
            "policy": policy.loss,
            "clipped": policy.clipped,
            "approxkl": policy.approxkl,
            "ratio": policy.ratio,
            "entropy": entropy,
        }
        if value is not None:
            added |= {"value": value.loss, "value_clipped": value.clipped, "value_tokens": tokens}
        self._add(added)
        found = torch.stack([policy.ratio_max, policy.ratio_error]).detach().double()
        self._largest = torch.maximum(self._largest.to(found), found)

    def add_ptx(self, loss: Tensor, tokens: Tensor) -> None:
        """Add a micro-batch of pre-training: its summed loss, and its target tokens."""
        self._add({"ptx": loss, "ptx_tokens": tokens})

    def _add(self, added: dict[str, Tensor]) -> None:
        for name, value in added.items():
            now = value.detach().double()
            self._sums[name] = self._sums[name].to(now) + now

    def over_ranks(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> "UpdateSums":
        """The same over all data-parallel ranks.

        Args:
            sum_over_ranks: Sums a tensor over them.
        """
        result, device = UpdateSums(), self._largest.device
        stacked = torch.stack([self._sums[name].to(device) for name in _SUMS])
        result._sums = dict(zip(_SUMS, sum_over_ranks(stacked).cpu().double(), strict=True))
        largest = self._largest.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        result._largest = largest.cpu().double()
        result.steps = 1
        return result

    def join(self, step: "UpdateSums") -> None:
        """Add the sums of a minibatch to those of the iteration."""
        if self.steps == 0:
            self.first_ratio_error = float(step._largest[1])
        self._add(step._sums)
        self._largest = torch.maximum(self._largest.to(step._largest), step._largest)
        self.steps += step.steps

    def measures(self) -> dict[str, float]:
        """Means over tokens, under the names of the field; empty before the first update."""
        sums = {name: float(value) for name, value in self._sums.items()}
        if not sums["tokens"]:
            return {"policy/skipped": float(self.skipped)} if self.skipped else {}
        tokens = sums["tokens"]
        found = {
            "loss/policy": sums["policy"] / tokens,
            "policy/clipfrac": sums["clipped"] / tokens,
            "policy/approxkl": sums["approxkl"] / tokens,
            "policy/ratio_mean": sums["ratio"] / tokens,
            "policy/ratio_max": float(self._largest[0]),
            "policy/entropy": sums["entropy"] / tokens,
            "policy/first_ratio_error": self.first_ratio_error,
            "policy/skipped": float(self.skipped),
        }
        if sums["value_tokens"]:
            found["loss/value"] = sums["value"] / sums["value_tokens"]
            found["value/clipfrac"] = sums["value_clipped"] / sums["value_tokens"]
        if sums["ptx_tokens"]:
            found["loss/ptx"] = sums["ptx"] / sums["ptx_tokens"]
        return found

    def loss(self, config: PPOConfig) -> float:
        """The loss that was minimised, from its parts."""
        found = self.measures()
        return (
            found.get("loss/policy", 0.0)
            + config.vf_coef * found.get("loss/value", 0.0)
            - config.ent_coef * found.get("policy/entropy", 0.0)
            + config.ptx_coef * found.get("loss/ptx", 0.0)
        )

    def state(self) -> dict[str, Any]:
        """The sums of an iteration as plain data, for a checkpoint."""
        return {
            "sums": {name: float(value) for name, value in self._sums.items()},
            "largest": self._largest.tolist(),
            "steps": self.steps,
            "skipped": self.skipped,
            "first_ratio_error": self.first_ratio_error,
        }

    @classmethod
    def of(cls, state: dict[str, Any]) -> "UpdateSums":
        """What ``state`` described."""
        result = cls()
        result._sums = {
            name: torch.tensor(value, dtype=torch.double) for name, value in state["sums"].items()
        }
        result._largest = torch.tensor(state["largest"], dtype=torch.double)
        result.steps, result.skipped = state["steps"], state["skipped"]
        result.first_ratio_error = state["first_ratio_error"]
        return result
