"""Our contestants of the PPO benchmark, and transformers' own sampling beside our engine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
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
    Contestant,
    Work,
    read_prompts,
    run,
)


def ours(
    work: Work, clock: Clock, *, attention: str = "sdpa", compile_blocks: bool = False
) -> None:
    """The project's module under Lightning's Trainer, with the callbacks of the recipe."""
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.loggers import CSVLogger

    from lit_llm.callbacks.exact_resume import ExactResume
    from lit_llm.callbacks.graceful_stop import GracefulStop
    from lit_llm.callbacks.ppo_health import PPOHealth
    from lit_llm.callbacks.progress import Progress

    class Tick(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            metrics = module.iteration_metrics
            length = metrics["rollout/response_length"]
            tokens = length * work.prompts
            clock.sampled(length, tokens / metrics["rollout/tokens_per_s"])
            clock.tick()

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=work.repeats,
            accelerator="cpu",
            precision="bf16-mixed",
            default_root_dir=folder,
            log_every_n_steps=1,
            callbacks=[Progress(), ExactResume(), GracefulStop(), PPOHealth(), Tick()],
            logger=CSVLogger(folder),
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(_module(work, attention, compile_blocks), datamodule=_data(work, folder))


def ours_blocked(work: Work, clock: Clock) -> None:
    """The same with our attention in training."""
    ours(work, clock, attention="blocked")


def ours_compiled(work: Work, clock: Clock) -> None:
    """The same with our attention and compiled blocks."""
    ours(work, clock, attention="blocked", compile_blocks=True)


def _module(work: Work, attention: str, compile_blocks: bool) -> Any:
    from lit_llm.models.config import BaseModelConfig
    from lit_llm.modules.ppo import PPOModule
    from lit_llm.modules.ppo_config import PPOConfig
    from lit_llm.modules.schedules import Schedule
    from lit_llm.rollout.generation import GenerationConfig

    return PPOModule(
        BaseModelConfig(
            pretrained=str(work.policy), attn_implementation=attention, compile=compile_blocks
        ),
        tokenizer=str(work.policy),
        prompt_len=work.prompt_len,
        rewards=[str(work.reward)],
        ppo=PPOConfig(
            rollout_batch_size=work.prompts,
            minibatch_size=work.prompts // work.num_minibatches,
            num_ppo_epochs=1,
            value_from=str(work.reward),
            kl_coef=KL_COEF,
            clip_range=CLIP_RANGE,
            value_clip_range=CLIP_RANGE,
            vf_coef=VF_COEF,
            gamma=GAMMA,
            gae_lambda=GAE_LAMBDA,
        ),
        generation=GenerationConfig(max_new_tokens=work.new_tokens),
        optimizer=lambda parameters: torch.optim.AdamW(
            parameters, lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True
        ),
        schedule=Schedule("constant", warmup_steps=0),
    )


def _data(work: Work, folder: str) -> Any:
    from lit_llm.data.prompts import PromptDataModule
    from lit_llm.data.records import RecordSource

    data = PromptDataModule(
        tokenizer=str(work.policy),
        sources=[RecordSource(str(work.texts), format="plain_prompt")],
        prompt_len=work.prompt_len,
        val_fraction=0.0,
        test_fraction=0.0,
        val_prompts=0,
        test_prompts=0,
        cache_dir=str(Path(folder) / "cache"),
    )
    data.stop_token_ids = []  # every response has its full length
    return data


def rollout_ours(work: Work, clock: Clock, *, dtype: torch.dtype) -> None:
    """Our engine on the policy of the training, whose weights are float32; loading counts."""
    from lit_llm.rollout.generation import GenerationConfig
    from lit_llm.rollout.sampling import SamplingEngine

    model, batches = _policy(work, torch.float32)
    engine = SamplingEngine(
        pad_token_id=model.config.pad_token_id,
        stop_token_ids=[],
        batch_size=work.prompts,
        dtype=dtype,
    )
    config = GenerationConfig(max_new_tokens=work.new_tokens)

    def sample(prompts: list[list[int]]) -> float:
        engine.load(model)
        responses = engine.generate(prompts, config, seeds=list(range(len(prompts))))
        engine.release()
        return sum(len(response.ids) for response in responses) / len(responses)

    _time_rollouts(batches, sample, clock)


def rollout_generate(work: Work, clock: Clock, *, dtype: torch.dtype) -> None:
    """``model.generate``, the weights in the type that is asked for."""
    from transformers import GenerationConfig

    model, batches = _policy(work, dtype)
    model.eval()
    config = GenerationConfig(
        max_new_tokens=work.new_tokens,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        pad_token_id=model.config.pad_token_id,
    )
    model.generation_config.eos_token_id = None

    def sample(prompts: list[list[int]]) -> float:
        ids = torch.tensor(prompts)
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
        )
        return output.shape[1] - ids.shape[1]

    _time_rollouts(batches, sample, clock)


def _policy(work: Work, dtype: torch.dtype) -> tuple[Any, list[list[list[int]]]]:
    """The policy, and the prompts of each repeat."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = read_prompts(work, AutoTokenizer.from_pretrained(work.policy))
    batches = [rows[k : k + work.prompts] for k in range(0, len(rows), work.prompts)]
    return AutoModelForCausalLM.from_pretrained(work.policy, dtype=dtype), batches


def _time_rollouts(
    batches: list[list[list[int]]], sample: Callable[[list[list[int]]], float], clock: Clock
) -> None:
    for prompts in batches:
        start = time.perf_counter()
        length = sample(prompts)
        clock.sampled(length, time.perf_counter() - start)
        clock.tick()


def _rollouts() -> dict[str, Contestant]:
    """Both ways to sample in both types, the ones that are compared side by side."""

    def made(function: Any, dtype: torch.dtype) -> Contestant:
        return lambda work, clock: function(work, clock, dtype=dtype)

    found: dict[str, Contestant] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for function in (rollout_ours, rollout_generate):
            found[f"{function.__name__}_{name}"] = made(function, dtype)
    return found


CONTESTANTS: dict[str, Contestant] = {
    "ours": ours,
    "ours_blocked": ours_blocked,
    "ours_compiled": ours_compiled,
    **_rollouts(),
}

if __name__ == "__main__":
    run(CONTESTANTS)
