"""The forward passes against the models' own logits, over many architectures."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lit_llm.errors import UserError
from lit_llm.models import (
    causal_lm_loss,
    causal_lm_statistics,
    hidden_states,
    output_head,
    supports_fused_head,
)

FUSED = "llama qwen2 qwen3 mistral gemma3_text phi olmo2 stablelm gpt2 gpt_neox gptj opt mixtral"
FUSED += " qwen3_moe mamba"
NOT_FUSED = "gemma2 cohere granite minicpm3 modernbert-decoder"


def _tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model_type", FUSED.split())
def test_fused_path_gives_the_models_own_logits(tiny_model, model_type: str) -> None:
    model = tiny_model(model_type)
    assert supports_fused_head(model)
    tokens = _tokens()
    with torch.no_grad():
        logits = F.linear(hidden_states(model, tokens), *output_head(model))
        expected = model(tokens).logits
    assert expected.std() > 0.1  # not all alike, so equality means something
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", NOT_FUSED.split())
def test_models_that_change_their_logits_take_the_full_path(tiny_model, model_type: str) -> None:
    model = tiny_model(model_type)
    assert not supports_fused_head(model)
    tokens = _tokens()
    expected = F.cross_entropy(
        model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )
    result = causal_lm_loss(model, tokens, tokens)
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.nll, expected.detach())
    if model_type != "modernbert-decoder":  # whose head has a layer more
        # The fallback is needed: the plain projection gives something else.
        plain = F.linear(hidden_states(model, tokens), *output_head(model))
        assert (plain - model(tokens).logits).abs().max() > 1e-2


def test_every_head_of_transformers_is_understood() -> None:
    """No class that supports_fused_head would accept does more than project.

    Reads the source between the backbone and the loss of every causal language model, so a new
    release of transformers with a new kind of head fails here and not in somebody's training.
    """
    import inspect

    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from lit_llm.models.forward import _HEAD_FIELDS

    seen, strange = 0, []
    for name in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())):
        if not isinstance(name, str):
            continue
        source = inspect.getsource(getattr(transformers, name).forward).split('"""')[-1]
        if "self.lm_head(" not in source:
            continue
        seen += 1
        head = source[source.index("self.lm_head(") :]
        head = head[: head.index("loss")] if "loss" in head else head
        before = source[: source.index("self.lm_head(")].splitlines()
        lines = head.splitlines() + [line for line in before if "hidden_states" in line]
        changes = [
            line.strip()
            for line in lines
            if any(sign in line.split("#")[0] for sign in (" * ", " / ", "tanh", "softcap", "+ "))
        ]
        if changes and not any(field in source for field in _HEAD_FIELDS):
            strange.append((name, changes))
    assert seen > 50
    assert not strange


def test_scaled_head_in_neutral_position_is_fused(tiny_model) -> None:
    assert supports_fused_head(tiny_model("granite", logits_scaling=1.0))
    assert supports_fused_head(tiny_model("gemma2", final_logit_softcapping=None))
    assert not supports_fused_head(tiny_model("mixtral", output_router_logits=True))


def test_code_that_is_not_of_transformers_is_not_trusted_to_be_plain(tiny_model) -> None:
    model = tiny_model("llama")
    plain = type(model)
    model.__class__ = type("Sharded", (plain,), {})  # as FSDP2 does
    assert supports_fused_head(model)

    def forward(self, *args, **kwargs):
        output = plain.forward(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.__class__ = type("Custom", (plain,), {"forward": forward})
    assert not supports_fused_head(model)
    tokens = _tokens()
    expected = F.cross_entropy(
        model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(causal_lm_loss(model, tokens, tokens).loss, expected)


def test_adapters_work_and_an_adapted_head_is_not_fused(tiny_model) -> None:
    from peft import LoraConfig, get_peft_model

    tokens = _tokens()
    for modules, fused in ((["q_proj", "down_proj"], True), (["q_proj", "lm_head"], False)):
        model = tiny_model("llama")
        model = get_peft_model(
            model, LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
        ).eval()
        assert supports_fused_head(model) is fused
        logits = model(input_ids=tokens).logits[:, :-1]
        expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        loss = causal_lm_loss(model, tokens, tokens).loss
        torch.testing.assert_close(loss, expected)
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert grads
        assert all("lora_" in name for name in grads)


def test_prompt_tuning_goes_through_the_whole_model(tiny_model) -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(
        tiny_model("llama"),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ).eval()
    assert not supports_fused_head(model)


@pytest.mark.parametrize("fused", [True, False])
def test_statistics_per_position(tiny_model, fused: bool) -> None:
    model = tiny_model("llama" if fused else "cohere")
    tokens = _tokens()
    labels = tokens.clone()
    labels[0, :4] = -100
    nll, correct, is_target = causal_lm_statistics(model, tokens, labels, chunk_size=5)
    log_probs = model(tokens).logits.detach().log_softmax(-1)
    for row in range(2):
        for t in range(12):
            target = labels[row, t + 1].item() if t < 11 else -100
            assert is_target[row, t].item() == (target != -100)
            expected = 0.0 if target == -100 else -log_probs[row, t, target].item()
            assert nll[row, t].item() == pytest.approx(expected, abs=1e-5)
            best = log_probs[row, t].argmax().item()
            assert correct[row, t].item() == (target == best)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "opt"])
