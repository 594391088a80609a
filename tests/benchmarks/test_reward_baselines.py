"""The simple judges of preferences learn what is there to learn, and nothing else."""

import json
import random

import pytest

from benchmarks.reward_baselines import main, parse_source
from lit_llm.data.splits import assign_split

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()


def write(path, pairs):
    records = [
        {"prompt": f"question {number}?", "chosen": chosen, "rejected": rejected}
        for number, (chosen, rejected) in enumerate(pairs)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def some_words(rng, count):
    return " ".join(rng.choices(WORDS, k=count))


def run(*arguments):
    options = ["--val_fraction", "0.1", "--test_fraction", "0.3"]
    return main(["--sources", *arguments, *options])


def test_words_that_tell_are_learned_and_lengths_too(tmp_path, capsys):
    rng = random.Random(0)
    polite = [(some_words(rng, 6) + " thanks", some_words(rng, 6) + " nope") for _ in range(300)]
    short = [(some_words(rng, 3), some_words(rng, 6)) for _ in range(300)]
    files = [write(tmp_path / "polite.jsonl", polite), write(tmp_path / "short.jsonl", short)]
    results = run(files[0], f"{files[1]}:preference")
    assert list(results) == ["polite", "short"]
    words = results["polite"]["bag of words"]
    assert words.value == 1 and words.low > 0.9
    held_out = [
        n for n in range(300) if assign_split(f"question {n}?", test_fraction=0.3) == "test"
    ]
    assert words.pairs == words.prompts == len(held_out) > 60
    by_length = results["short"]["always the shorter answer"]
    assert by_length.value > 0.95
    printed = capsys.readouterr().out
    assert "\n## short\n" in printed and "| bag of words | 100.0 % |" in printed
    assert f"test {words.pairs:,}." in printed


def test_nothing_is_learned_from_random_labels(tmp_path):
    # A 95 % interval leaves 0.5 out once in twenty sets, so one set would show nothing.
    found = {"length": [], "words": []}
    for seed in range(20):
        rng = random.Random(seed)
        pairs = [(some_words(rng, 6), some_words(rng, 6)) for _ in range(400)]
        path = write(tmp_path / f"noise{seed}.jsonl", pairs)
        ((length, words),) = (rates.values() for rates in run(path).values())
        found["length"].append(length)
        found["words"].append(words)
    for name, rates in found.items():
        held = sum(one.low < 0.5 < one.high for one in rates)
        assert held >= 16, name
        mean = sum(one.value * one.pairs for one in rates) / sum(one.pairs for one in rates)
        assert abs(mean - 0.5) < 0.04, name  # more than three standard errors over 2,400 pairs


def test_the_words_of_messages_count_and_pairs_of_a_prompt_stay_one(tmp_path):
    rng = random.Random(2)

    def turn(text):
        return {"role": "assistant", "content": text}

    records = [
        {
            "prompt": [{"role": "user", "content": f"question {number}?"}],
            "answers": [[turn(f"{kind} {some_words(rng, 4)}")] for kind in ("yes", "hm", "no")],
        }
        for number in range(200)
    ]
    path = tmp_path / "ranked.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = run(f"{path}:ranked")["ranked"]["bag of words"]
    assert found.value > 0.95 and found.pairs == 3 * found.prompts


def test_a_source_may_name_its_format():
    assert (parse_source("a.jsonl:hh", 7).format, parse_source("a.jsonl:hh", 7).max_records) == (
        "hh",
        7,
    )
    assert parse_source("C:/a.jsonl").path == "C:/a.jsonl"
    assert parse_source("python-docs").format == "auto"


def test_too_little_is_said_and_mistakes_are_one_sentence(tmp_path, capsys):
    assert run(write(tmp_path / "few.jsonl", [("a", "b")])) == {"few": {}}
    assert "There are too few" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        run(str(tmp_path / "missing.jsonl"))
    assert "missing.jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--sources", "python-docs", "--test_fraction", "1"])
    assert "must leave something for training" in capsys.readouterr().err
