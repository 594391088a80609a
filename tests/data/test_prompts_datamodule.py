"""Prompts in tokens: what is cut, counted and held out, in which order they come, and loaders."""

import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_llm.arguments import listed_sources
from lit_llm.data.instruction import InstructionDataModule
from lit_llm.data.preference import PreferenceDataModule
from lit_llm.data.prompts import Prompt, PromptDataModule
from lit_llm.data.text import TextDataModule
from lit_llm.data.tokenizer import train_tokenizer
from lit_llm.errors import UserError

OPENS = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Bytes and the special tokens: every letter is a token, so lengths can be counted."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["x"], vocab_size=260).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(tokenizer: str, tmp_path: Path):
    numbers = itertools.count()

    def written(name: str, records: list[dict[str, Any]] | str) -> str:
        if isinstance(records, str):
            return records
        # Data is read late, so nobody may write over that of another.
        path = tmp_path / str(next(numbers)) / name
        path.parent.mkdir()
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    def build(
        *sources: Any, kind: Any = PromptDataModule, options: Any = None, **given: Any
    ) -> Any:
        paths: list[Any] = [written(f"source{n}.jsonl", own) for n, own in enumerate(sources)]
        if options:
            paths = [{"path": path, **own} for path, own in zip(paths, options, strict=True)]
        for name in ("val_sources", "ptx_sources"):
            if name in given:
                given[name] = [written(f"{name}.jsonl", given[name])]
        defaults = {"val_fraction": 0.0, "test_fraction": 0.0}
        return kind(
            tokenizer=tokenizer,
            sources=paths,
            cache_dir=str(tmp_path / "cache"),
            **{**defaults, **given},
        )

    return build


def questions(count: int, prefix: str = "question ") -> list[dict[str, Any]]:
    return [{"prompt": f"{prefix}{n}"} for n in range(count)]


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def all_training(data: Any) -> list[Prompt]:
    data.setup("fit")
    return [part[i] for part in data.train_parts for i in range(len(part))]


def rank(data: Any, number: int, world_size: int) -> Any:
    """As it is on one of several ranks."""
    data.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"rank": number, "num_replicas": world_size},
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=False),
        state=SimpleNamespace(fn="fit"),
    )
    return data


# ----- tokens ---------------------------------------------------------------------------------


