"""Loss and gradients of a reward model and of DPO against a plain transformers loop."""

import copy
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lit_llm.data.preference import PreferenceDataModule
from lit_llm.data.tokenizer import train_tokenizer
from lit_llm.models import BaseModelConfig
from lit_llm.modules.dpo import DPOModule
from lit_llm.modules.reward import RewardModule

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
ANSWERS = ["The bird.", "ñ 漢 😀", "Because it is red.", "Under the old house near the river."]


def record(number: int) -> dict[str, Any]:
    """Two to four ranked answers, so that prompts have one, three or six pairs."""
    answers = [f"{number} {answer}" for answer in ANSWERS[: 2 + number % 3]]
    return {
        "prompt": [{"role": "user", "content": f"What sings, number {number}?"}],
        "answers": [[{"role": "assistant", "content": answer}] for answer in answers],
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreferenceDataModule:
    folder = tmp_path_factory.mktemp("preferences")
    lines = [json.dumps(record(number)) for number in range(6)]
    (folder / "ranked.jsonl").write_text("\n".join(lines) + "\n")
    train_tokenizer(lines, vocab_size=300).save_pretrained(folder / "tokenizer")
    return PreferenceDataModule(
        tokenizer=str(folder / "tokenizer"),
        sources=[str(folder / "ranked.jsonl")],
        seq_len=128,
        micro_batch_size=6,
        val_fraction=0.0,
        test_fraction=0.0,
        cache_dir=str(folder / "cache"),
    )


def texts_of(data: PreferenceDataModule, number: int) -> list[tuple[list[int], int]]:
    """Ids of a prompt with each of its answers, by the template itself; where the answer begins."""
    found = []
    own = record(number)
    for answer in own["answers"]:
        tokenizer = data.tokenizer
        text = tokenizer.apply_chat_template([*own["prompt"], *answer], tokenize=False)
        start = tokenizer.apply_chat_template(
            own["prompt"], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(str(text).rstrip(), add_special_tokens=False)["input_ids"]
        found.append((ids, len(tokenizer(start, add_special_tokens=False)["input_ids"])))
    return found


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    expected = gradients(theirs)
    assert gradients(ours).keys() == expected.keys()
    for name, value in gradients(ours).items():
        torch.testing.assert_close(value, expected[name], atol=2e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("heads", [1, 3])
def test_a_reward_models_loss_is_instruct_gpts(data: PreferenceDataModule, heads: int) -> None:
    """Mean over prompts of the mean over their pairs, centred; every text read by itself."""
    torch.manual_seed(0)
    module = RewardModule(
        BaseModelConfig(config=CONFIG), data.tokenizer_path, 128, heads=heads, centring=0.02
    )
    module.configure_model()
    theirs = copy.deepcopy(module.model)
    found = module.compare(data.first_batch())
    (found.loss / 6).backward()
    total = torch.zeros(())
    for number in range(6):
        scores = torch.cat(
            [theirs(torch.tensor([ids])).logits for ids, _ in texts_of(data, number)]
        )
        losses = [
            -F.logsigmoid(scores[i] - scores[j]) + 0.02 * (scores[i] + scores[j]) ** 2
            for i in range(len(scores))
            for j in range(i + 1, len(scores))
        ]
        total = total + torch.stack(losses).mean()
    (total / 6).backward()
    assert found.loss.item() == pytest.approx(total.item(), rel=1e-6, abs=1e-6)
    assert_equal_gradients(module.model, theirs)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_dpos_loss_is_that_of_two_models(data: PreferenceDataModule, kind: Any) -> None:
    torch.manual_seed(0)
    module = DPOModule(
        BaseModelConfig(config=CONFIG), data.tokenizer_path, 128, beta=0.3, loss=kind
    )
    module.configure_model()
    theirs, reference = copy.deepcopy(module.model), copy.deepcopy(module.model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)

    def logprobs(model: Any, ids: list[int], start: int) -> torch.Tensor:
        tokens = torch.tensor([ids])
        rows = model(tokens).logits[0, start - 1 : -1].log_softmax(-1)
        return rows.gather(1, tokens[0, start:, None]).squeeze(1)

    batch = data.first_batch()
    texts = {tuple(ids): start for number in range(6) for ids, start in texts_of(data, number)}
    with torch.no_grad():
        batch["ref_logprobs"] = torch.stack(
            [
                logprobs(
                    reference,
                    row[: int(mask.sum())].tolist(),
                    texts[tuple(row[: int(mask.sum())].tolist())],
                ).sum()
                for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ]
        )
    found = module.compare(batch)
    (found.loss / 6).backward()
    total = torch.zeros(())
    for number in range(6):
        ratios = []
        for ids, start in texts_of(data, number):
            ratio = logprobs(theirs, ids, start) - logprobs(reference, ids, start).detach()
            ratios.append(ratio.sum() if kind == "sigmoid" else ratio.mean())
        losses = []
        for i in range(len(ratios)):
            for j in range(i + 1, len(ratios)):
                difference = ratios[i] - ratios[j]
                if kind == "sigmoid":
                    losses.append(-F.logsigmoid(0.3 * difference))
                else:
                    losses.append((difference - 1 / 0.6) ** 2)
        total = total + torch.stack(losses).mean()
    (total / 6).backward()
    assert found.loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert_equal_gradients(module.model, theirs)


def test_a_policy_that_is_its_reference_costs_log_two(data: PreferenceDataModule) -> None:
    torch.manual_seed(0)
    module = DPOModule(BaseModelConfig(config=CONFIG), data.tokenizer_path, 128)
    module.configure_model()
    batch = data.first_batch()
    batch["ref_logprobs"] = torch.zeros(len(batch["input_ids"]))
    batch["ref_logprobs"] = module.compare(batch).details["logps"]
    assert module.compare(batch).loss.item() == pytest.approx(6 * math.log(2), rel=1e-6)
