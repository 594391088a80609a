"""Conversations to batches: what is counted, cut, split, cached and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_llm.data.instruction import InstructionDataModule
from lit_llm.data.tokenizer import train_tokenizer
from lit_llm.errors import UserError


def chat(*texts: str) -> dict[str, Any]:
    """A conversation, the user first."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Bytes and the special tokens: every letter is a token, so lengths can be counted."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["x"], vocab_size=260).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(tokenizer: str, tmp_path: Path):
    def build(*sources: list[dict[str, Any]] | str, setup: str = "fit", **settings: Any) -> Any:
        paths = []
        for number, records in enumerate(sources):
            if isinstance(records, str):
                paths.append(records)
                continue
            path = tmp_path / f"source{number}.jsonl"
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
            paths.append(str(path))
        defaults = {"val_fraction": 0.0, "test_fraction": 0.0, "seq_len": 64}
        data = InstructionDataModule(
            tokenizer=tokenizer,
            sources=paths,
            cache_dir=str(tmp_path / "cache"),
            micro_batch_size=1,
            **{**defaults, **settings},
        )
        data.prepare_data()
        data.setup(setup)
        return data

    return build


def text_of(data: Any, row: torch.Tensor) -> str:
    return str(data.tokenizer.decode(row.tolist()))


# <|im_start|>user\n + q + <|im_end|>\n + <|im_start|>assistant\n + a + <|im_end|>\n
FRAME = (1 + 5) + 2 + (1 + 10) + 2


def test_what_was_read_cut_and_left_out_is_counted(make: Any) -> None:
    data = make(
        [
            chat("q", "a"),
            chat("q", "a"),  # repeated
            chat("only a question"),
            chat("q2", "x" * 63),  # the answer alone fills the context
            chat("y" * 60, "short"),  # the prompt is cut
            chat("q3", "a", "r" * 40, "b"),  # the second round does not fit
        ]
    )
    counts = data.cache.counts[0]
    assert (counts.read, counts.duplicates, counts.unanswered, counts.too_long) == (6, 1, 1, 1)
    assert (counts.prompt_cut, counts.turns_cut, counts.unended) == (1, 1, 0)
    assert counts.splits["train"] == {
        "samples": 3,
        "tokens": (FRAME + 2) + 64 + (FRAME - 1 + 3),  # cut after the end-of-turn token
        "trained": 2 + 6 + 2,
    }
    report = data.corpus_report()["sources"]["source0"]
    assert "1 repeated left out" in report["read"]
    assert "1 lost the beginning of their prompt" in report["read"]


def test_a_cut_sample_still_ends_with_its_end_of_turn(make: Any) -> None:
    data = make([chat("y" * 60, "short"), chat("q3", "a", "r" * 40, "b")], packing=False)
    end = data.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for index in range(2):
        labels = data.train_parts[0][index]["labels"]
        trained = labels[labels != -100]
        assert int(trained[-1]) == end


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", ["one<|im_end|>", "two<|im_end|>"]),
        ("last", ["two<|im_end|>"]),
        ("all", ["user\nA<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n<|im_start|>user\nB"
                 "<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"]),
    ],
)  # fmt: skip
def test_what_is_trained_on(make: Any, train_on: str, expected: list[str]) -> None:
    data = make([chat("A", "one", "B", "two")], train_on=train_on)
    item = data.train_parts[0][0]
    runs, before = [], -2
    for position in (item["labels"] != -100).nonzero().flatten().tolist():
        if position != before + 1:
            runs.append([])
        runs[-1].append(int(item["labels"][position]))
        before = position
    assert [data.tokenizer.decode(run) for run in runs] == expected


def test_plain_completions_and_texts_take_no_template(make: Any) -> None:
    completions = [{"prompt": "2+2=", "completion": "4"}]
    data = make(completions, [{"text": "z" * 100}], packing=False)
    item = data.train_parts[0][0]
    assert text_of(data, item["input_ids"]) == "2+2=4<|endoftext|>"
    assert text_of(data, item["labels"][item["labels"] != -100]) == "4<|endoftext|>"
    pieces = [data.train_parts[1][i] for i in range(len(data.train_parts[1]))]
    assert [len(piece["input_ids"]) for piece in pieces] == [64, 37]
    assert text_of(data, pieces[1]["input_ids"]).endswith("z<|endoftext|>")
    assert data.masked_sources == [0]


def test_equal_questions_are_never_in_two_splits(make: Any) -> None:
    records = [chat(f"question {n % 40}", f"answer {n}") for n in range(400)]
    data = make(records, val_fraction=0.2, test_fraction=0.2)
    questions: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        table = data.cache.table(0, split)
        assert len(table) % 10 == 0
        texts = {text_of(data, table[i]["input_ids"]) for i in range(len(table))}
        questions[split] = {text.split("\n")[1].partition("<")[0] for text in texts}
    assert all(questions.values())
    assert sum(map(len, questions.values())) == len(set().union(*questions.values())) == 40


def test_held_out_sources_are_not_trained_on(make: Any, tmp_path: Path) -> None:
    held_out = tmp_path / "held.jsonl"
    held_out.write_text(json.dumps(chat("q1", "a1")) + "\n")
    data = make([chat("q1", "a1"), chat("q2", "a2")], val_sources=[str(held_out)])
    assert data.cache.counts[0].duplicates == 1
    assert data.cache.counts[0].splits["train"]["samples"] == 1
    assert data.cache.counts[1].splits["validation"]["samples"] == 1


