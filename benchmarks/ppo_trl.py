"""TRL's contestants of the PPO benchmark; they run in an environment of their own.

``benchmarks/ppo.py`` makes it from ``ppo_trl.txt`` and starts this file there.
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

import torch

from benchmarks.ppo_work import (
    BETAS,
    CLIP_RANGE,
    EPS,
    GAE_LAMBDA,
    GAMMA,
    KL_COEF,
    LEARNING_RATE,
    VF_COEF,
    Clock,
    Work,
    read_prompts,
    run,
)


def trl(work: Work, clock: Clock, *, dtype: torch.dtype = torch.float32) -> None:
    """PPOTrainer, the trained weights in float32 under bfloat16 autocast, frozen ones in bfloat16.

    Its sampling is outside of autocast, so it is in the type of the policy's weights.
    """
    # PPOTrainer makes its Accelerator without the precision of its arguments, and transformers 5
    # no longer leaves it here: without this `bf16=True` would train in float32.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    class Tick(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    sample = ppo_trainer.batch_generation

    def timed(model: Any, queries: torch.Tensor, *args: Any) -> Any:
        start = time.perf_counter()
        output = sample(model, queries, *args)
        clock.sampled(output[0].shape[1] - queries.shape[1], time.perf_counter() - start)
        return output

    ppo_trainer.batch_generation = timed
    tokenizer = AutoTokenizer.from_pretrained(work.policy)
    rows = Dataset.from_dict({"input_ids": read_prompts(work, tokenizer)})
    half = torch.bfloat16
    scorer = AutoModelForSequenceClassification
    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=work.prompts,
            local_rollout_forward_batch_size=work.prompts,
            num_mini_batches=work.num_minibatches,
            num_ppo_epochs=1,
            total_episodes=work.prompts * work.repeats,
            response_length=work.new_tokens,
            temperature=1.0,
            kl_coef=KL_COEF,
            vf_coef=VF_COEF,
            cliprange=CLIP_RANGE,
            cliprange_value=CLIP_RANGE,
            gamma=GAMMA,
            lam=GAE_LAMBDA,
            learning_rate=LEARNING_RATE,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPS,
            lr_scheduler_type="constant",
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=False,  # it would cost time
            num_sample_generations=0,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = PPOTrainer(
            args=arguments,
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(work.policy, dtype=dtype),
            ref_model=AutoModelForCausalLM.from_pretrained(work.policy, dtype=half),
            reward_model=scorer.from_pretrained(work.reward, dtype=half),
            value_model=scorer.from_pretrained(work.reward, dtype=dtype),
            train_dataset=rows,
            eval_dataset=rows,  # it asks for one, and does not read it
            callbacks=[Tick()],
        )
        trainer.train()


def trl_bf16(work: Work, clock: Clock) -> None:
    """The same, the trained weights too in bfloat16, and with them the states of AdamW.

    Quicker at sampling, but at this learning rate rounding swallows most updates.
    """
    trl(work, clock, dtype=torch.bfloat16)


if __name__ == "__main__":
    run({"trl": trl, "trl_bf16": trl_bf16})
