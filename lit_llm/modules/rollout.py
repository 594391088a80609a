"""Rollouts: a policy's own responses, scored, and what is to be learned from each of their tokens.

Shapes: N rows (responses of an iteration, over all ranks), B rows of a micro-batch, R response.
"""

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_llm.data.prompts import Prompt
from lit_llm.data.splits import Split
from lit_llm.errors import UserError
from lit_llm.evaluation.responses import EvaluatedResponse, repetition
from lit_llm.functional.advantages import (
    explained_variance,
    gae,
    group_advantages,
    token_rewards,
    whiten,
)
from lit_llm.functional.masking import masked_mean
from lit_llm.functional.policy_gradient import adapted_kl_coef, kl_estimate
from lit_llm.modules.responding import RespondingModule
from lit_llm.rollout.experience import Experience, ExperienceBuffer
from lit_llm.rollout.generation import Response


class RolloutModule(RespondingModule):
    """What an iteration does before its updates, and what an evaluation does in its place.

    Every rank answers and scores its share of the prompts; then all ranks hold all rows. What a
    prompt is answered with depends on the seed, the iteration and its place, not on the ranks.
    """

    iteration: int = 0
    """Rollouts made so far."""
    kl_coef: float
    """What a nat of KL divergence costs now."""
    score_moments: list[float]
    """Number, mean and sum of squared deviations of all scores so far."""

    # ----- an iteration -------------------------------------------------------------------------

    def roll_out(self, buffer: ExperienceBuffer) -> dict[str, float]:
        """Answer the next prompts, score the answers, and fill the buffer.

        Returns:
            What is known of the rollout, under the names of the field.
        """
        started = time.perf_counter()
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        count = self.ppo.rollout_batch_size
        prompts: list[Prompt] = [
            prompt
            for prompt in datamodule.take_prompts(count // self.ppo.group_size)
            for _ in range(self.ppo.group_size)
        ]
        seeds = [row_seed(self.ppo.seed, "rollout", self.iteration, row) for row in range(count)]
        share = count // buffer.world_size
        own = slice(buffer.rank * share, (buffer.rank + 1) * share)
        size = self.ppo.rollout_micro_batch_size
        responses = self.respond(prompts[own], seeds[own], batch_size=size)
        sampled = time.perf_counter() - started
        scored = self._scored(prompts[own], responses)
        # Tensor parallel ranks hold the same rows.
        copies = len(scored) // buffer.world_size
        everything = [row for part in scored[::copies] for row in part]
        responses = [row[0] for row in everything]

        experience = Experience.of(
            [prompt.ids for prompt in prompts],
            [response.ids for response in responses],
            datamodule.pad_token_id,
        )
        buffer.shuffle(row_seed(self.ppo.seed, "order", self.iteration, 0))
        buffer.experience = experience
        views = self._views_of(experience, buffer.first_epoch())
        scores = torch.tensor([row[1] for row in everything])
        metrics = self._learnable(experience, views, scores, responses)
        tokens = sum(len(response.ids) for response in responses)
        metrics |= {
            "rollout/response_length": _mean([len(response.ids) for response in responses]),
            "rollout/eos_rate": _mean([response.stopped for response in responses]),
            "rollout/repetition": _mean([repetition(response.ids) for response in responses]),
            "rollout/tokens_per_s": tokens / max(sampled, 1e-9),
            **_means_of([row[2] for row in everything], "scores"),
            **_means_of([row[3] for row in everything], "judge"),
            "rollout/seconds": time.perf_counter() - started,
        }
        if self.gather_seconds:
            metrics["rollout/gather_seconds"] = self.gather_seconds
        self.iteration += 1
        return metrics

    def _scored(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[list[Any]]:
        """Responses with their scores, those of every rank."""
        return _gathered(list(zip(responses, *self._judged(prompts, responses), strict=True)))

    def _judged(
        self, prompts: Sequence[Prompt], responses: Sequence[Response]
    ) -> tuple[list[float], list[dict[str, float]], list[dict[str, float]]]:
        """Scores, their parts by reward, and those of the judges, one of each a response.

        Raises:
            UserError: A reward has failed on one of the ranks; all of them end with its sentence.
        """
        samples = self.samples(prompts, responses)
        scores, mistake = self.run("scores", samples)
        if told := [share[0] for share in _gathered([mistake]) if share[0] is not None]:
            raise UserError(told[0])
        rewarded, judged = scores
        count = len(samples)
        parts: list[dict[str, float]] = [{}] * count
        if judged is not None:
            parts = _by_row(judged.parts, count)
        return rewarded.total.tolist(), _by_row(rewarded.parts, count), parts

    def _views_of(self, experience: Experience, batches: Sequence[Tensor]) -> Tensor:
        """What the models say of all rows before the updates, (4, N, R) float32.

        Log-probabilities, entropies and values of the policy, and the reference's
        log-probabilities; each rank those of its own batches.
        """
        found = torch.zeros(4, *experience.response_mask.shape)
        for rows in batches:
            batch = {k: v.to(self.device) for k, v in experience.rows(rows).items()}
            views, ref_logprobs = self.run("views", batch), self.run("reference_logprobs", batch)
            values = torch.stack([*views, ref_logprobs]).float().cpu()
            found[:, rows, : values.shape[2]] = values
        return self.data_parallel_sum(found.to(self.device)).cpu()

    def _learnable(
        self, experience: Experience, views: Tensor, raw: Tensor, responses: Sequence[Response]
    ) -> dict[str, float]:
        """Make advantages and returns of scores (N,) and of what the models say."""
        logprobs, entropy, values, ref_logprobs = views
        mask, config = experience.response_mask, self.ppo
        penalty = kl_estimate(logprobs, ref_logprobs, config.kl_estimator)
        kl = kl_estimate(logprobs, ref_logprobs, "k1").sum(1).mean()
        scores = self._shaped(raw, torch.tensor([response.stopped for response in responses]))
        rewards = token_rewards(scores, penalty, mask, self.kl_coef)
        metrics = {
            "objective/kl": float(kl),
            "objective/kl_coef": self.kl_coef,
            "objective/scores": float(raw.mean()),
            "objective/scores_std": float(raw.std(correction=0)),
            "objective/rlhf_reward": float(rewards.sum(1).mean()),
            "objective/non_score_reward": -self.kl_coef * float(penalty.sum(1).mean()),
            "objective/entropy": float(masked_mean(entropy, mask)),
        }
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        experience.logprobs = logprobs
        if config.has_critic:
            experience.values = values
            advantages, experience.returns = gae(
                rewards, values, mask, gamma=config.gamma, gae_lambda=config.gae_lambda
            )
            found = explained_variance(values, experience.returns, mask)
            metrics["value/explained_variance"] = float(found)
        else:
            advantages = self._compared(scores, penalty.sum(1))[:, None] * mask
        if config.whitens_advantages:
            advantages = whiten(advantages, mask)
        experience.advantages = advantages
        if config.kl_target is not None:
            self.kl_coef = adapted_kl_coef(
                self.kl_coef,
                float(kl),
                target=config.kl_target,
                horizon=config.kl_horizon,
                num_samples=config.rollout_batch_size,
            )
        return metrics

    def _compared(self, scores: Tensor, penalties: Tensor) -> Tensor:
        """How much better each response is than the others to its prompt, (N,).

        grpo divides by the deviation within a group. The price of the KL divergence is left out of
        that: in a group whose responses all score the same, it would be blown up to full strength.
        """
        size = self.ppo.group_size
        if self.ppo.advantage == "grpo":
            priced = group_advantages(-self.kl_coef * penalties, size, "rloo")
            return group_advantages(scores, size, "grpo") + priced
        return group_advantages(scores - self.kl_coef * penalties, size, "rloo")

    def _shaped(self, scores: Tensor, stopped: Tensor) -> Tensor:
        """Scores (N,) as they are learned from: on their scale, clipped, less for no end."""
        config = self.ppo
        if config.normalise_scores != "none":
            self.score_moments = _joined(self.score_moments, scores)
            kept = self.score_moments if config.normalise_scores == "running" else None
            count, mean, squares = kept or _joined([0.0, 0.0, 0.0], scores)
            # Scores that are all the same say nothing, and are not blown up.
            scores = (scores - mean) / max((squares / count) ** 0.5, 1e-6)
        if config.score_clip is not None:
            scores = scores.clamp(-config.score_clip, config.score_clip)
        if config.missing_eos_score is not None:
            return scores.masked_fill(~stopped, config.missing_eos_score)
        return scores - (config.missing_eos_penalty or 0.0) * (~stopped)

    # ----- an evaluation ------------------------------------------------------------------------

    def evaluate(
        self, split: Split, places: Sequence[int], counted: Sequence[bool], *, beside_start: bool
    ) -> list[EvaluatedResponse]:
        """Answer held-out prompts, with the same random numbers every time.

        Args:
            split: ``"validation"`` or ``"test"``.
            places: This rank's prompts.
            counted: Which of them are not only there to keep the ranks in step.
            beside_start: Let the model that training started from answer them too.

        Returns:
            The responses of all ranks, in the order of the prompts, on every rank.
        """
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        held_out = datamodule.held_out_prompts(split)
        prompts = [held_out[place] for place in places]
        own = self._answered(prompts, places, by_reference=False)
        if beside_start:
            for row, baseline in zip(
                own, self._answered(prompts, places, by_reference=True), strict=True
            ):
                row.baseline = baseline
        kept = [row for row, counts in zip(own, counted, strict=True) if counts]
        rows = {row.index: row for part in _gathered(kept) for row in part}
        return [rows[index] for index in sorted(rows)]

    def _answered(
        self, prompts: Sequence[Prompt], places: Sequence[int], *, by_reference: bool
    ) -> list[EvaluatedResponse]:
        if not prompts:
            return []
        seeds = [row_seed(self.ppo.seed, "held out", 0, place) for place in places]
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        responses = self.respond(
            prompts, seeds, by_reference=by_reference, batch_size=datamodule.val_batch_size
        )
        scores, parts, judged = self._judged(prompts, responses)
        divergence = [0.0] * len(prompts)
        if not by_reference:
            divergence = self._divergence(prompts, responses).tolist()
        return [
            EvaluatedResponse(
                index=place,
                prompt=sample.prompt,
                response=sample.response,
                length=len(sample.response_ids),
                stopped=sample.stopped,
                score=score,
                scores={**own, **other},
                kl=kl,
                repetition=repetition(sample.response_ids),
            )
            for place, sample, score, own, other, kl in zip(
                places,
                self.samples(prompts, responses),
                scores,
                parts,
                judged,
                divergence,
                strict=True,
            )
        ]

    def _divergence(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Tensor:
        """log(policy / reference) of whole responses (N,), in nats."""
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        experience = Experience.of(
            [prompt.ids for prompt in prompts],
            [response.ids for response in responses],
            datamodule.pad_token_id,
        )
        size = self.batch_sizes().micro_batch_size
        found = []
        for rows in torch.arange(len(experience)).split(size):
            batch = {k: v.to(self.device) for k, v in experience.rows(rows).items()}
            views, ref_logprobs = self.run("views", batch), self.run("reference_logprobs", batch)
            found.append(kl_estimate(views.logprobs, ref_logprobs, "k1").sum(1).cpu())
        return torch.cat(found)


def row_seed(seed: int, purpose: str, iteration: int, row: int) -> int:
    """A seed that no other row, iteration or purpose has."""
    text = f"{seed} {purpose} {iteration} {row}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _gathered(own: list[Any]) -> list[list[Any]]:
    """What each rank holds, on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [own]
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, own)
    return shares


def _by_row(parts: dict[str, Tensor], count: int) -> list[dict[str, float]]:
    return [{name: float(values[row]) for name, values in parts.items()} for row in range(count)]


def _means_of(rows: Sequence[dict[str, float]], folder: str) -> dict[str, float]:
    return {f"{folder}/{name}": _mean([row[name] for row in rows]) for name in rows[0]}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _joined(moments: Sequence[float], scores: Tensor) -> list[float]:
    """Number, mean and squared deviations of two samples together (Chan et al. 1979)."""
    count, mean, squares = moments
    new = scores.double()
    added, shift = len(new), float(new.mean()) - mean
    total = count + added
    return [
        total,
        mean + shift * added / total,
        squares + float((new - new.mean()).square().sum()) + shift**2 * count * added / total,
    ]