def test_prompts_end_with_the_generation_prompt_of_the_template(make: Any) -> None:
    told = [{"role": "system", "content": "S"}, {"role": "user", "content": "A"},
            {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]  # fmt: skip
    data = make([{"prompt": told, "answer": "D"}, {"prompt": "Why?"}])
    first, second = all_training(data)
    for prompt, messages in ((first, told), (second, [{"role": "user", "content": "Why?"}])):
        wanted = data.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert prompt.ids == getattr(wanted, "input_ids", wanted)
        assert data.tokenizer.decode(prompt.ids).endswith(OPENS)
        assert prompt.messages == messages
    assert (first.text, first.reference) == ("C", "D")
    assert (second.text, second.reference, second.answer_format) == ("Why?", None, None)


def test_the_tokens_are_those_before_the_answer_in_the_other_stages(make: Any) -> None:
    question, good, bad = "Why, é?", "So.", "No."
    asked = {"prompt": question, "chosen": good, "rejected": bad}
    for chat, form in ((True, "chat_preference"), (False, "preference")):
        data = make([asked], options=[{"format": form}])
        (prompt,) = all_training(data)
        preferences = make([asked], options=[{"format": form}], kind=PreferenceDataModule)
        item = preferences.samples(0, "train")[0]
        length = item["lengths"].tolist()[0]
        answer = (item["labels"][:length] != -100).nonzero().flatten().tolist()
        assert prompt.ids == item["input_ids"][: answer[0]].tolist()
        sample = {"prompt": question, "completion": good}
        form = "chat_prompt_completion" if chat else "prompt_completion"
        own = {"kind": InstructionDataModule, "packing": False, "options": [{"format": form}]}
        item = make([sample], **own).train_parts[0][0]
        begin = int((item["labels"] != -100).nonzero()[0])
        assert prompt.ids == item["input_ids"][:begin].tolist()
        (same,) = all_training(make([sample], options=[{"format": form}]))
        assert (same.ids, same.text, same.reference) == (prompt.ids, question, good)
        assert (same.messages is None) == (not chat)


def test_the_beginning_of_a_long_prompt_is_cut_and_counted(make: Any, tmp_path: Path) -> None:
    data = make([{"prompt": "a" * 50 + "end"}, {"prompt": "short"}], prompt_len=40)
    long, short = all_training(data)
    assert len(long.ids) == 40
    assert data.tokenizer.decode(long.ids) == "a" * 24 + "end" + "<|im_end|>\n" + OPENS
    assert (long.text, len(short.ids) < 40) == ("a" * 50 + "end", True)
    (counts,) = data.cache.counts
    assert (counts.read, counts.prompt_cut) == (2, 1)
    assert "1 lost their beginning" in data.corpus_report()["sources"]["source0"]["read"]
    (warning,) = counts.warnings()
    assert warning.startswith("1 of 2 prompts lost their beginning; raise data.prompt_len")


def test_bos_stays_where_a_prompt_is_cut(make: Any, tmp_path: Path) -> None:
    template = tmp_path / "bos.jinja"
    template.write_text("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    data = make(
        [{"prompt": "abcdef"}, {"prompt": "xyz"}], prompt_len=4, chat_template=str(template)
    )
    data.tokenizer.bos_token = "<|im_start|>"
    cut, whole = all_training(data)
    assert data.tokenizer.decode(cut.ids) == "<|im_start|>def"
    assert data.tokenizer.decode(whole.ids) == "<|im_start|>xyz"


def test_what_is_left_out_is_counted(make: Any) -> None:
    records = [
        {"prompt": "Why?"},
        {"prompt": "Why?", "answer": "So."},  # repeated
        {"prompt": " \n"},
        {"messages": [{"role": "assistant", "content": "Hello"}]},
        {"prompt": "b" * 60},
        {"prompt": "aaa" + "b" * 60},  # the same once it is cut
        {"prompt": "What is <|im_end|>?", "answer": "An end."},
    ]
    records[3]["prompt"] = [records[3].pop("messages")[0]]
    data = make(records, prompt_len=30)
    (counts,) = data.cache.counts
    assert (counts.read, counts.duplicates, counts.unasked) == (7, 2, 2)
    assert (counts.control_text, counts.prompt_cut) == (1, 1)
    assert texts(all_training(data)) == ["Why?", "b" * 60, "What is <|im_end|>?"]
    assert counts.splits["train"] == {
        "samples": 3,
        "tokens": (19 + 4) + 30 + (19 + 8 + 1 + 1),
        "references": 1,
    }
    assert counts.split_line("train") == "3 prompts, 82 tokens, 1 with a reference answer"
    assert str(counts) == (
        "7 prompts read, 2 repeated left out, 2 without a question left out, 1 lost their "
        "beginning, 1 hold the text of a special token"
    )


def test_plain_questions_and_white_space_at_the_end_are_told(make: Any) -> None:
    data = make(
        [{"prompt": "Q: ", "completion": "A"}],
        [{"prompt": "The film "}, {"prompt": "It is"}],
        options=[{}, {"format": "plain_prompt"}],
    )
    asked, continued = data.cache.counts
    assert (asked.plain, asked.spaced, continued.plain, continued.spaced) == (1, 1, 0, 1)
    assert "set format: prompt" in next(asked.warnings())
    prompts = all_training(data)
    assert [data.tokenizer.decode(prompt.ids) for prompt in prompts] == texts(prompts)
    assert texts(prompts) == ["Q: ", "The film ", "It is"]
    assert [prompt.source for prompt in prompts] == [0, 1, 1]


def test_tokens_are_taken_as_they_are(make: Any) -> None:
    data = make([{"input_ids": [70, 71, 72], "labels": [-100, -100, 72]}])
    (prompt,) = all_training(data)
    assert (prompt.ids, prompt.text) == ([70, 71], data.tokenizer.decode([70, 71]))


# ----- the order ------------------------------------------------------------------------------


def test_prompts_come_in_one_order_however_they_are_asked_for(make: Any) -> None:
    sources = questions(13), questions(7, "other ")
    whole = make(*sources).take_prompts(50)
    data = make(*sources)
    parts = [data.take_prompts(count) for count in (3, 7, 0, 25, 15)]
    assert [len(part) for part in parts] == [3, 7, 0, 25, 15]
    assert list(itertools.chain(*parts)) == whole
    # Each once in an epoch of 20, in another order each time.
    epochs = [texts(whole[:20]), texts(whole[20:40])]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert texts(make(*sources, seed=1).take_prompts(20)) != epochs[0]
    assert [rank(make(*sources), number, 2).take_prompts(50) for number in (0, 1)] == [whole] * 2
    assert data.samples_seen() == [Counter(p.source for p in whole)[k] for k in (0, 1)]


def test_weights_are_shares(make: Any) -> None:
    data = make(questions(10), questions(10, "b"), options=[{"weight": 3}, {"weight": 1}])
    assert Counter(prompt.source for prompt in data.take_prompts(40)) == {0: 30, 1: 10}


def test_resume_goes_on_and_refuses_other_data(make: Any) -> None:
    first = make(questions(20))
    first.take_prompts(7)
    state = json.loads(json.dumps(first.state_dict()))
    wanted = first.take_prompts(9)
    second = make(questions(20), val_prompts=3, val_batch_size=5)
    second.load_state_dict(state)
    assert second.take_prompts(9) == wanted
    for other in (make(questions(21)), make(questions(20), prompt_len=99)):
        with pytest.raises(UserError, match="trained with another data"):
            other.load_state_dict(state)
    with pytest.raises(UserError, match="trained with another seed"):
        make(questions(20), seed=3).load_state_dict(state)
    with pytest.raises(UserError, match="trained with another ptx"):
        make(questions(20), ptx_sources=TEXTS).load_state_dict(state)
    evaluated = rank(make(questions(21)), 0, 1)
    evaluated.trainer.state.fn = "test"
    evaluated.load_state_dict(state)


def test_the_first_batch_moves_nothing(make: Any) -> None:
    data = make([{"prompt": "q" * n} for n in range(1, 13)])
    data.take_prompts(5)
    batch = data.first_batch()
    prompts = data.take_prompts(8)
    assert data.first_batch()["source"].shape == (8,)
    width = max(len(prompt.ids) for prompt in prompts)
    assert batch.keys() == {"input_ids", "attention_mask", "source"}
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (8, width)
    for prompt, ids, mask in zip(prompts, batch["input_ids"], batch["attention_mask"], strict=True):
        padding = width - len(prompt.ids)
        assert mask.tolist() == [0] * padding + [1] * len(prompt.ids)
        assert ids.tolist() == [data.pad_token_id] * padding + prompt.ids


# ----- held out -------------------------------------------------------------------------------


def test_what_other_stages_hold_out_is_held_out(make: Any) -> None:
    asked = [f"Question {n}?" for n in range(300)]
    fractions = {"val_fraction": 0.1, "test_fraction": 0.2}
    data = make([{"question": text} for text in asked], **fractions)
    tuned = make(
        [{"instruction": text, "output": "So."} for text in asked],
        kind=InstructionDataModule,
        **fractions,
    )
    compared = make(
        [{"prompt": text.upper(), "chosen": "So.", "rejected": "No."} for text in asked],
        options=[{"format": "chat_preference"}],
        kind=PreferenceDataModule,
        **fractions,
    )
    seen = set(texts(all_training(data)))
    for split in ("validation", "test"):
        tables = [stage.cache.table(0, split) for stage in (tuned, compared)]
        tuning, comparing = (
            {table.about(i)["messages"][-1]["content"].lower() for i in range(len(table))}
            for table in tables
        )
        part = data.samples(0, split)
        own = {part[i].text for i in range(len(part))}
        assert {text.lower() for text in own} == tuning == comparing
        assert 15 < len(own) < 90
        assert not own & seen
        seen |= own
    assert len(seen) == 300


def test_conversations_with_one_first_question_stay_together(make: Any) -> None:
    def told(n: int, then: str) -> dict[str, Any]:
        said = [("user", f"first {n}"), ("assistant", "a"), ("user", then), ("assistant", "b")]
        return {"messages": [{"role": role, "content": text} for role, text in said]}

    data = make(
        [told(n % 40, f"then {n}") for n in range(200)], val_fraction=0.2, test_fraction=0.2
    )
    firsts = {}
    for split in ("train", "validation", "test"):
        part = data.samples(0, split)
        firsts[split] = {part[i].messages[0]["content"] for i in range(len(part))}
        assert len(part) == 5 * len(firsts[split]) > 0
    assert sum(map(len, firsts.values())) == len(set().union(*firsts.values())) == 40


def test_held_out_prompts_are_the_same_few(make: Any) -> None:
    settings = {"val_fraction": 0.4, "test_fraction": 0.4}
    sources = questions(60), questions(20, "other ")
    data = make(*sources, **settings, val_prompts=6, test_prompts=1000)
    few, all_ = data.held_out_prompts("validation"), data.held_out_prompts("test")
    assert len(few) == 6
    assert len(all_) == len(set(texts(all_))) == sum(len(data.samples(k, "test")) for k in (0, 1))
    # From all over: both sources, and no run of the file.
    assert {prompt.source for prompt in few} == {0, 1}
    more = make(*sources, **settings, val_prompts=20, seed=9).held_out_prompts("validation")
    assert more[:6] == few
    assert data.held_out_prompts("validation") == few
    data.take_prompts(3)
    assert make(*sources, **settings).held_out_prompts("validation")[:6] == few


def test_sources_held_out_as_a_whole(make: Any) -> None:
    data = make(questions(5), val_sources=[{"prompt": "Question  3", "answer": "x"}], val_prompts=9)
    data.setup("fit")
    assert texts(data.held_out_prompts("validation")) == ["Question  3"]
    assert data.held_out_prompts("validation")[0].source == 1
    assert sorted(texts(all_training(data))) == [f"question {n}" for n in (0, 1, 2, 4)]
    assert data.cache.counts[0].held_out == 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_loaders_hold_each_held_out_prompt_once(make: Any, world_size: int, size: int) -> None:
    settings = {"val_fraction": 0.3, "test_fraction": 0.3, "val_prompts": 11, "test_prompts": 8}
    for split, wanted in (("val", 11), ("test", 8)):
        places, batches = [], []
        for number in range(world_size):
            data = rank(make(questions(90), **settings, val_batch_size=size), number, world_size)
            loader = getattr(data, f"{split}_dataloader")()
            batches.append(list(loader))
            for batch in batches[-1]:
                assert batch.keys() == {"place", "labels"}
                assert batch["labels"].shape == (len(batch["place"]), 1)
                assert len(batch["place"]) <= size
                real = batch["labels"][:, 0] != -100
                assert batch["labels"][real].eq(0).all()
                places += batch["place"][real].tolist()
        assert sorted(places) == list(range(wanted))
        # As many batches on every rank, or a collective waits for ever.
        assert len({len(own) for own in batches}) == 1


def test_nothing_is_held_out_where_nothing_is_wanted(make: Any) -> None:
    none = make(questions(9))
    few = make(questions(40), val_fraction=0.4, test_fraction=0.4, val_prompts=0, test_prompts=0)
    for data in (none, few):
        data.setup(None)
        assert data.held_out_prompts("validation") == data.held_out_prompts("test") == []
        assert data.val_dataloader() == data.test_dataloader() == []
    empty = make(questions(3), val_fraction=0.01, test_fraction=0.0)
    with pytest.raises(UserError, match="no prompt fell into the validation split"):
        empty.setup("fit")
    make(questions(3), val_fraction=0.01, val_prompts=0).setup("fit")


def test_questions_of_the_ground_still_work(make: Any) -> None:
    records = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(30)] + questions(30)
    data = make(records, val_fraction=0.5)
    found = data.heldout_questions("validation", 4)
    assert [(own.prompt[0], own.reference) for own in found] == [
        ("q", f"a{own.prompt[1:]}") for own in found
    ]
    assert len(found) == 4


