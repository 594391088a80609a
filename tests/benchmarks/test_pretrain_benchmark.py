"""The benchmark runs, at a size where it says nothing about speed."""

import json

import pytest

from benchmarks import parts
from benchmarks.pretrain import main, table


@pytest.mark.thorough
@pytest.mark.slow
def test_contestants_run_in_turn_and_are_compared(capsys, tmp_path):
    pytest.importorskip("accelerate", reason="Hugging Face Trainer needs accelerate")
    names = ["ours_eager", "ours_bare_eager", "hf_trainer", "plain"]
    file = tmp_path / "rounds.json"
    options = ["--size", "tiny", "--rounds", "1", "--steps", "2", "--warmup", "1"]
    results = main([*options, "--contestants", ",".join(names), "--json", str(file)])

    assert list(results) == names
    assert all(len(rounds) == 1 for rounds in results.values())
    assert all(one["tokens_per_s"] > 0 for rounds in results.values() for one in rounds)
    assert all(one["peak_bytes"] > 50e6 for rounds in results.values() for one in rounds)
    assert json.loads(file.read_text()) == results
    assert "| hf_trainer |" in capsys.readouterr().out


def test_the_table_shows_ratios_of_medians():
    def rounds(*rates):
        return [{"tokens_per_s": x, "step_seconds": 1 / x, "peak_bytes": x * 1e9} for x in rates]

    text = table({"ours": rounds(10, 40, 20), "hf_trainer": rounds(5, 5, 100)}, "hf_trainer")

    ours = text.splitlines()[2].split("|")
    assert ours[2].strip() == "20"
    assert ours[3].strip() == "10 to 40"
    assert ours[5].strip() == "20.00"
    assert [ours[6].strip(), ours[7].strip()] == ["4.00", "4.00"]


def test_an_unknown_reference_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--contestants", "ours,plain", "--reference", "hf_trainer"])
    assert "not among the contestants" in capsys.readouterr().err


def test_a_contestant_that_fails_ends_the_run_with_its_message():
    with pytest.raises(SystemExit, match=r"(?s)nobody failed:.*invalid choice"):
        main(["--size", "tiny", "--rounds", "1", "--contestants", "nobody"])


def test_the_parts_of_a_step_are_timed(capsys, monkeypatch):
    for name, value in {"LENGTH": 8, "TOKENS": 32, "VOCABULARY": 64}.items():
        monkeypatch.setattr(parts, name, value)

    parts.main(["--repeats", "1"])

    printed = capsys.readouterr().out
    assert printed.count("GFLOP/s") >= 7 * 3 + 5
    assert "blocked_causal_attention" in printed
    assert "full logits" in printed
