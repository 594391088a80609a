"""Preferences to batches: order, ranks, resume, grouping, held-out loaders, and what is told."""

import itertools
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_llm.data.preference import PreferenceDataModule
from lit_llm.data.tokenizer import train_tokenizer
from lit_llm.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Bytes and the special tokens: every letter is a token, so lengths can be counted."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["x"], vocab_size=260).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(tokenizer: str, tmp_path: Path):
    def written(number: int, records: list[dict[str, Any]] | str) -> str:
        if isinstance(records, str):
            return records
        path = tmp_path / f"source{number}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    def build(*sources: Any, weights: list[float] | None = None, **settings: Any) -> Any:
        paths: list[Any] = [written(number, records) for number, records in enumerate(sources)]
        if weights:
            paths = [
                {"path": path, "weight": weight}
                for path, weight in zip(paths, weights, strict=True)
            ]
        held_out = {
            name: [written(first + n, records) for n, records in enumerate(settings.pop(name))]
            for name, first in (("val_sources", 10), ("ood_sources", 20))
            if name in settings
        }
        defaults = {"val_fraction": 0.0, "test_fraction": 0.0, "seq_len": 128}
        return PreferenceDataModule(
            tokenizer=tokenizer,
            sources=paths,
            cache_dir=str(tmp_path / "cache"),
            **held_out,
            **{**defaults, "micro_batch_size": 4, **settings},
        )

    return build


def compare(question: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    """One pair that goes through the chat template."""
    answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    prompt = [{"role": "user", "content": question}]
    return {"prompt": prompt, "answers": answers, **more}


def many(number: int, prefix: str = "q") -> list[dict[str, Any]]:
    """Comparisons with answers of 1 to 41 letters."""
    lengths = [1 + 7 * n % 41 for n in range(number)]
    return [compare(f"{prefix}{n}", "a" * lengths[n], "b") for n in range(number)]


def rank(data: Any, number: int, world_size: int) -> Any:
    """As it is on one of several ranks."""
    progress = SimpleNamespace(current=SimpleNamespace(ready=0))
    data.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"rank": number, "num_replicas": world_size},
        accumulate_grad_batches=2,
        limit_train_batches=1.0,
        max_steps=-1,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=False),
    )
    return data


def reading(data: Any, batches: int) -> Iterator[dict[str, Any]]:
    """So many training batches, epoch after epoch."""
    while batches:
        for batch in itertools.islice(data.train_dataloader(), batches):
            batches -= 1
            yield batch


def read(data: Any, batches: int) -> list[dict[str, Any]]:
    return list(reading(data, batches))