# ----- training batches and texts --------------------------------------------------------------


def test_only_a_stage_that_answers_prompts_has_training_batches(make: Any) -> None:
    data = make(questions(3))
    with pytest.raises(UserError, match=r"only PPO trains on them \(recipes/ppo\.py\)"):
        data.train_dataloader()
    batches: list[dict[str, Any]] = [{}]
    data.experience_loader = lambda: batches
    assert data.train_dataloader() is batches


TEXTS = [{"text": f"{n}: " + "some words to fill blocks " * 3} for n in range(40)]


def test_texts_are_a_function_of_the_position(make: Any) -> None:
    data = make(questions(3), ptx_sources=TEXTS, ptx_seq_len=32)
    assert [source.label for source in data.ptx_sources] == ["ptx_sources"]
    assert make(questions(3)).ptx_sources == []
    data.setup("fit")
    size = sum(map(len, data.ptx.train_parts))
    assert 20 < size < 200
    whole = data.ptx_batch(0, 2 * size)
    assert whole.keys() == {"input_ids", "labels"}
    assert whole["input_ids"].shape == whole["labels"].shape == (2 * size, 32)
    assert whole["input_ids"].equal(whole["labels"])
    data.take_prompts(2)
    for position, rows in ((size - 3, 7), (0, 1), (2 * size - 1, 1)):
        part = data.ptx_batch(position, rows)
        assert part["input_ids"].equal(whole["input_ids"][position : position + rows])
        assert part["labels"].equal(whole["labels"][position : position + rows])
    # Beyond the last block it begins anew: each block once a round.
    rounds = [Counter(map(tuple, own.tolist())) for own in whole["input_ids"].split(size)]
    assert rounds[0] == rounds[1]


