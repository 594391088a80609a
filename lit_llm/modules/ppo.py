"""Proximal policy optimisation: a policy learns from the scores of its own responses.

Shapes: N rows (responses of an iteration, over all ranks), B rows of a micro-batch, R response.
"""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_llm.errors import UserError
from lit_llm.evaluation.responses import EvaluatedResponse, response_measures
from lit_llm.functional.policy_gradient import policy_loss, value_loss
from lit_llm.models.adapter_switches import adapter_parameters
from lit_llm.models.adapters import AdapterConfig
from lit_llm.models.config import BaseModelConfig
from lit_llm.models.forward import causal_lm_loss
from lit_llm.modules.actor_critic import CRITIC
from lit_llm.modules.base import decay_groups
from lit_llm.modules.ppo_config import PPOConfig
from lit_llm.modules.rewards import RewardConfig, as_rewards
from lit_llm.modules.rollout import RolloutModule
from lit_llm.modules.schedules import Schedule
from lit_llm.modules.update_sums import UpdateSums
from lit_llm.rollout.experience import ExperienceBuffer
from lit_llm.rollout.generation import GenerationConfig

_DEFAULT_REWARDS: list[RewardConfig | str] = ["runs/reward/model"]


class PPOModule(RolloutModule):
    """A policy that learns from scores of its own responses: PPO, GRPO and RLOO.

    One epoch of the trainer is one iteration: a rollout, then ``ppo.num_ppo_epochs`` passes over it
    in minibatches, one optimizer step each. ``trainer.max_epochs`` counts iterations.

    Args:
        base: The model to start from, a fine-tuned one; it is also the reference. Dropout is off.
        tokenizer: Folder, Hub name or .gguf file of the tokenizer. The command line takes it from
            ``data.tokenizer``.
        prompt_len: Longest prompt, in tokens; the command line takes it from ``data.prompt_len``.
        chat_template: File with a chat template; the command line takes it from the data's.
        pad_token: Text of the padding token; the command line takes it from the data's.
        adapter: Train adapters (LoRA, DoRA, QLoRA) instead of all weights. The reference is then
            the policy without them, and needs no memory.
        rewards: What responses are scored by, summed by their weights: folders of reward models,
            rules (``exact_match``, ``length_window``, ``regex``), Python functions
            (``package.module:function`` or ``file.py:function``), or the fields of a
            ``RewardConfig``.
        judges: What they are also scored by in the measures, without learning from it; a reward
            that rises while a judge falls is over-optimised.
        ppo: How the policy learns.
        generation: How responses are sampled.
        rollout_engine: Import path, ``package.module:name``, of what builds another rollout engine
            (see ``lit_llm.rollout.engine``); by default responses are sampled here.
        optimizer: The optimizer's class and its settings. Norms, biases and embeddings get no
            weight decay.
        schedule: The learning rate over the run.

    Raises:
        UserError: For a value that makes no sense.
    """

    def __init__(
        self,
        base: BaseModelConfig,
        tokenizer: str | None = None,
        prompt_len: int = 256,
        chat_template: str | None = None,
        pad_token: str | None = None,
        adapter: AdapterConfig | None = None,
        rewards: list[RewardConfig | str] = _DEFAULT_REWARDS,
        judges: list[RewardConfig | str] | None = None,
        ppo: PPOConfig = PPOConfig(),  # noqa: B008 - never changed
        generation: GenerationConfig = GenerationConfig(max_new_tokens=64),  # noqa: B008 - frozen
        rollout_engine: str | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(
            params, lr=1e-6, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True
        ),
        schedule: Schedule = Schedule(name="linear", warmup_steps=0.0),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(
            base,
            tokenizer,
            prompt_len,
            optimizer,
            schedule,
            chat_template,
            pad_token,
            adapter,
            ppo,
            generation,
            as_rewards(rewards),
            as_rewards(judges or []),
            rollout_engine,
        )
        self.kl_coef = self.ppo.kl_coef
        self.score_moments = [0.0, 0.0, 0.0]
        self.buffer: ExperienceBuffer | None = None
        self._sums = UpdateSums()
        self._window = UpdateSums()
        self._rollout_metrics: dict[str, float] = {}
        self._skips = self._skipping = False
        self.evaluated: list[EvaluatedResponse] = []
        """What the last evaluation found, complete on every rank."""

    # ----- the run ------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the place of the data module's training loader, and set the accumulation.

        Raises:
            UserError: The sizes do not fit the devices, or the trainer accumulates on its own.
        """
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        sizes = self.batch_sizes()
        kwargs = self.trainer.distributed_sampler_kwargs
        self.buffer = ExperienceBuffer(
            num_epochs=self.ppo.num_ppo_epochs,
            rollout_batch_size=self.ppo.rollout_batch_size,
            minibatch_size=self.ppo.minibatch_size,
            micro_batch_size=sizes.micro_batch_size,
            rank=0 if kwargs is None else int(kwargs["rank"]),
            world_size=self.data_parallel_size,
            batches_done=lambda: self.trainer.fit_loop.epoch_loop.batch_progress.current.ready,
        )
        if self.trainer.limit_train_batches != 1.0:
            raise UserError(
                "trainer.limit_train_batches would leave out a part of every iteration; leave it "
                "out, and set model.ppo.rollout_batch_size and num_ppo_epochs"
            )
        if self.trainer.accumulate_grad_batches not in (1, sizes.accumulate):
            raise UserError(
                "trainer.accumulate_grad_batches follows from model.ppo.minibatch_size / "
                "(micro_batch_size x devices); leave it out and set those"
            )
        if self.ppo.ptx_coef and not datamodule.ptx_sources:
            raise UserError(
                "model.ppo.ptx_coef mixes in pre-training, so it needs texts: give "
                "data.ptx_sources, or set it to 0"
            )
        if stage != "fit":
            return
        self.trainer.accumulate_grad_batches = sizes.accumulate
        datamodule.experience_loader = lambda: self.buffer

    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        assert self.buffer is not None
        max_steps, epochs = self.trainer.max_steps, self.trainer.max_epochs or -1
        if epochs > 0:
            steps = epochs * self.buffer.steps
            return int(min(steps, max_steps) if max_steps > 0 else steps)
        if max_steps > 0:
            return int(max_steps)
        raise UserError(
            "the run has no end, so the learning-rate schedule has no horizon; set "
            "--trainer.max_epochs (iterations) or --trainer.max_steps"
        )

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Build the optimizer, with groups of their own for the critic's weights."""
        own = [part for part in (self.value_model, self.value_head) if part is not None]
        critic = {id(parameter) for part in own for parameter in part.parameters()}
        critic |= {id(parameter) for parameter in adapter_parameters(self.model, CRITIC)}
        groups = []
        for group in decay_groups(self, self.whole_shapes):
            for of_critic in (False, True):
                chosen = [p for p in group["params"] if (id(p) in critic) == of_critic]
                if chosen:
                    groups.append({**group, "params": chosen, "of_critic": of_critic})
        optimizer = self.optimizer_factory(groups)
        for group in optimizer.param_groups:
            group["lr"] *= self.ppo.value_lr_factor if group["of_critic"] else 1.0
        return optimizer

    def on_train_start(self) -> None:
        """Log what a checkpoint of an iteration's last step was written before."""
        assert self.buffer is not None
        if self._sums.steps + self._sums.skipped == self.buffer.steps:
            # Otherwise Lightning goes on within the iteration that is over, without a rollout.
            self.trainer.fit_loop.reset_restart_stage()
            for logger in self.loggers:
                logger.log_metrics(self.iteration_metrics, step=self.global_step - 1)

    # ----- an iteration -------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        """Take the next prompts, sample, score, and find out what there is to learn."""
        assert self.buffer is not None
        self._sums, self._skips = UpdateSums(), False
        with torch.no_grad():
            self._rollout_metrics = self.roll_out(self.buffer)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return this micro-batch's share of the minibatch's mean loss over response tokens."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._window, self._skipping = UpdateSums(), self._skips
        if self._skipping:
            return self._nothing()
        assert self.buffer is not None
        config, mask = self.ppo, batch["response_mask"]
        known = self.buffer.learned(batch["rows"], mask)
        views = self.views(batch)
        policy = policy_loss(
            views.logprobs,
            known["logprobs"],
            known["advantages"],
            mask,
            clip_range=config.clip_range,
        )
        loss = policy.loss
        value = None
        if config.has_critic:
            value = value_loss(
                views.values,
                known["values"],
                known["returns"],
                mask,
                clip_range=config.value_clip_range,
            )
            loss = loss + config.vf_coef * value.loss
        entropy = views.entropy.sum()
        if config.ent_coef:
            loss = loss - config.ent_coef * entropy
        self._window.add(policy, value, entropy, mask)
        share = self.global_mean(loss, batch["num_targets"], batch_idx)
        if config.ptx_coef:
            share = share + config.ptx_coef * self._ptx_loss(batch, batch_idx)
        return share

    @property
    def skips_step(self) -> bool:
        """Whether the iteration has ended early, and this step is one of those left out."""
        return self._skipping

    def _nothing(self) -> Tensor:
        """A loss of 0 that reaches all parameters: ranks that skip a step have to do it together.

        Lightning lets no rank leave a step out by returning ``None``. Sharded weights are no leaves
        of a graph outside their own forward, and need no gradient to stay as they are.
        """
        if self._replica is not None:
            return torch.zeros((), device=self.device, requires_grad=True)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.stack([p.flatten()[:1].sum().float() for p in trained]).sum() * 0.0

    def _ptx_loss(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """This micro-batch's share of the mean pre-training loss, over as many rows of text."""
        assert self.buffer is not None
        buffer, datamodule = self.buffer, self.trainer.datamodule  # type: ignore[attr-defined]
        rows = len(batch["input_ids"])
        step = (self.iteration - 1) * buffer.steps + int(batch["minibatch"])
        share = self.ppo.minibatch_size // buffer.world_size
        part = batch_idx % buffer.accumulate * buffer.micro_batch_size
        first = step * self.ppo.minibatch_size + buffer.rank * share + part
        texts = {k: v.to(self.device) for k, v in datamodule.ptx_batch(first, rows).items()}
        sums = causal_lm_loss(self.model, texts["input_ids"], texts["labels"])
        self._window.add_ptx(sums.nll, sums.num_targets)
        return sums.loss / sums.num_targets  # every micro-batch has as many of them

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the minibatch's means over all ranks, and decide together whether to go on."""
        super().on_before_optimizer_step(optimizer)
        if self._skipping:
            optimizer.zero_grad()  # without gradients a step leaves weights and moments alone
            self._sums.skipped += 1
            return
        totals = self._window.over_ranks(self.data_parallel_sum)
        self._sums.join(totals)
        loss = totals.loss(self.ppo)
        self.log("train/loss", loss, prog_bar=True, logger=False)
        # Lightning would log it again with every step that is skipped.
        for logger in self.loggers:
            logger.log_metrics({"train/loss": loss}, step=self.global_step)
        limit = self.ppo.target_approxkl
        self._skips = limit is not None and totals.measures().get("policy/approxkl", 0.0) > limit

    def on_train_epoch_end(self) -> None:
        """Log the iteration."""
        metrics = self.iteration_metrics
        self.log_dict(metrics)
        rank_zero_info(
            f"iteration {self.iteration}: scores {metrics['objective/scores']:.3f}, "
            f"KL {metrics['objective/kl']:.2f} nats, "
            f"{metrics['rollout/response_length']:.1f} tokens, "
            f"{metrics['rollout/eos_rate']:.0%} ended, "
            f"rollout {metrics['rollout/seconds']:.1f} s"
        )

    @property
    def iteration_metrics(self) -> dict[str, float]:
        """What is known of the iteration so far, under the names of the field, on every rank."""
        return {**self._rollout_metrics, **self._sums.measures()}

    # ----- evaluation ---------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start anew."""
        self._places: list[int] = []
        self._counted: list[bool] = []

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Remember which prompts are this rank's; they are answered together at the end."""
        self._places += batch["place"].tolist()
        self._counted += (batch["labels"][:, 0] == 0).tolist()

    def on_validation_epoch_end(self) -> None:
        """Answer held-out prompts, and log what the answers are worth."""
        self._evaluate("val", "validation")

    def on_test_epoch_start(self) -> None:
        """Start anew."""
        self.on_validation_epoch_start()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Remember which prompts are this rank's."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Answer held-out prompts, beside the reference, and log what the answers are worth."""
        self._evaluate("test", "test")

    def _evaluate(self, stage: str, split: Any) -> None:
        if self.trainer.sanity_checking:
            return
        # Before the first step the policy is the model it starts from.
        beside = stage == "test" and self.iteration > 0
        with torch.no_grad():
            self.evaluated = self.evaluate(split, self._places, self._counted, beside_start=beside)
        if self.evaluated:
            for name, value in response_measures(self.evaluated).items():
                self.log(f"{stage}/{name}", value, prog_bar=False)

    # ----- checkpoints --------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the rest of the iteration needs: its rows, its sums, the controller."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["ppo"] = {
            "experience": {} if self.buffer is None else self.buffer.kept(),
            "minibatch_size": self.ppo.minibatch_size,
            "iteration": self.iteration,
            "kl_coef": self.kl_coef,
            "score_moments": list(self.score_moments),
            "rollout_metrics": dict(self._rollout_metrics),
            "sums": self._sums.state(),
            "skips": self._skips,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on in the midst of an iteration.

        Raises:
            UserError: The checkpoint is of iterations of other sizes.
        """
        super().on_load_checkpoint(checkpoint)
        kept = checkpoint["ppo"]
        if self.buffer is not None:
            if kept["minibatch_size"] != self.ppo.minibatch_size:
                raise UserError(
                    f"the checkpoint was trained with minibatch_size {kept['minibatch_size']}; go "
                    "on with that (model.ppo.minibatch_size), or start over (--resume never)"
                )
            self.buffer.restore(kept["experience"])
        self.iteration, self.kl_coef = kept["iteration"], kept["kl_coef"]
        self.score_moments = list(kept["score_moments"])
        self._rollout_metrics = dict(kept["rollout_metrics"])
        self._sums = UpdateSums.of(kept["sums"])
        self._skips = kept["skips"]
