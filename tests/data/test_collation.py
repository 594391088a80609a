import pickle

import pytest
import torch

from lit_llm.data.bin_packing import PackedSamples, UnpackedSamples, best_fit
from lit_llm.data.collation import PadCollator
from lit_llm.data.packing import count_targets
from lit_llm.models.forward import causal_lm_loss

PAD, EOS = 9, 2


def sample(ids, read):
    """Ids of which the first ``read`` have no label."""
    input_ids = torch.as_tensor(ids)
    labels = input_ids.clone()
    labels[:read] = -100
    return {"input_ids": input_ids, "labels": labels}


SHORT, LONG = sample([5, 6, EOS], read=1), sample([7, 5, 6, 8, EOS], read=3)


def lists(batch):
    return {name: value.tolist() for name, value in batch.items()}


def test_unpacked_by_hand():
    items = [UnpackedSamples([SHORT], source=4)[0], UnpackedSamples([LONG], source=1)[0]]
    batch = PadCollator(PAD, multiple_of=4)(items)
    assert lists(batch) == {
        "input_ids": [[5, 6, EOS, PAD, PAD, PAD, PAD, PAD], [7, 5, 6, 8, EOS, PAD, PAD, PAD]],
        "labels": [[-100, 6, EOS] + 5 * [-100], [-100, -100, -100, 8, EOS] + 3 * [-100]],
        "attention_mask": [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]],
        "source": [4, 1],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_packed_by_hand():
    packed = PackedSamples([SHORT, LONG], [[0, 1], [0]], source=4)
    batch = PadCollator(PAD, multiple_of=5)([packed[0], packed[1]])
    assert lists(batch) == {
        "input_ids": [
            [5, 6, EOS, 7, 5, 6, 8, EOS, PAD, PAD],
            [5, 6, EOS] + 7 * [PAD],
        ],
        "labels": [
            [-100, 6, EOS, -100, -100, -100, 8, EOS, -100, -100],
            [-100, 6, EOS] + 7 * [-100],
        ],
        "document_ids": [[0, 0, 0, 1, 1, 1, 1, 1, -1, -1], [0, 0, 0] + 7 * [-1]],
        "position_ids": [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 0, 1, 2, 3, 4, 5, 6]],
        "source": [4, 4],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


@pytest.mark.parametrize(
    ("multiple_of", "max_len", "width"),
    [(1, None, 5), (4, None, 8), (5, None, 5), (4, 6, 6), (4, 5, 5), (4, 20, 8)],
)
def test_width(multiple_of, max_len, width):
    items = [UnpackedSamples([one], source=0)[0] for one in (SHORT, LONG)]
    batch = PadCollator(PAD, multiple_of, max_len)(items)
    assert batch["input_ids"].shape == (2, width)
    assert batch["attention_mask"].sum().item() == 8


def test_an_item_above_the_limit_is_never_cut():
    with pytest.raises(ValueError, match="an item of 5 tokens is above max_len=4"):
        PadCollator(PAD, max_len=4)([UnpackedSamples([LONG], source=0)[0]])


def test_an_item_without_labels():
    items = [UnpackedSamples([one], source=0)[0] for one in (sample([5, 6], read=2), SHORT)]
    batch = PadCollator(PAD)(items)
    assert batch["labels"][0].tolist() == 8 * [-100]
    assert batch["attention_mask"].sum(1).tolist() == [2, 3]
    assert count_targets(batch) == 2


def test_the_end_of_text_as_padding_changes_ids_only():
    items = [UnpackedSamples([one], source=0)[0] for one in (SHORT, LONG)]
    usual, same = PadCollator(PAD)(items), PadCollator(EOS)(items)
    for name in ("labels", "attention_mask", "source"):
        assert torch.equal(usual[name], same[name])
    assert (same["labels"] == EOS).sum() == 2  # the real ones are still trained on


def test_pickles():
    collator = pickle.loads(pickle.dumps(PadCollator(PAD, 4, max_len=6)))
    batch = collator([UnpackedSamples([LONG], source=0)[0]])
    assert batch["input_ids"].tolist() == [[7, 5, 6, 8, EOS, PAD]]


# The laws: packing and padding change neither the loss nor its gradient.

SAMPLES = [
    sample(torch.randint(3, 40, (length,), generator=torch.Generator().manual_seed(length)), read)
    for length, read in [(5, 2), (9, 4), (3, 0), (12, 7), (7, 7), (2, 1), (6, 0), (10, 1)]
]


@pytest.fixture(scope="module")
def model():
    """A random model whose weights are large enough for errors to show."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=41,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.double()


def loss_and_gradients(model, *batches):
    """Sums over the batches: loss, targets, and the gradients as one vector."""
    model.zero_grad()
    loss, targets = 0.0, 0
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "source"}
        result = causal_lm_loss(model, **inputs)
        assert result.num_targets == count_targets(batch)
        result.loss.backward()
        loss, targets = loss + result.loss.item(), targets + int(result.num_targets)
    return loss, targets, torch.cat([p.grad.flatten() for p in model.parameters()])


def assert_same(one, other):
    assert one[1] == other[1]
    assert one[0] == pytest.approx(other[0], rel=1e-10)
    assert torch.allclose(one[2], other[2], rtol=1e-8, atol=1e-9)
    assert other[2].abs().max() > 0.1


@pytest.fixture(scope="module")
def alone(model):
    """Each sample in a batch of its own, without any padding."""
    unpacked = UnpackedSamples(SAMPLES, source=0)
    collate = PadCollator(PAD, multiple_of=1)
    return loss_and_gradients(model, *(collate([unpacked[i]]) for i in range(len(unpacked))))


@pytest.mark.parametrize("collator", [PadCollator(PAD), PadCollator(0, 32), PadCollator(EOS, 1)])
def test_padding_changes_neither_loss_nor_gradient(model, alone, collator):
    unpacked = UnpackedSamples(SAMPLES, source=0)
    batch = collator([unpacked[i] for i in range(len(unpacked))])
    assert_same(loss_and_gradients(model, batch), alone)


@pytest.mark.parametrize("capacity", [12, 20, 64])
@pytest.mark.parametrize("pad_id", [PAD, EOS])
def test_packing_changes_neither_loss_nor_gradient(model, alone, capacity, pad_id):
    bins = best_fit([len(one["input_ids"]) for one in SAMPLES], capacity)
    packed = PackedSamples(SAMPLES, bins, source=0)
    assert max(map(len, bins)) > 1
    batch = PadCollator(pad_id)([packed[i] for i in range(len(packed))])
    assert_same(loss_and_gradients(model, batch), alone)


def test_packing_without_isolation_would_change_the_loss(model, alone):
    packed = PackedSamples(SAMPLES, [list(range(len(SAMPLES)))], source=0)
    batch = PadCollator(PAD)([packed[0]])
    del batch["document_ids"], batch["position_ids"]  # transformers can tell from these alone
    loss, targets, _ = loss_and_gradients(model, batch)
    assert targets == alone[1]
    assert abs(loss - alone[0]) > 0.1
