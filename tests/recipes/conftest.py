"""A small corpus, its tokenizer and a tiny model's settings, for recipes run whole."""

import random
from pathlib import Path

import pytest
import yaml

WORDS = (
    "the a red blue small old river house bird tree sings sleeps runs falls under over near".split()
)


def write_corpus(path: Path, documents: int, seed: int) -> None:
    """Write documents of random sentences, one a line of JSON."""
    import json

    rng = random.Random(seed)
    lines = []
    for number in range(documents):
        words = rng.choices(WORDS, k=rng.randint(20, 60))
        lines.append(json.dumps({"text": f"{seed} {number} " + " ".join(words) + "."}))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two sources, a tokenizer and ``tiny.yaml``."""
    from lit_llm.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    write_corpus(folder / "first.jsonl", 400, seed=1)
    write_corpus(folder / "second.jsonl", 200, seed=2)
    texts = (folder / "first.jsonl").read_text().splitlines()
    train_tokenizer(texts, vocab_size=320).save_pretrained(folder / "tokenizer")
    settings = {
        "data": {
            "tokenizer": str(folder / "tokenizer"),
            "sources": [
                {"path": str(folder / "first.jsonl"), "weight": 3.0},
                {"path": str(folder / "second.jsonl"), "weight": 1.0},
            ],
            "seq_len": 32,
            "micro_batch_size": 2,
            "cache_dir": str(folder / "cache"),
        },
        "model": {
            "base": {
                "preset": None,
                "config": {
                    "model_type": "llama",
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "tie_word_embeddings": True,
                },
                "dropout": 0.1,
            },
        },
        "trainer": {
            "max_steps": 12,
            "precision": "32-true",
            "accelerator": "cpu",
            "devices": 1,
            "accumulate_grad_batches": 2,
            "log_every_n_steps": 2,
            "val_check_interval": 8,
            "limit_val_batches": 3,
            "enable_model_summary": False,
        },
        "checkpoint": {"every_n_steps": 4},
        "samples": {"max_new_tokens": 4},
        "logging": {"wandb": "off"},
        "throughput": {"peak_flops": 1e11},  # measuring it takes longer than the steps
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return folder


def write_chats(path: Path, conversations: int, seed: int) -> None:
    """Write conversations of one or two rounds that answer with a word of the question."""
    import json

    rng = random.Random(seed)
    lines = []
    for number in range(conversations):
        messages = []
        for _ in range(rng.choice([1, 1, 2])):
            word = rng.choice(WORDS)
            filler = " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))
            messages += [
                {"role": "user", "content": f"say {word} {seed} {number} {filler}"},
                {"role": "assistant", "content": f"{word} {word}"},
            ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def tiny_chat(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two sources of conversations and ``sft.yaml``."""
    import torch

    from lit_llm.data.tokenizer import load_tokenizer
    from lit_llm.models import BaseModelConfig, build_model, export_model, vocabulary_of

    folder = tmp_path_factory.mktemp("tiny_chat")
    write_chats(folder / "first.jsonl", 300, seed=1)
    write_chats(folder / "second.jsonl", 100, seed=2)
    settings = yaml.safe_load((tiny / "tiny.yaml").read_text())
    tokenizer = load_tokenizer(tiny / "tokenizer")
    torch.manual_seed(0)
    base = BaseModelConfig(config=settings["model"]["base"]["config"])
    model = build_model(base, seq_len=128, **vocabulary_of(tokenizer))
    export_model(model, tokenizer, folder / "model")
    settings["data"] = {
        "sources": [
            {"path": str(folder / "first.jsonl"), "weight": 3.0},
            {"path": str(folder / "second.jsonl"), "weight": 1.0},
        ],
        "seq_len": 96,
        "micro_batch_size": 2,
        "cache_dir": str(folder / "cache"),
    }
    settings["model"] = {"base": {"pretrained": str(folder / "model"), "dropout": 0.1}}
    settings["samples"] = {"count": 3, "test_count": 5, "max_new_tokens": 6}
    settings["trainer"]["val_check_interval"] = 8
    (folder / "sft.yaml").write_text(yaml.safe_dump(settings))
    return folder


