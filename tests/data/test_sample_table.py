"""Tokenised samples on disk: written, mapped, told when they are damaged."""

import pickle
from pathlib import Path

import pytest

from lit_llm.data.sample_table import SampleTable, SampleWriter

SAMPLES = [([5, 6, 7], [False, True, False]), ([8], [True]), ([70000, 2, 3, 4], [True] * 4)]


def write(path: Path, repeat: int = 1) -> SampleTable:
    with SampleWriter(path) as writer:
        for _ in range(repeat):
            for index, (ids, trained) in enumerate(SAMPLES):
                writer.write(ids, trained, {"n": index, "text": "ñ"} if index else None)
    return SampleTable(path)


def test_samples_come_back_with_labels_where_trained(tmp_path: Path) -> None:
    table = write(tmp_path / "a.arrow")
    assert len(table) == 3
    assert [table[i]["input_ids"].tolist() for i in range(3)] == [[5, 6, 7], [8], [70000, 2, 3, 4]]
    labels = [table[i]["labels"].tolist() for i in range(3)]
    assert labels == [[-100, 6, -100], [8], [70000, 2, 3, 4]]
    assert table.lengths().tolist() == [3, 1, 4]
    assert [table.about(i) for i in range(3)] == [
        None,
        {"n": 1, "text": "ñ"},
        {"n": 2, "text": "ñ"},
    ]


def test_many_samples_lie_in_several_batches_of_rows(tmp_path: Path) -> None:
    table = write(tmp_path / "a.arrow", repeat=1500)
    assert len(table) == 4500
    for index in (0, 999, 1000, 2999, 3000, 4499):
        assert table[index]["input_ids"].tolist() == SAMPLES[index % 3][0]
    assert int(table.lengths().sum()) == 1500 * 8


def test_an_empty_table_is_one(tmp_path: Path) -> None:
    with SampleWriter(tmp_path / "a.arrow"):
        pass
    assert len(SampleTable(tmp_path / "a.arrow")) == 0


def test_a_worker_gets_the_path_and_maps_it_anew(tmp_path: Path) -> None:
    table = write(tmp_path / "a.arrow", repeat=1000)
    data = pickle.dumps(table)
    assert len(data) < 1000
    assert pickle.loads(data)[2999]["input_ids"].tolist() == SAMPLES[2][0]


def test_a_damaged_file_and_a_missing_one_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path / "a.arrow")
    data = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="a.arrow is damaged"):
        SampleTable(tmp_path / "a.arrow")
    with pytest.raises(FileNotFoundError):
        SampleTable(tmp_path / "b.arrow")
