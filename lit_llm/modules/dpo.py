"""Direct preference optimisation: a policy learns from comparisons without a reward model.

Shapes: N answers.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_llm.data.collation import PadCollator
from lit_llm.data.packing import IGNORED
from lit_llm.errors import UserError
from lit_llm.functional.policy_gradient import kl_estimate
from lit_llm.functional.preference import PreferenceKind, dpo_loss
from lit_llm.models.adapters import AdapterConfig
from lit_llm.models.config import BaseModelConfig
from lit_llm.models.vocabulary import vocabulary_of
from lit_llm.modules.frozen import tensors_fingerprint
from lit_llm.modules.preference import Comparison, PreferenceModule
from lit_llm.modules.reference import (
    answer_log_probs,
    evaluating,
    load_log_probs,
    part_log_probs,
    save_log_probs,
    token_log_probs,
)
from lit_llm.modules.schedules import Schedule
from lit_llm.rollout.generation import GenerationConfig, fit_prompts, generate


class DPOModule(PreferenceModule):
    """A causal language model trained on comparisons: DPO, IPO and conservative DPO.

    The reference is the model as it was at the start. With adapters it is the model without them;
    otherwise its log-probabilities are computed once, before the first step, and kept in
    ``data.cache_dir``.

    Args:
        base: The model to start from, best a fine-tuned one.
        tokenizer: Folder, Hub name or .gguf file of the tokenizer. The command line takes it from
            ``data.tokenizer``.
        seq_len: Longest sequence that will be fed; the command line takes it from
            ``data.seq_len``.
        chat_template: File with a chat template; the command line takes it from the data's.
        pad_token: Text of the padding token; the command line takes it from the data's.
        adapter: Train adapters (LoRA, DoRA, QLoRA) instead of all weights.
        beta: How strongly the policy is held to the reference: the reward of an answer is beta
            times the logarithm of how much likelier it has become.
        loss: ``sigmoid`` (DPO, https://arxiv.org/abs/2305.18290) or ``ipo``
            (https://arxiv.org/abs/2310.12036), which takes means over the tokens of an answer.
        label_smoothing: How often a preference is taken to be the wrong way round; below 0.5, for
            ``sigmoid`` only.
        reference: ``adapter_off``, a second forward in every step; ``precomputed``; or ``auto``,
            the first where there are adapters.
        kl_prompts: Held-out prompts that are answered after every validation and test to estimate
            how far the policy has moved: KL(policy || reference) of an answer, in nats. 0 is off.
        kl_max_new_tokens: Longest of these answers.
        optimizer: The optimizer's class and its settings. Norms, biases and embeddings get no
            weight decay.
        schedule: The learning rate over the run.

    Raises:
        UserError: For a value that makes no sense.
    """

    has_reference = True

    def __init__(
        self,
        base: BaseModelConfig,
        tokenizer: str | None = None,
        seq_len: int | None = None,
        chat_template: str | None = None,
        pad_token: str | None = None,
        adapter: AdapterConfig | None = None,
        beta: float = 0.1,
        loss: PreferenceKind = "sigmoid",
        label_smoothing: float = 0.0,
        reference: Literal["auto", "adapter_off", "precomputed"] = "auto",
        kl_prompts: int = 16,
        kl_max_new_tokens: int = 64,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(
            params, lr=1e-6, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
        ),
        schedule: Schedule = Schedule(name="cosine", warmup_steps=0.1),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(
            base, tokenizer, seq_len, optimizer, schedule, chat_template, pad_token, adapter
        )
        if beta <= 0:
            raise UserError(f"model: beta must be above 0, got {beta}; 0.1 is usual")
        if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss == "ipo"):
            raise UserError(
                f"model: label_smoothing {label_smoothing} must be at least 0 and below 0.5, and "
                "goes with loss: sigmoid only"
            )
        if reference == "adapter_off" and adapter is None:
            raise UserError(
                "model: reference adapter_off needs adapters; give some (model.adapter.method: "
                "lora), or take reference: precomputed"
            )
        if kl_prompts < 0:
            raise UserError(f"model: kl_prompts must not be negative, got {kl_prompts}; 0 is off")
        self.save_hyperparameters(
            {
                "beta": beta,
                "loss": loss,
                "label_smoothing": label_smoothing,
                "reference": reference,
                "kl_prompts": kl_prompts,
                "kl_max_new_tokens": kl_max_new_tokens,
            }
        )
        self.beta = beta
        self.loss: PreferenceKind = loss
        self.label_smoothing = label_smoothing
        self.adapter_off = self.adapter is not None and reference != "precomputed"
        self.kl_prompts = kl_prompts
        self.kl_config = GenerationConfig(kl_max_new_tokens)
        self._start_path = base.pretrained
        self._start_fingerprint = ""
        self._is_at_start = True
        self._referenced: Any = None

    # ----- the loss -----------------------------------------------------------------------------

    def compare(self, batch: dict[str, Tensor]) -> Comparison:
        """Judge answers by how much likelier they have become than under the reference."""
        logprobs = answer_log_probs(self.model, batch)
        if self.adapter_off:
            with torch.no_grad(), evaluating(self.model), self.model.disable_adapter():
                ref_logprobs = answer_log_probs(self.model, batch)
        else:
            ref_logprobs = batch["ref_logprobs"]
        found = dpo_loss(
            logprobs,
            ref_logprobs,
            batch["pairs"],
            beta=self.beta,
            kind=self.loss,
            label_smoothing=self.label_smoothing,
            weights=batch["pair_weights"],
            lengths=(batch["labels"] != IGNORED).sum(1) if self.loss == "ipo" else None,
        )
        return Comparison(found.loss, found.correct, found.rewards, {"logps": logprobs.detach()})

    def measures(self, sums: dict[str, float]) -> dict[str, float]:
        """The loss (a prompt), and rewards and log-probabilities under the names of the field."""
        return {
            "loss": sums["loss"],
            "rewards/accuracies": sums["accuracy"],
            "rewards/margins": sums["margin"],
            "rewards/chosen": sums["values/better"],
            "rewards/rejected": sums["values/worse"],
            "logps/chosen": sums["logps/better"],
            "logps/rejected": sums["logps/worse"],
        }

    # ----- the reference ------------------------------------------------------------------------

    def build_bare(self, quantization: Literal["nf4"] | None, **vocabulary: Any) -> Any:
        """Build or load the model, and remember which weights the policy starts from."""
        model = super().build_bare(quantization, **vocabulary)
        self._start_fingerprint = tensors_fingerprint(dict(model.state_dict()))
        return model

    def setup(self, stage: str) -> None:
        """See to the reference before any batch is loaded: by then the model is in its place."""
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        datamodule.before_loading = self._give_reference

    def on_train_start(self) -> None:
        """From here on the model is another one than the reference."""
        self._is_at_start = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Tell which model the policy started from."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["start"] = {"path": self._start_path, "fingerprint": self._start_fingerprint}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up a model that is not the reference any more, but has the one it started from.

        Raises:
            UserError: The model it started from has changed since.
        """
        super().on_load_checkpoint(checkpoint)
        start = checkpoint["start"]
        if self.base.pretrained is not None and start["fingerprint"] != self._start_fingerprint:
            raise UserError(
                f"the checkpoint was trained against another reference than the model in "
                f"{self.base.pretrained}; give the model it started from "
                "(model.base.pretrained), or another --output_dir"
            )
        self._start_path, self._start_fingerprint = start["path"], start["fingerprint"]
        self._is_at_start = False

    def _give_reference(self) -> None:
        """Put the reference's log-probabilities beside the data, once."""
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.adapter_off or self._referenced is datamodule:
            return
        parts = datamodule.reference_parts()
        key = f"{datamodule.cache.key} {self._start_fingerprint} {self.trainer.precision}"
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        path = Path(datamodule.cache_dir).expanduser() / f"reference-{name}.safetensors"
        values = load_log_probs(path)
        if self.trainer.world_size > 1:  # all ranks do the same, also where one sees no file yet
            found: list[bool] = [False] * self.trainer.world_size
            dist.all_gather_object(found, values is not None)
            values = values if all(found) else None
        if values is None:
            rank_zero_info(f"Log-probabilities of the reference, computed once: {path}")
            values = self._reference_log_probs(parts, datamodule)
            if self.trainer.is_global_zero:
                save_log_probs(path, values)
        for part, own in zip(parts, values, strict=True):
            part.set_reference(own)
        self._referenced = datamodule

    def _reference_log_probs(self, parts: list[Any], datamodule: Any) -> list[Tensor]:
        with self.reference_model(self.model) as model:
            shared = model is self.model
            settings = (datamodule.collate(), datamodule.val_micro_batch_size)
            values = [
                self.by_root("part_log_probs", model, part, *settings)
                if shared
                else self.part_log_probs(model, part, *settings)
                for part in parts
            ]
        if self.trainer.world_size > 1:
            for own in values:
                total = own.to(self.device)
                dist.all_reduce(total)
                own.copy_(total)
        return values

    def part_log_probs(
        self, model: Any, part: Any, collate: Callable[[list[Any]], Any], batch_size: int
    ) -> Tensor:
        """Log-probabilities of a data set's answers, each rank its share."""
        return part_log_probs(
            model,
            part,
            collate,
            batch_size=batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    @contextmanager
    def reference_model(self, policy: Any) -> Iterator[Any]:
        """The reference as a model, in evaluation mode and in the run's precision.

        Where the policy has no adapters to be turned off and has been trained already, the model it
        started from is loaded anew, for as long as the context lasts.

        Args:
            policy: The policy, as it is or whole.

        Raises:
            UserError: The model it started from cannot be loaded again.
        """
        with self.trainer.precision_plugin.forward_context(), torch.random.fork_rng():
            if self.adapter is not None:
                with evaluating(policy), policy.disable_adapter():
                    yield policy
            elif self._is_at_start:
                with evaluating(policy):
                    yield policy
            else:
                yield self._load_start()

    def _load_start(self) -> Any:
        if self._start_path is None:
            raise UserError(
                "the reference of this run is not on disk, and the model it started from was "
                "random: repeat the run from its start (--resume never)"
            )
        base = replace(self.base, pretrained=self._start_path, preset=None, config=None)
        vocabulary: dict[str, Any] = {}
        if self.tokenizer_path is not None:
            vocabulary |= vocabulary_of(self.load_tokenizer())
        own, self.base = self.base, base
        try:
            model = super().build_bare(None, **vocabulary)
        finally:
            self.base = own
        if tensors_fingerprint(dict(model.state_dict())) != self._start_fingerprint:
            raise UserError(
                f"the model in {self._start_path} is not the one that this run started from; put "
                "it back, or begin anew (--resume never)"
            )
        return self.trainer.precision_plugin.convert_module(model.to(self.device).eval())

    # ----- how far the policy has moved ---------------------------------------------------------

    def on_validation_epoch_end(self) -> None:
        """Log the measures, and the KL divergence from the reference."""
        super().on_validation_epoch_end()
        if not self.trainer.sanity_checking:
            self._log_kl("val", "validation")

    def on_test_epoch_end(self) -> None:
        """Log the measures, and the KL divergence from the reference."""
        super().on_test_epoch_end()
        self._log_kl("test", "test")

    def _log_kl(self, stage: str, split: str) -> None:
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        # A model that was random at the start cannot be had again.
        known = self.adapter is not None or self._is_at_start or self._start_path
        if not self.kl_prompts or not known:
            return
        questions = datamodule.heldout_questions(split, self.kl_prompts)
        own = questions[self.trainer.global_rank :: self.trainer.world_size]
        total = self._sampled_kl([question.prompt_ids for question in own], datamodule)
        if self.trainer.world_size > 1:
            dist.all_reduce(total)
        if float(total[1]):
            self.log(f"{stage}/objective/kl", total[0] / total[1])

    @torch.no_grad()
    def _sampled_kl(self, prompts: list[list[int]], datamodule: Any) -> Tensor:
        """Sum over sampled answers of k1, log(policy / reference); and how many answers."""
        total = torch.zeros(2, device=self.device)
        # Scored after the very prompts they are sampled after.
        prompts, _ = fit_prompts(self.model, prompts, self.kl_config.max_new_tokens)
        with self.whole() as policy:
            responses = generate(
                policy,
                prompts,
                self.kl_config,
                pad_token_id=datamodule.pad_token_id,
                stop_token_ids=datamodule.stop_token_ids,
                keep_stop_token=True,
            )
            items = [
                {
                    "input_ids": torch.tensor(prompt + response.ids),
                    "labels": torch.tensor([IGNORED] * len(prompt) + response.ids),
                    "source": torch.tensor(0),
                }
                for prompt, response in zip(prompts, responses, strict=True)
            ]
            total[1] = len(responses)
            if not items:
                return total
            batch = {
                k: v.to(self.device) for k, v in PadCollator(datamodule.pad_token_id)(items).items()
            }
            with evaluating(policy), self.trainer.precision_plugin.forward_context():
                logprobs = token_log_probs(policy, batch)
            with self.reference_model(policy) as reference:
                ref_logprobs = token_log_probs(reference, batch)
        total[0] = kl_estimate(logprobs, ref_logprobs, "k1").sum()
        return total
