"""Tokens a second over the time of training, validation left out."""

from types import SimpleNamespace

import pytest
import torch

from lit_llm.callbacks import throughput
from lit_llm.callbacks.throughput import Throughput


def test_rate_and_utilisation_by_hand(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock.now)
    logged = {}
    module = SimpleNamespace(
        device=torch.device("cpu"),
        data_parallel_size=2,
        log=lambda name, value, prog_bar=False: logged.update({name: value}),
    )
    trainer = SimpleNamespace(
        precision="32-true",
        accumulate_grad_batches=2,
        log_every_n_steps=1,
        global_step=1,
        world_size=2,
        datamodule=SimpleNamespace(tokens_seen=lambda: {"en": 12}),
    )
    callback = Throughput(peak_flops=1000.0)
    callback.on_train_start(trainer, module)
    callback._flops_per_token = 10.0
    batch = {"input_ids": torch.zeros(3, 8)}
    padded = {"input_ids": torch.zeros(3, 8), "attention_mask": torch.ones(3, 4)}
    callback.on_train_batch_start(trainer, module, batch, 0)
    clock.now += 1
    callback.on_train_batch_end(trainer, module, None, batch, 0)
    assert logged == {}, "the window is not complete"
    callback.on_validation_start(trainer, module)
    clock.now += 50
    callback.on_validation_end(trainer, module)
    clock.now += 2
    callback.on_train_batch_end(trainer, module, None, padded, 1)
    # (24 + 12 real tokens) x 2 ranks in 1 + 2 seconds
    assert logged["perf/tokens_per_s"] == pytest.approx(24.0)
    assert logged["perf/mfu"] == pytest.approx(24.0 * 10 / (1000 * 2))
    assert logged["perf/peak_memory"] > 2**20
    assert logged["data/tokens/en"] == 12