def test_left_padding_changes_nothing(tiny_model, model_type: str) -> None:
    model = tiny_model(model_type)
    tokens = _tokens()
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), tokens], dim=1)
    mask = (torch.arange(17) >= 5).long().expand(2, -1)
    plain = hidden_states(model, tokens)
    torch.testing.assert_close(
        hidden_states(model, padded, attention_mask=mask)[:, 5:], plain, rtol=1e-4, atol=1e-5
    )
    if model_type == "gpt2":  # learned positions: without the mask's positions it must differ
        wrong = hidden_states(model, padded, mask, torch.arange(17)[None])[:, 5:]
        assert (wrong - plain).abs().max() > 1e-3


LENGTHS = (5, 1, 6)
DOCUMENTS = torch.tensor([[0] * 5 + [1] + [2] * 6] * 2)
POSITIONS = torch.tensor([[*range(5), 0, *range(6)]] * 2)


def _logits(model, *args, **kwargs):
    return F.linear(hidden_states(model, *args, **kwargs), *output_head(model))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "mistral", "gemma3_text"])
def test_packed_logits_equal_unpacked_logits(tiny_model, model_type: str, attention: str) -> None:
    model = tiny_model(model_type, attention)
    tokens = _tokens()
    with torch.no_grad():
        apart = torch.cat([_logits(model, part) for part in tokens.split(LENGTHS, dim=1)], dim=1)
        packed = _logits(model, tokens, position_ids=POSITIONS, document_ids=DOCUMENTS)
        # Positions that begin anew are not enough: attention still reaches across.
        leaking = _logits(model, tokens, torch.ones_like(tokens), POSITIONS)
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-5)
    assert (leaking - apart).abs().max() > 1e-2


def test_registered_attention_gets_the_mask_or_is_refused(tiny_model) -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("of_a_user", sdpa_attention_forward)
    tokens = _tokens()
    packed = {"position_ids": POSITIONS, "document_ids": DOCUMENTS}
    model, plain = tiny_model("llama"), tiny_model("llama")
    model.config._attn_implementation = "of_a_user"
    with torch.no_grad():
        apart = torch.cat([_logits(plain, part) for part in tokens.split(LENGTHS, dim=1)], dim=1)
        torch.testing.assert_close(_logits(model, tokens, **packed), apart, rtol=1e-5, atol=1e-5)
    sliding = tiny_model("mistral")
    sliding.config._attn_implementation = "of_a_user"
    with pytest.raises(UserError, match="of_a_user"):
        hidden_states(sliding, tokens, **packed)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])  # fused, and through full logits
def test_packed_loss_isolates_documents(tiny_model, model_type: str) -> None:
    model = tiny_model(model_type)
    tokens = _tokens()
    labels = tokens.clone()
    labels[:, [0, 5, 6]] = -100  # the first token of a document has no predecessor
    packed = causal_lm_loss(
        model, tokens, labels, position_ids=POSITIONS, document_ids=DOCUMENTS
    ).loss
    apart = sum(causal_lm_loss(model, part, part).loss for part in tokens.split(LENGTHS, dim=1))
    torch.testing.assert_close(packed, apart)


def test_padding_beside_packed_documents_stays_finite_and_unseen(tiny_model) -> None:
    model = tiny_model("llama")
    tokens = _tokens()
    mask = torch.ones_like(tokens)
    mask[:, 9:] = 0
    documents = DOCUMENTS.clone()  # the padding carries the id of the last document
    options = {"position_ids": POSITIONS, "document_ids": documents}
    hidden = hidden_states(model, tokens, mask, **options)
    other = tokens.clone()
    other[:, 9:] = 5
    assert hidden.isfinite().all()
    assert torch.equal(hidden_states(model, other, mask, **options)[:, :9], hidden[:, :9])


def test_architectures_that_cannot_isolate_say_so(tiny_model) -> None:
    options = {"position_ids": POSITIONS, "document_ids": DOCUMENTS}
    with pytest.raises(UserError, match="isolate_documents"):
        hidden_states(tiny_model("mamba"), _tokens(), **options)
    with pytest.raises(UserError, match="positions"):
        hidden_states(tiny_model("llama"), _tokens(), document_ids=DOCUMENTS)