def write_preferences(path: Path, prompts: int, seed: int) -> None:
    """Write comparisons: the better answer repeats the question's word, the worse one another."""
    import json

    rng = random.Random(seed)
    lines = []
    for number in range(prompts):
        right, wrong = rng.sample(WORDS, 2)
        filler = " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
        # Short and long on either side, so that length says nothing.
        more = [" ".join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in range(2)]
        prompt = [{"role": "user", "content": f"say {right} {seed} {number} {filler}"}]
        chosen, rejected = f"sings {right} {more[0]}", f"falls {wrong} {more[1]}"
        record = {"prompt": prompt}
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            record[name] = [{"role": "assistant", "content": text}]
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def tiny_preferences(tiny_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two sources of comparisons, ``reward.yaml`` and ``dpo.yaml``."""
    folder = tmp_path_factory.mktemp("tiny_preferences")
    write_preferences(folder / "first.jsonl", 300, seed=1)
    write_preferences(folder / "second.jsonl", 100, seed=2)
    write_preferences(folder / "other.jsonl", 40, seed=3)
    settings = yaml.safe_load((tiny_chat / "sft.yaml").read_text())
    settings["data"]["sources"] = [
        {"path": str(folder / "first.jsonl"), "weight": 3.0},
        {"path": str(folder / "second.jsonl"), "weight": 1.0},
    ]
    settings["data"] |= {"ood_sources": [{"path": str(folder / "other.jsonl")}]}
    settings["data"] |= {"test_fraction": 0.2, "cache_dir": str(folder / "cache")}
    for name, samples in (("reward", {}), ("dpo", settings["samples"])):
        model = settings["model"] | ({"kl_prompts": 2, "kl_max_new_tokens": 4} if samples else {})
        own = settings | {"samples": samples, "model": model}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(own))
    return folder


PPO_REWARDS = """\
def spread(samples, scale=1.0):
    return [
        scale * len(set(one.response_ids)) / len(one.response_ids) + sum(one.response_ids) % 97 / 97
        for one in samples
    ]


def broken(samples):
    return [1 / (len(one.response_ids) - len(one.response_ids)) for one in samples]


def nothing(samples):
    return [float("nan") for _ in samples]
"""


@pytest.fixture(scope="session")
def tiny_ppo(tiny: Path, tiny_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``rewards.py`` and ``ppo.yaml``: twice 2 minibatches of 2 micro-batches."""
    folder = tmp_path_factory.mktemp("tiny_ppo")
    (folder / "rewards.py").write_text(PPO_REWARDS)
    settings = yaml.safe_load((tiny_chat / "sft.yaml").read_text())
    settings["data"] = {
        "sources": settings["data"]["sources"],
        "prompt_len": 64,
        "val_prompts": 6,
        "test_prompts": 8,
        "val_batch_size": 4,
        "ptx_seq_len": 32,
        "cache_dir": settings["data"]["cache_dir"],
    }
    settings["model"] = {
        "base": {"pretrained": str(tiny_chat / "model")},
        "rewards": [{"function": f"{folder / 'rewards.py'}:spread"}],
        "generation": {"max_new_tokens": 8},
        "ppo": {
            "rollout_batch_size": 8,
            "minibatch_size": 4,
            "micro_batch_size": 2,
            "num_ppo_epochs": 2,
            "missing_eos_penalty": 0.1,
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
    }
    settings["trainer"] = {
        "max_epochs": 3,
        "check_val_every_n_epoch": 2,
        "precision": "32-true",
        "accelerator": "cpu",
        "devices": 1,
        "log_every_n_steps": 1,
        "enable_model_summary": False,
        "enable_progress_bar": True,
    }
    settings["checkpoint"] = {"every_n_steps": 1, "keep": -1}
    settings["samples"] = {"count": 3}
    (folder / "ppo.yaml").write_text(yaml.safe_dump(settings))
    return folder