def test_the_questions_of_held_out_sources_are_not_trained_on_either(
    make: Any, tmp_path: Path
) -> None:
    held_out = tmp_path / "held.jsonl"
    held_out.write_text(json.dumps(chat("Question 1", "another answer")) + "\n")
    records = [chat("question  1", "a1"), chat("question 2", "a2")]
    data = make(records, val_sources=[str(held_out)])
    assert data.cache.counts[0].held_out == 1
    assert "question 2" in text_of(data, data.cache.table(0, "train")[0]["input_ids"])
    assert len(data.cache.table(0, "train")) == 1


def test_options_for_the_template_reach_it(make: Any, tmp_path: Path) -> None:
    template = tmp_path / "thinking.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ ('(thinks) ' if enable_thinking else '') + m['content'] + eos_token }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    options = {"chat_template_kwargs": {"enable_thinking": True}}
    records = [{**chat("q", "a"), **options}, chat("q", "a")]
    data = make(records, chat_template=str(template), packing=False)
    texts = [text_of(data, data.train_parts[0][i]["input_ids"]) for i in range(2)]
    assert texts == ["q(thinks) a<|endoftext|>", "qa<|endoftext|>"]
    with pytest.raises(UserError, match="'chat_template_kwargs' is a list, not an object"):
        make([{**chat("q", "a"), "chat_template_kwargs": [1]}])


def test_held_out_questions_come_from_all_sources_in_turn(make: Any) -> None:
    first = [chat(f"f{n}", f"F{n}") for n in range(50)]
    second = [chat(f"hello {n}", "there", f"s{n}", f"S{n}") for n in range(50)]
    data = make(first, second, val_fraction=0.5, setup="validate")
    questions = data.heldout_questions("validation", 4)
    assert [question.prompt[0] for question in questions] == ["f", "s", "f", "s"]
    for question in questions:
        assert question.reference == question.prompt.upper()
        text = text_of(data, torch.tensor(question.prompt_ids))
        assert text.endswith(f"{question.prompt}<|im_end|>\n<|im_start|>assistant\n")


def test_completions_are_asked_without_a_template(make: Any) -> None:
    records = [{"prompt": f"2+{n}=", "completion": str(2 + n)} for n in range(40)]
    data = make(records, val_fraction=0.5, setup="validate")
    for question in data.heldout_questions("validation", 3):
        assert text_of(data, torch.tensor(question.prompt_ids)) == question.prompt
        assert int(question.reference) == 2 + int(question.prompt[2:-1])


def test_packs_hold_whole_samples_kept_apart(make: Any) -> None:
    data = make([chat(f"q{n}", "a" * (n % 9)) for n in range(40)], seq_len=100)
    part = data.train_parts[0]
    assert len(part) < 20
    batch = data.collate()([part[0], part[len(part) - 1]])
    ids, documents = batch["input_ids"], batch["document_ids"]
    for row in range(2):
        for document in range(int(documents[row].max()) + 1):
            own = documents[row] == document
            text = text_of(data, ids[row][own])
            assert text.startswith("<|im_start|>user")
            assert text.count("<|im_start|>assistant") == 1
            assert batch["position_ids"][row][own].tolist() == list(range(int(own.sum())))


def test_the_same_settings_open_the_same_cache_and_others_do_not(make: Any) -> None:
    records = [chat(f"q{n}", "a") for n in range(10)]
    key = make(records).cache.key
    assert make(records).cache.key == key
    assert make(records, seed=5, packing=False).cache.key == key
    for change in ({"seq_len": 63}, {"train_on": "last"}, {"val_fraction": 0.4}):
        assert make(records, **change).cache.key != key


def test_a_conversation_a_template_refuses_is_named_with_its_line(
    make: Any, tmp_path: Path
) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('no system prompt') }}{% endif %}{{ m['content'] + eos_token }}"
        "{% endfor %}"
    )
    system = {"messages": [{"role": "system", "content": "s"}, *chat("q", "a")["messages"]]}
    with pytest.raises(UserError, match=r"source0.jsonl:2: .*no system prompt"):
        make([chat("q", "a"), system], chat_template=str(template))


def test_text_that_looks_like_a_turn_is_counted(make: Any) -> None:
    data = make([chat("a<|im_end|>b", "c"), chat("d", "user assistant role")])
    assert data.cache.counts[0].control_text == 1


def test_a_split_that_stays_empty_is_said(make: Any) -> None:
    with pytest.raises(UserError, match="no conversation fell into the validation split"):
        make([chat("q", "a")], val_fraction=0.000001)


def test_values_that_make_no_sense_are_refused(make: Any) -> None:
    with pytest.raises(UserError, match="seq_len is 1"):
        make([chat("q", "a")], seq_len=1)
    with pytest.raises(UserError, match="no tokenizer is given"):
        InstructionDataModule()


def test_the_first_batch_is_read_without_moving_on(make: Any) -> None:
    data = make([chat(f"q{n}", "a" * n) for n in range(30)])
    first = data.first_batch()
    assert torch.equal(first["input_ids"], data.first_batch()["input_ids"])
    assert torch.equal(first["input_ids"], next(iter(data.train_dataloader()))["input_ids"])
    assert not torch.equal(first["input_ids"], data.first_batch()["input_ids"])
