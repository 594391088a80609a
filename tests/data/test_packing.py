import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lit_llm.data.packing import PackedBlocks
from lit_llm.errors import UserError

EOS, PAD = 0, 9


def stream(*documents):
    """Token stream of hand-made documents, each closed by EOS."""
    closed = [[*document, EOS] for document in documents]
    starts = np.cumsum([0] + [len(document) for document in closed[:-1]])
    return SimpleNamespace(
        tokens=np.array(list(itertools.chain.from_iterable(closed)), dtype=np.uint16), starts=starts
    )


# 11 12 13 EOS | 21 EOS | 31 32 33 34 EOS
THREE = stream([11, 12, 13], [21], [31, 32, 33, 34])


def test_blocks_share_one_token():
    blocks = PackedBlocks(THREE, 4, pad_id=PAD, source=2)
    assert [block["input_ids"].tolist() for block in (blocks[0], blocks[1], blocks[2])] == [
        [11, 12, 13, EOS],
        [EOS, 21, EOS, 31],
        [31, 32, 33, 34],
    ]
    assert len(blocks) == 3  # the last EOS does not fill a block
    assert blocks[1]["labels"].tolist() == [EOS, 21, EOS, 31]
    assert blocks[1]["source"].shape == () and blocks[1]["source"].item() == 2
    assert {value.dtype for value in blocks[0].values()} == {torch.int64}
    assert set(blocks[0]) == {"input_ids", "labels", "source"}


def test_the_tail_is_padded_without_labels():
    blocks = PackedBlocks(THREE, 4, pad_id=PAD, keep_tail=True)
    assert len(blocks) == 4
    assert blocks[3]["input_ids"].tolist() == [34, EOS, PAD, PAD]
    assert blocks[3]["labels"].tolist() == [34, EOS, -100, -100]


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 8, 9, 40])
@pytest.mark.parametrize("seq_len", [2, 3, 8])
def test_every_token_but_the_first_is_predicted_exactly_once(length, seq_len):
    tokens = list(range(100, 100 + length))
    one = SimpleNamespace(tokens=np.array(tokens), starts=np.array([0]))
    predicted = []
    for block in PackedBlocks(one, seq_len, pad_id=PAD, keep_tail=True):
        targets = block["labels"][1:]
        predicted += targets[targets != -100].tolist()
    assert predicted == tokens[1:]


def test_isolated_documents_have_ids_positions_and_no_target_across_the_border():
    blocks = PackedBlocks(THREE, 8, pad_id=PAD, isolate=True, keep_tail=True)
    first, second = blocks[0], blocks[1]
    assert first["input_ids"].tolist() == [11, 12, 13, EOS, 21, EOS, 31, 32]
    assert first["document_ids"].tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert first["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert first["labels"].tolist() == [11, 12, 13, EOS, -100, EOS, -100, 32]
    # The document goes on: its ids and positions count from the block's start again.
    assert second["input_ids"].tolist() == [32, 33, 34, EOS] + 4 * [PAD]
    assert second["document_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert second["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert second["labels"].tolist() == [32, 33, 34, EOS] + 4 * [-100]


def test_isolated_block_that_starts_with_a_document():
    blocks = PackedBlocks(stream([1], [2, 3, 4]), 3, pad_id=PAD, isolate=True)
    # 1 EOS | 2 3 4 EOS: blocks 1 EOS 2, 2 3 4
    assert blocks[0]["document_ids"].tolist() == [0, 0, 1]
    assert blocks[0]["labels"].tolist() == [1, EOS, -100]
    assert blocks[1]["document_ids"].tolist() == [0, 0, 0]
    assert blocks[1]["labels"].tolist() == [2, 3, 4]


def test_isolation_drops_only_the_first_tokens_of_documents():
    generator = np.random.default_rng(0)
    documents = [list(range(5, 5 + n)) for n in generator.integers(1, 12, size=30)]
    total = sum(len(document) + 1 for document in documents)
    blocks = PackedBlocks(stream(*documents), 7, pad_id=PAD, isolate=True, keep_tail=True)
    targets = sum(int((block["labels"][1:] != -100).sum()) for block in blocks)
    assert targets == total - len(documents)


def test_a_block_needs_two_tokens():
    with pytest.raises(UserError, match="seq_len is 1"):
        PackedBlocks(THREE, 1, pad_id=PAD)


def test_no_block_outside():
    blocks = PackedBlocks(THREE, 4, pad_id=PAD)
    for index in (-1, 3):
        with pytest.raises(IndexError):
            blocks[index]