def test_texts_are_those_of_pre_training_without_what_it_holds_out(make: Any) -> None:
    data = make(questions(3), ptx_sources=TEXTS, ptx_seq_len=32)
    trained = TextDataModule(
        tokenizer=data.tokenizer_path,
        sources=data.ptx.settings.sources,
        seq_len=32,
        cache_dir=data.cache_dir,
    )
    blocks = trained.train_parts[0]
    wanted = {tuple(blocks[i]["input_ids"].tolist()) for i in range(len(blocks))}
    found = data.ptx_batch(0, len(blocks))["input_ids"]
    assert set(map(tuple, found.tolist())) == wanted
    assert list(trained.heldout_texts("validation"))
    assert data.corpus_report()["ptx"]["sources"]
    assert "ptx" not in make(questions(3)).corpus_report()


def test_mistakes_in_texts(make: Any) -> None:
    with pytest.raises(UserError, match=r"no texts to read.*--data\.ptx_sources"):
        make(questions(3)).ptx_batch(0, 1)
    short = make(questions(3), ptx_sources=[{"text": "a"}, {"text": "b"}], ptx_seq_len=500)
    with pytest.raises(UserError, match="ptx_sources: source ptx_sources: its .* do not fill one"):
        short.setup("fit")
    short.setup("test")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_len": 1}, "prompt_len is 1, it must be at least 2"),
        ({"val_prompts": -1}, "val_prompts is -1, it must be at least 0"),
        ({"test_prompts": -1}, "test_prompts is -1, it must be at least 0"),
        ({"val_batch_size": 0}, "val_batch_size is 0, it must be at least 1"),
        ({"first_words": -1}, "first_words is -1, it must be at least 0"),
        ({"ptx_seq_len": 1}, "ptx_seq_len is 1, it must be at least 2"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "must leave something for training"),
    ],
)
def test_values_that_make_no_sense(make: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(questions(3), **settings)


def test_a_source_without_questions_is_refused(make: Any) -> None:
    with pytest.raises(UserError, match="source source0: not one of 2 records asks for anything"):
        make([{"prompt": " "}, {"prompt": "\n"}]).setup("fit")
    with pytest.raises(UserError, match="nothing of 1 prompts is left for training"):
        make([{"prompt": "q1"}], val_sources=[{"prompt": "q1"}]).setup("fit")


def test_first_words_change_the_cache(make: Any) -> None:
    records = [{"text": f"one two three {n}"} for n in range(9)] + [{"text": "four five"}]
    data = make(records, first_words=2)
    assert sorted(texts(all_training(data))) == ["four five", "one two"]
    assert data.cache.counts[0].duplicates == 8
    assert len(all_training(make(records, first_words=4))) == 10


def test_what_is_told_in_the_log(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    data = make([{"question": "q", "answer": "a"}], ptx_sources=TEXTS)
    with caplog.at_level("INFO"):
        data.prepare_data()
        data.prepare_data()
    told = [record.getMessage() for record in caplog.records]
    assert told.count("  source0: 1 prompts read") == 1
    assert "  source0, train: 1 prompts, 20 tokens, 1 with a reference answer" in told
    assert any(line.startswith("Corpus: ptx_sources") for line in told)
    assert torch.is_tensor(data.first_batch()["input_ids"])


def test_a_single_source_of_texts_on_the_command_line() -> None:
    assert listed_sources(["--data.ptx_sources", "a.txt"]) == [
        "--data.ptx_sources=[]",
        '--data.ptx_sources=["a.txt"]',
    ]