def places(batches: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Source and row of each prompt (each has one pair)."""
    return [
        place
        for batch in batches
        for place in zip(batch["pair_source"].tolist(), batch["pair_row"].tolist(), strict=True)
    ]


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)


# ----- batches --------------------------------------------------------------------------------


def test_a_batch_by_its_texts(make: Any) -> None:
    (batch,) = make([compare("Q", "yes", "no"), compare("R", "no", "y")], micro_batch_size=2)\
        .train_dataloader()  # fmt: skip
    data = make([compare("Q", "yes", "no"), compare("R", "no", "y")])
    texts = []
    for ids, labels, mask in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        real = int(mask.sum())
        assert mask.tolist() == [1] * real + [0] * (len(mask) - real)
        whole = data.tokenizer.decode(ids[:real])
        answer = data.tokenizer.decode(labels[labels != -100])
        assert whole.endswith(answer)
        texts.append((whole.removesuffix(answer), answer))
    asked = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    expected = {
        ("Q", "yes<|im_end|>"), ("Q", "no<|im_end|>"), ("R", "no<|im_end|>"), ("R", "y<|im_end|>")
    }  # fmt: skip
    assert set(texts) == {(asked.format(question), answer) for question, answer in expected}
    better = [texts[row][1] for row, _ in batch["pairs"].tolist()]
    assert sorted(better) == ["no<|im_end|>", "yes<|im_end|>"]
    assert batch["num_targets"] == 2


def test_a_line_feed_that_the_template_marks_is_not_read(make: Any, tmp_path: Path) -> None:
    template = tmp_path / "marks.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + '<|im_end|>\\n \\n' }}{% endgeneration %}{% else %}{{ m['content'] }}"
        "{% endif %}{% endfor %}"
    )
    data = make([compare("q", "a\n", "b")], chat_template=str(template), micro_batch_size=1)
    batch = data.first_batch()
    texts = [
        data.tokenizer.decode(ids[: int(mask.sum())])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert texts == ["qa\n<|im_end|>", "qb<|im_end|>"]
    assert data.cache.counts[0].unended == 0


def test_the_pairs_of_a_prompt_come_together_and_weigh_one(make: Any) -> None:
    records = [compare(f"s{n}", "x", "y") for n in range(9)]
    answers = [[{"role": "assistant", "content": text}] for text in ("aa", "b", "cccc", "d")]
    for n in range(9):
        prompt = [{"role": "user", "content": f"r{n}"}]
        records.append({"prompt": prompt, "answers": answers, "scores": [0.5, 2.0, -1.0, 2.0]})
    data = make(records, micro_batch_size=3)
    rows = []
    for batch in data.train_dataloader():
        for source_row in set(batch["pair_row"].tolist()):
            own = batch["pair_row"] == source_row
            rows.append(source_row)
            assert float(batch["pair_weights"][own].sum()) == pytest.approx(1.0)
            assert int(own.sum()) in (1, 5)
            assert batch["pair_index"][own].tolist() == list(range(int(own.sum())))
            assert not batch["margins"].any()  # scores are none
        assert data.count_targets(batch) == 3 == len(batch["source"])
        assert batch["num_targets"] == 3
    assert sorted(rows) == list(range(18))


def test_margins_come_with_the_pairs(make: Any) -> None:
    texts = {"chosen": "a", "rejected": "b"}
    margins = {"q": 1.5, "r": None, "s": -2.0}
    records = [{"prompt": word, **texts, "margin": own} for word, own in margins.items()]
    (batch,) = make(records, micro_batch_size=3).train_dataloader()
    found = dict(zip(batch["pair_row"].tolist(), batch["margins"].tolist(), strict=True))
    assert found == {0: 1.5, 1: 0.0, 2: -2.0}


# ----- order ----------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [True, False])
def test_an_epoch_has_each_sample_once_and_the_next_goes_on(make: Any, grouped: bool) -> None:
    data = make(many(30), many(16, "p"), group_by_length=grouped)
    batches = read(data, 23)  # 92 samples are two epochs of 46
    expected = Counter([(0, row) for row in range(30)] + [(1, row) for row in range(16)])
    seen = places(batches)
    assert Counter(seen[:46]) == Counter(seen[46:]) == expected
    assert seen[:46] != seen[46:]


def test_grouping_saves_padding(make: Any) -> None:
    shares = {}
    for grouped in (True, False):
        batches = read(make(many(200), group_by_length=grouped), 50)
        real = sum(int(batch["attention_mask"].sum()) for batch in batches)
        shares[grouped] = real / sum(batch["attention_mask"].numel() for batch in batches)
    assert shares[True] > shares[False] + 0.08


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("stop", [1, 5, 12, 19])
def test_resuming_anywhere_gives_the_same_batches(make: Any, stop: int, grouped: bool) -> None:
    sources = [many(30), many(15, "p")]
    settings = {"weights": [3.0, 1.0], "group_by_length": grouped}
    straight = read(make(*sources, **settings), 25)
    data = make(*sources, **settings)
    first = read(data, stop)
    state = json.loads(json.dumps(data.state_dict()))
    assert state["consumed"] == 4 * stop
    resumed = make(*sources, **settings, num_workers=1 if stop == 5 else 0)
    resumed.load_state_dict(state)
    assert same(resumed.first_batch(), resumed.first_batch())
    batches = first + read(resumed, 25 - stop)
    assert all(map(same, batches, straight))


@pytest.mark.parametrize("grouped", [True, False])
def test_two_ranks_read_what_one_reads(make: Any, grouped: bool) -> None:
    sources = [many(30), many(15, "p")]
    one = read(make(*sources, group_by_length=grouped), 10)
    two = [read(rank(make(*sources, group_by_length=grouped), number, 2), 5) for number in range(2)]
    for number in range(5):
        for part in range(2):
            mine, whole = two[part][number], one[2 * number + part]
            assert all(mine[name].equal(whole[name]) for name in whole if name != "num_targets")
            # 5 batches in windows of two, on each rank.
            assert mine["num_targets"] == (8 if number < 4 else 4)


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
@pytest.mark.parametrize("grouped", [True, False])
def test_samples_seen_are_those_that_were_read(
    make: Any, grouped: bool, weights: list[float] | None
) -> None:
    # The long ones are all of one source, so grouping moves the sources apart.
    sources = [many(70), [compare(f"l{n}", "z" * (60 + n), "y") for n in range(30)]]
    data = make(*sources, weights=weights, group_by_length=grouped, micro_batch_size=2)
    seen: Counter[int] = Counter()
    for number, batch in enumerate(reading(data, 130), 1):
        seen.update(batch["source"].tolist())
        if number % 7 == 0 or number > 120:
            assert data.samples_seen() == [seen[0], seen[1]]
    resumed = make(*sources, weights=weights, group_by_length=grouped, micro_batch_size=2)
    resumed.load_state_dict(data.state_dict())
    assert resumed.samples_seen() == [seen[0], seen[1]]
    resumed._cursor.consumed = 2  # back again, as after an older checkpoint
    again = make(*sources, weights=weights, group_by_length=grouped, micro_batch_size=2)
    first = Counter(read(again, 1)[0]["source"].tolist())
    assert resumed.samples_seen() == again.samples_seen() == [first[0], first[1]]


def test_tokens_seen_follow_the_samples(make: Any) -> None:
    data = make(many(8), micro_batch_size=8)
    (batch,) = read(data, 1)
    assert data.tokens_seen() == {"source0": int(batch["attention_mask"].sum())}


def test_the_state_is_refused_by_another_run(make: Any) -> None:
    records = many(20)
    data = make(records)
    read(data, 2)
    state = data.state_dict()
    for change, name in (
        ({"group_by_length": False}, "group_by_length"),
        ({"micro_batch_size": 2}, "micro_batch_size"),
        ({"seed": 1}, "seed"),
        ({"seq_len": 100}, "data"),
    ):
        with pytest.raises(UserError, match=f"another {name}"):
            make(records, **change).load_state_dict(state)
    plain = make(records, group_by_length=False)
    read(plain, 2)
    make(records, group_by_length=False, micro_batch_size=2).load_state_dict(plain.state_dict())


def test_another_second_test_leaves_what_is_trained_on(make: Any) -> None:
    records, settings = many(60), {"test_fraction": 0.3}
    data = make(records, ood_sources=[many(9, "o")], **settings)
    read(data, 2)
    state = data.state_dict()
    for change in ({}, {"ood_sources": [many(8, "p")]}):
        other = make(records, **settings, **change)
        other.load_state_dict(state)
        assert same(other.first_batch(), data.first_batch())
        # What is kept for all the data, such as a reference's log-probabilities, is another.
        assert other.identity() != data.identity()
    for change in ({"val_fraction": 0.1}, {"test_fraction": 0.2}, {"val_sources": [many(3, "v")]}):
        with pytest.raises(UserError, match="another data"):
            make(records, ood_sources=[many(9, "o")], **{**settings, **change}).load_state_dict(
                state
            )


# ----- held-out data --------------------------------------------------------------------------


def weight(batches: Any) -> float:
    return sum(float(batch["pair_weights"].sum()) for batch in batches)


def test_held_out_prompts_count_once_over_all_ranks(make: Any) -> None:
    data = make(many(10), val_sources=[many(7, "v")])
    data.setup("validate")
    assert weight(data.val_dataloader()) == 7
    ranks = [list(rank(make(many(10), val_sources=[many(7, "v")]), n, 2).val_dataloader())
             for n in range(2)]  # fmt: skip
    assert len(ranks[0]) == len(ranks[1]) == 1
    assert [weight(batches) for batches in ranks] == [4, 3]
    (filled,) = ranks[1]
    assert len(filled["input_ids"]) == 8  # the filler has rows, and weighs nothing
    assert filled["pair_weights"].tolist() == [1, 1, 1, 0]
    assert (filled["labels"][-2:] == -100).all()


def test_a_second_test_has_a_loader_of_its_own(make: Any) -> None:
    first, second = many(60), [*many(12, "o"), *many(60)[:30]]
    data = make(first, test_fraction=0.3, ood_sources=[second])
    data.setup()
    tested, ood = data.test_dataloader()
    assert {place[0] for place in places(list(tested))} == {0}
    assert {place[0] for place in places(list(ood))} == {1}
    assert weight(tested) == len(data.cache.table(0, "test"))
    # What repeats a sample of the first set is left out, whatever its split.
    assert weight(ood) == 12
    assert data.source_labels == ["source0", "source20"]
    assert [len(part) for part in data.held_out_parts("test")] == [int(weight(tested))]
    asked = {question.prompt[0] for question in data.heldout_questions("test", 50)}
    assert asked == {"q"}
    alone = make(first, test_fraction=0.3)
    assert weight(alone.test_dataloader()) == weight(tested)
    assert make(first).test_dataloader() == []


def test_a_second_test_needs_a_first_one(make: Any) -> None:
    with pytest.raises(UserError, match=r"above 0, or .* \(--data.ood_sources null\)"):
        make(many(10), ood_sources=[many(3, "o")])
    data = make(many(60), test_fraction=0.3, ood_sources=[many(60)])
    with pytest.raises(UserError, match="nothing of ood_sources is left to test .*60 repeated"):
        data.setup("test")
    with pytest.raises(UserError, match="no prompt fell into the test split"):
        make(many(3), test_fraction=0.0001).setup("test")


def test_questions_of_held_out_prompts(make: Any) -> None:
    plain = [{"prompt": f"2+{n}=", "answers": [str(2 + n), "0"]} for n in range(1, 9)]
    plain.append({"prompt": "", "answers": ["nobody", "asked"]})
    data = make(many(5), val_sources=[plain, [compare("hello?", "worse", "better", ranks=[2, 1])]])
    questions = data.heldout_questions("validation", 3)
    assert [question.reference for question in questions[1:2]] == ["better"]
    asked = [data.tokenizer.decode(question.prompt_ids) for question in questions]
    assert asked[1] == "<|im_start|>user\nhello?<|im_end|>\n<|im_start|>assistant\n"
    for text, question in list(zip(asked, questions, strict=True))[::2]:
        assert text == question.prompt
        assert int(question.reference) == 2 + int(question.prompt[2:-1])
    assert len(data.heldout_questions("validation", 50)) == 9


# ----- what is told ---------------------------------------------------------------------------


def test_pairs_can_be_looked_up(make: Any) -> None:
    records = [
        {**compare(f"q{n}", f"yes{n}", "no"), "kind": "even" if n % 2 == 0 else "odd"}
        for n in range(6)
    ]
    data = make(many(3, "t"), val_sources=[records])
    for batch in data.val_dataloader():
        for row, (better, worse) in zip(batch["pair_row"], batch["pairs"].tolist(), strict=True):
            about = data.pair_about(1, "validation", int(row))
            assert about["prompt"] == f"user\nq{int(row)}\nassistant\n"
            assert about["answers"] == [f"yes{int(row)}", "no"]
            assert about["pairs"] == [[0, 1]]
            assert about["kinds"] == ["odd" if row % 2 else "even"]
            for number, answer in ((better, "yes"), (worse, "no")):
                labels = batch["labels"][number]
                assert data.tokenizer.decode(labels[labels != -100]).startswith(answer)
    assert data.pair_about(0, "train", 2)["kinds"] is None


def test_lengths_of_training_pairs_are_of_the_answers(make: Any) -> None:
    several = {
        "prompt": "x" * 20,
        "answers": ["aaa", "b", "cc"],
        "scores": [1, 3, 2],
    }
    data = make([several], many(3), val_sources=[many(2, "v")])
    # Every letter and the end are a token: b > cc, b > aaa, cc > aaa; then 1, 8, 15 letters.
    assert data.train_pair_lengths().tolist() == [[2, 3], [2, 4], [3, 4], [2, 2], [9, 2], [16, 2]]


def test_reference_log_probabilities_come_with_the_batches(make: Any) -> None:
    held_out = {"val_sources": [many(3, "v")], "ood_sources": [many(4, "o")]}
    data = make(many(20), test_fraction=0.3, **held_out)
    parts = data.reference_parts()
    sizes = [len(data.cache.table(*key)) for key in
             ((0, "train"), (0, "test"), (1, "validation"), (2, "test"))]  # fmt: skip
    assert [len(part) for part in parts] == sizes
    for number, part in enumerate(parts):
        part.set_reference(torch.arange(2.0 * len(part)) + 100 * number)
    loaders = [data.train_dataloader(), *data.test_dataloader(), data.val_dataloader()]
    for number, loader in zip((0, 1, 3, 2), loaders, strict=True):
        for batch in loader:
            rows = batch["pair_row"] * 2.0 + 100 * number
            assert batch["ref_logprobs"][batch["pairs"][:, 0]].equal(rows)
            assert batch["ref_logprobs"][batch["pairs"][:, 1]].equal(rows + 1)


def test_the_report_and_the_warnings(make: Any) -> None:
    records = [*many(4), many(4)[0], compare("x" * 200, "a", "b"), compare("q9", "same", "same")]
    data = make(records, seq_len=90)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.prepare_data()
        data.prepare_data()
    # 2 + 9 + 16 + 23 tokens of answers and 2 for each "b", 21 of each prompt; 90 and 90.
    frame = len("<user\nq0<\n<assistant\n") * 8
    report = data.corpus_report()["sources"]["source0"]
    assert report["splits"]["train"] == {
        "samples": 5, "pairs": 5, "tokens": frame + (2 + 9 + 16 + 23) + 4 * 2 + 90 + 90
    }  # fmt: skip
    assert report["read"] == (
        "7 prompts read, with 6 pairs, 1 repeated left out, 1 pairs of equal answers left out, "
        "1 lost the beginning of their prompt"
    )
    assert report["format"].startswith("a prompt and several answers")
    told = [str(one.message) for one in caught if "lost their beginning" in str(one.message)]
    assert told == [
        "source0: 1 of 5 prompts lost their beginning; raise data.seq_len if it matters"
    ]


def test_swapped_columns_are_refused_with_the_name_of_the_source(make: Any) -> None:
    first = many(20)
    second = [{**record, "answers": record["answers"][::-1]} for record in first]
    with pytest.raises(UserError, match="source source1: 20 of its 20 pairs .* look swapped"):
        make(first, second).setup("fit")


def test_one_column_given_twice_is_refused(make: Any) -> None:
    with pytest.raises(UserError, match="source source0: chosen and rejected are equal in all 2"):
        make([compare("a", "x", "x"), compare("b", "y", "y")]).setup("fit")


def test_values_that_make_no_sense_are_refused(make: Any) -> None:
    with pytest.raises(UserError, match="seq_len is 1"):
        make(many(3), seq_len=1)
    with pytest.raises(UserError, match="micro_batch_size is 0"):
        make(many(3), micro_batch_size=0)
    with pytest.raises(UserError, match="no tokenizer is given"):
        PreferenceDataModule()
    with pytest.raises(UserError, match="it is of the format messages"):
        make([{"messages": [{"role": "user", "content": "x"}]}]).setup("fit")
