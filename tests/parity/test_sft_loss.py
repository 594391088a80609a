"""Fine-tuning's batch, loss and gradients against a plain transformers loop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_llm.data.chat_tokenizer import load_chat_tokenizer
from lit_llm.data.instruction import InstructionDataModule
from lit_llm.data.tokenizer import train_tokenizer
from lit_llm.models import BaseModelConfig
from lit_llm.modules.causal_lm import model_inputs
from lit_llm.modules.sft import SFTModule

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
QUESTIONS = ["What sings?", "Say ñ 漢 😀", "Why?", "Which bird, and where does it sing at night?"]
ANSWERS = ["The bird.", "ñ 漢 😀", "Because.", "A red one, under the old house near the river."]


def conversations() -> list[list[dict[str, str]]]:
    """Conversations of one and two rounds, some with a system prompt."""
    result = []
    for number in range(24):
        messages = [{"role": "system", "content": f"Rule {number}"}] if number % 3 == 0 else []
        for turn in range(1 + number % 2):
            index = (number + turn) % 4
            messages += [
                {"role": "user", "content": f"{number} {QUESTIONS[index]}"},
                {"role": "assistant", "content": ANSWERS[index]},
            ]
        result.append(messages)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    lines = [json.dumps({"messages": messages}) for messages in conversations()]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    train_tokenizer(lines, vocab_size=300).save_pretrained(folder / "tokenizer")
    return folder


def data_of(folder: Path, **settings: Any) -> InstructionDataModule:
    data = InstructionDataModule(
        tokenizer=str(folder / "tokenizer"),
        sources=[str(folder / "chats.jsonl")],
        val_fraction=0.0,
        test_fraction=0.0,
        cache_dir=str(folder / "cache"),
        **{"seq_len": 256, "micro_batch_size": 24, **settings},
    )
    data.prepare_data()
    data.setup("fit")
    return data


def module_of(folder: Path) -> SFTModule:
    torch.manual_seed(0)
    module = SFTModule(
        BaseModelConfig(config=CONFIG), tokenizer=str(folder / "tokenizer"), seq_len=256
    )
    module.configure_model()
    return module


def test_masks_are_those_of_apply_chat_template(folder: Path) -> None:
    tokenizer = load_chat_tokenizer(str(folder / "tokenizer"))
    table = data_of(folder).cache.table(0, "train")
    for index, messages in enumerate(conversations()):
        expected: Any = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        sample = table[index]
        assert sample["input_ids"].tolist() == expected["input_ids"]
        assert (sample["labels"] != -100).long().tolist() == expected["assistant_masks"]
        assert sum(expected["assistant_masks"]) > 0


def gradients(module: SFTModule) -> dict[str, torch.Tensor]:
    grads = {name: p.grad.clone() for name, p in module.model.named_parameters()}
    module.model.zero_grad()
    return grads


def test_loss_and_gradients_are_those_of_a_plain_loop(folder: Path) -> None:
    from lit_llm.models import causal_lm_loss

    module = module_of(folder)
    batch = data_of(folder, packing=False).first_batch()
    assert batch["attention_mask"].min() == 0  # padding takes part
    sums = causal_lm_loss(module.model, **model_inputs(batch))
    (sums.loss / batch["num_targets"]).backward()
    ours = gradients(module)
    plain = module.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
        use_cache=False,
    )
    plain.loss.backward()
    theirs = gradients(module)
    assert sums.loss.item() / int(batch["num_targets"]) == pytest.approx(
        plain.loss.item(), rel=1e-6
    )
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() / expected.norm() < 1e-6, name


def test_packed_loss_and_gradients_are_those_of_single_samples(folder: Path) -> None:
    from lit_llm.models import causal_lm_loss

    module = module_of(folder)
    packs = data_of(folder)
    loss, tokens = torch.zeros(()), 0
    for index in range(len(packs.train_parts[0])):  # type: ignore[arg-type]
        batch = packs.collate()([packs.train_parts[0][index]])
        assert batch["document_ids"].max() > 0  # several samples a row
        sums = causal_lm_loss(module.model, **model_inputs(batch))
        sums.loss.backward()
        loss, tokens = loss + sums.loss.detach(), tokens + int(sums.num_targets)
    packed = gradients(module)
    # One sample at a time, no padding, no mask: nothing that packing could get wrong.
    single, count = torch.zeros(()), 0
    table = packs.cache.table(0, "train")
    for index in range(len(table)):
        sample = {name: value[None] for name, value in table[index].items()}
        output = module.model(**sample, use_cache=False)
        targets = int((sample["labels"][:, 1:] != -100).sum())
        (output.loss * targets).backward()
        single, count = single + output.loss.detach() * targets, count + targets
    assert tokens == count
    torch.testing.assert_close(loss, single, rtol=1e-5, atol=0)
    for name, expected in gradients(module).items():
        assert (packed[name] - expected).norm() / expected.norm() < 1e-5, name
