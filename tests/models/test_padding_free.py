"""A batch as one row without padding gives what the masked batch gives."""

from __future__ import annotations

import pytest
import torch

from lit_llm.functional import block_diagonal_causal_mask
from lit_llm.models import causal_lm_loss, causal_lm_statistics, forward, hidden_states
from lit_llm.models.padding_free import without_padding

LENGTHS = (9, 4, 12)
REAL = torch.tensor([[1] * n + [0] * (12 - n) for n in LENGTHS])


def _tokens() -> torch.Tensor:
    return torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(1))


def _padded(side: str) -> dict[str, torch.Tensor]:
    mask = REAL if side == "right" else REAL.flip(1)
    return {"input_ids": _tokens(), "attention_mask": mask}


def _packed() -> dict[str, torch.Tensor]:
    """Three rows of documents of 5, 1, 6 and fewer tokens, then padding."""
    documents = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3, [0] * 4 + [-1] * 8, [0, 1] + [2] * 10])
    positions = torch.tensor(
        [
            [*range(5), *range(4), *range(3)],
            [*range(4), *range(8)],
            [0, 0, *range(10)],
        ]
    )
    return {"input_ids": _tokens(), "document_ids": documents, "position_ids": positions}


BATCHES = {
    "right": lambda: _padded("right"),
    "left": lambda: _padded("left"),
    "packed": _packed,
}


def _labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Every real token but the first of its document."""
    labels = batch["input_ids"].clone()
    if "attention_mask" in batch:
        real = batch["attention_mask"]
        return labels.masked_fill((real == 0) | (real.cumsum(1) == 1), -100)
    return labels.masked_fill((batch["document_ids"] < 0) | (batch["position_ids"] == 0), -100)


def _real(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (batch["attention_mask"] if "attention_mask" in batch else batch["document_ids"] + 1) > 0


def test_rows_side_by_side_by_hand() -> None:
    tokens = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]])
    documents = torch.tensor([[-1, 0, 0, 1], [1, 1, -1, -1], [-1, -1, -1, -1]])
    row = without_padding(tokens, documents)
    assert row.input_ids.tolist() == [[11, 12, 13, 20, 21]]
    assert row.position_ids.tolist() == [[0, 1, 0, 0, 1]]  # equal ids in two rows are two documents
    assert row.restore(torch.tensor([1, 2, 3, 4, 5])).tolist() == [
        [0, 1, 2, 3],
        [4, 5, 0, 0],
        [0, 0, 0, 0],
    ]
    wide = row.restore(torch.ones(5, 2, requires_grad=True))
    assert (wide.shape, wide.sum().item()) == ((3, 4, 2), 10)


@pytest.fixture
def as_flash(monkeypatch: pytest.MonkeyPatch):
    """Runs sdpa in the form that FlashAttention needs; transformers isolates that one too."""

    def switch() -> list[dict]:
        calls: list[dict] = []
        monkeypatch.setattr(forward, "_takes_one_row", lambda model: True)
        inputs = forward._inputs

        def recorded(*args):
            result = inputs(*args)
            calls.append(result[0])
            return result

        monkeypatch.setattr(forward, "_inputs", recorded)
        return calls

    return switch


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mistral", "gemma2", "qwen3_moe"])
def test_one_row_has_the_logits_and_gradients_of_the_masked_batch(
    tiny_model, as_flash, model_type: str, kind: str
) -> None:
    batch = BATCHES[kind]()
    labels, real = _labels(batch), _real(batch)
    results = []
    for flat in (False, True):
        calls = as_flash() if flat else []
        model = tiny_model(model_type)
        states = hidden_states(model, **batch)
        loss = causal_lm_loss(model, labels=labels, **batch)
        loss.loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        statistics = causal_lm_statistics(model, labels=labels, **batch)
        results.append((states[real], loss.loss, loss.num_targets, gradients, statistics))
        if flat:
            assert [call["input_ids"].shape for call in calls] == [(1, int(real.sum()))] * 3
            assert not any("attention_mask" in call for call in calls)
            assert not states[~real].any()
    assert results[0][2] == (labels[:, 1:] != -100).sum()
    for masked, flat in zip(*results, strict=True):
        torch.testing.assert_close(flat, masked, rtol=1e-4, atol=1e-5)


def test_the_one_row_forgets_no_boundary(tiny_model, as_flash) -> None:
    """Documents of one token, and rows that go on counting where the last one stopped."""
    model = tiny_model("llama")
    tokens = _tokens()
    documents = torch.arange(12).expand(3, -1)
    as_flash()
    with torch.no_grad():
        found = hidden_states(
            model, tokens, position_ids=torch.zeros_like(tokens), document_ids=documents
        )
        alone = torch.stack([hidden_states(model, row[:, None])[:, 0] for row in tokens])
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


def test_flash_takes_one_row_and_other_attention_does_not(tiny_model) -> None:
    model = tiny_model("llama")
    expected = {"sdpa": False, "eager": False, "flex_attention": False, "blocked": False}
    expected |= {"flash_attention_2": True, "kernels-community/flash-attn3": True}
    for attention, one_row in expected.items():
        model.config._attn_implementation = attention
        assert forward._takes_one_row(model) is one_row, attention


def test_what_would_mix_rows_keeps_them(tiny_model, as_flash) -> None:
    """State runs on from row to row, and positions of one's own would not mark the documents."""
    calls = as_flash()
    batch = _padded("right")
    hidden_states(tiny_model("mamba"), **batch)
    hidden_states(tiny_model("llama"), **batch, position_ids=torch.arange(3, 15).expand(3, -1))
    hidden_states(tiny_model("llama"), batch["input_ids"])
    assert [call["input_ids"].shape for call in calls] == [(3, 12)] * 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_of_packed_rows_stays_finite_and_unseen(tiny_model, attention: str) -> None:
    batch = _packed()
    mask = block_diagonal_causal_mask(batch["document_ids"])
    assert mask.diagonal(dim1=2, dim2=3).all()
    model = tiny_model("llama", attention)
    real = _real(batch)
    first = hidden_states(model, **batch)
    other = batch | {"input_ids": batch["input_ids"].masked_fill(~real, 5)}
    assert first.isfinite().all()
    assert torch.equal(hidden_states(model, **other)[real], first[real])
    model(input_ids=batch["input_ids"]).logits.sum().backward()  # the backward pass too
    loss = causal_lm_loss(model, labels=_labels(batch), **batch).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("flat", [False, True])
def test_padding_predicts_nothing(tiny_model, as_flash, flat: bool) -> None:
    """Labels of every real token: the first after left padding has nothing before it."""
    if flat:
        as_flash()
    model = tiny_model("llama")
    batch = _padded("left")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    result = causal_lm_loss(model, labels=labels, **batch)
    _, _, is_target = causal_lm_statistics(model, labels=labels, **batch)
    assert result.num_targets == is_target.sum() == sum(LENGTHS) - 3


@pytest.mark.slow
def test_flex_attention_isolates_the_documents_of_every_row(tiny_model) -> None:
    """transformers' own mask, made from positions: it is right for more rows than one."""
    from torch.nn.attention.flex_attention import create_mask
    from transformers.masking_utils import create_causal_mask

    batch = _packed()
    config = tiny_model("llama").config
    config._attn_implementation = "flex_attention"
    blocks = create_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(3, 12, 32),
        attention_mask=None,
        past_key_values=None,
        position_ids=batch["position_ids"],
    )
    mask = create_mask(blocks.mask_mod, 3, 1, 12, 12, device="cpu")
    assert torch.equal(mask, block_diagonal_causal_mask(batch["document_ids"]))
