"""Preferences to rows: ids by hand, prompts that are cut alike, pairs that are left out, splits."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lit_llm.data.chat_template import TokenizedChat, stop_token_ids
from lit_llm.data.preference_cache import PreferenceSettings, open_preferences
from lit_llm.data.preference_tokens import fit_answers, tokenize_answer
from lit_llm.data.preferences import Preference
from lit_llm.data.records import RecordSource
from lit_llm.errors import UserError

# A token a word: 0 unknown, 1 begins, 2 ends, 3 pads, 4 and 5 open turns, 6 follows a turn.
WORDS = "<unk> <s> </s> <pad> U A N".split() + list("abcdefghijklmnopqrstuvwxyz")
IDS = {word: number for number, word in enumerate(WORDS)}
TEMPLATE = (
    "{{ bos_token }} {% for m in messages %}{% if m['role'] == 'assistant' %}A "
    "{% generation %}{{ m['content'] + ' ' + eos_token }}{% endgeneration %} N "
    "{% else %}U {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A {% endif %}"
)
NEVER = {"val_fraction": 0.0, "test_fraction": 0.0}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel(IDS, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
    )


@pytest.fixture
def build(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    def opened(
        *sources: list[dict[str, Any]],
        val: list[dict[str, Any]] | None = None,
        ood: list[dict[str, Any]] | None = None,
        **settings: Any,
    ) -> Any:
        def written(name: str, records: list[dict[str, Any]]) -> RecordSource:
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
            return RecordSource(str(path))

        return open_preferences(
            tmp_path / "cache",
            PreferenceSettings(
                sources=[written(f"source{n}", records) for n, records in enumerate(sources)],
                val_sources=[written("val", val)] if val else [],
                ood_sources=[written("ood", ood)] if ood else [],
                **{"seq_len": 32, **NEVER, **settings},
            ),
            tokenizer,
            stop_token_ids(tokenizer),
        )

    return opened


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def compare(question: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {
        "prompt": [user(question)],
        "chosen": [said(chosen)],
        "rejected": [said(rejected)],
        **more,
    }


def ranked(question: str, *answers: str, **more: Any) -> dict[str, Any]:
    """The best answer first, all of them messages."""
    return {"prompt": [user(question)], "answers": [[said(text)] for text in answers], **more}


def ids(words: str) -> list[int]:
    return [IDS[word] for word in words.split()]


def rows(cache: Any, source: int = 0, split: str = "train") -> list[tuple[list[str], dict]]:
    """Each row as its sequences in words, what is trained on in brackets, and what is beside."""
    table, found = cache.table(source, split), []
    for index in range(len(table)):
        item, about = table[index], table.about(index)
        sequences, start = [], 0
        for length in about["lengths"]:
            words = [
                WORDS[i] if label == -100 else f"[{WORDS[i]}]"
                for i, label in zip(
                    item["input_ids"][start : start + length].tolist(),
                    item["labels"][start : start + length].tolist(),
                    strict=True,
                )
            ]
            sequences.append(" ".join(words))
            start += length
        assert start == len(item["input_ids"])
        found.append((sequences, about))
    return found


# ----- tokens ---------------------------------------------------------------------------------


def test_ids_of_a_chat_by_hand(build: Any) -> None:
    prompt = [user("q"), said("b"), user("r")]
    cache = build([{"prompt": prompt, "chosen": [said("c d")], "rejected": [said("e")]}])
    item = cache.table(0, "train")[0]
    before = [1, 4, 23, 5, 8, 2, 6, 4, 24, 5]  # <s> U q A b </s> N U r A
    assert item["input_ids"].tolist() == [*before, 9, 10, 2, *before, 11, 2]
    ignored = [-100] * len(before)
    assert item["labels"].tolist() == [*ignored, 9, 10, 2, *ignored, 11, 2]
    about = cache.table(0, "train").about(0)
    assert about.pop("group") >= 0
    assert about == {"lengths": [13, 12], "pairs": [[0, 1]]}
    assert cache.counts[0].splits["train"] == {"samples": 1, "tokens": 25, "pairs": 1}


def test_plain_texts_take_no_template_and_end_with_eos(build: Any) -> None:
    ((sequences, about),) = rows(build([{"prompt": "q r", "chosen": " a", "rejected": " b c"}]))
    assert sequences == ["<s> q r [a] [</s>]", "<s> q r [b] [c] [</s>]"]
    assert about["pairs"] == [[0, 1]]


def test_an_empty_prompt_leaves_the_answers(build: Any) -> None:
    ((sequences, _),) = rows(build([{"prompt": "", "chosen": "a", "rejected": "b"}]))
    assert sequences == ["<s> [a] [</s>]", "<s> [b] [</s>]"]


def test_an_answer_of_several_turns_is_trained_on_in_all_its_own(build: Any) -> None:
    record = {
        "prompt": [user("q"), said("x"), user("r")],
        "chosen": [said("c"), user("d"), said("e")],
        "rejected": [said("f")],
    }
    ((sequences, _),) = rows(build([record]))
    assert sequences == [
        "<s> U q A x </s> N U r A [c] [</s>] N U d A [e] [</s>]",
        "<s> U q A x </s> N U r A [f] [</s>]",
    ]


def test_weights_of_the_data_do_not_mix_prompt_and_answer_up(tokenizer: Any) -> None:
    preference = Preference(
        prompt=[user("q"), {**said("x"), "weight": 1}, user("r")],
        answers=([{**said("a"), "weight": 0}],),
        pairs=(),
        margins=None,
        origin="here",
        group="q",
    )
    chat = tokenize_answer(tokenizer, preference, 0, {2})
    assert chat == TokenizedChat(ids("<s> U q A x </s> N U r A a </s>"), [(10, 12)], [True])


@pytest.mark.parametrize(
    ("marked", "expected"),
    [
        ("'</s>' + ' N'", "<s> U q A a </s> N"),  # something is said after the end
        ("'</s>' + '\n'", "<s> U q A a </s>"),
        ("''", "<s> U q A a"),
    ],
)
def test_what_a_template_marks_after_the_end(tokenizer: Any, marked: str, expected: str) -> None:
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    own.chat_template = (
        "<s> {% for m in messages %}{% if m['role'] == 'assistant' %}A {% generation %}"
        "{{ m['content'] + ' ' + " + marked + " }}{% endgeneration %}"
        "{% else %}U {{ m['content'] }} {% endif %}{% endfor %}"
    )
    preference = Preference([user("q")], ([said("a")],), (), None, "here", "q")
    chat = tokenize_answer(own, preference, 0, {2})
    assert chat is not None
    assert chat.input_ids == ids(expected)


def test_answers_without_an_end_are_counted(build: Any, tokenizer: Any) -> None:
    ends = tokenizer.chat_template
    try:
        tokenizer.chat_template = ends.replace(" + ' ' + eos_token", "")
        counts = build([compare("q", "a", "b"), compare("r", "a", "b")]).counts[0]
    finally:
        tokenizer.chat_template = ends
    assert counts.unended == 2
    assert build([compare("q", "a", "b")]).counts[0].unended == 0
    assert "2 have an answer that does not end with a stop token" in str(counts)


# ----- length ---------------------------------------------------------------------------------


def test_all_answers_of_a_prompt_lose_the_same_tokens_of_it(build: Any) -> None:
    cache = build([ranked("q r s t", "c", "a b", "d"), ranked("u", "a", "b")], seq_len=8)
    whole, cut = rows(cache)[::-1]
    # <s> U q r s t A a b </s> is two tokens too long.
    assert cut[0] == [
        "<s> r s t A [c] [</s>]",
        "<s> r s t A [a] [b] [</s>]",
        "<s> r s t A [d] [</s>]",
    ]
    assert whole[0][0] == "<s> U u A [a] [</s>]"
    assert cache.counts[0].prompt_cut == 1
    assert "1 lost the beginning of their prompt" in str(cache.counts[0])


def test_one_token_of_the_prompt_is_left_beside_bos(build: Any) -> None:
    # 8 tokens are <s>, one of the prompt, five of the answer and </s>.
    fits = compare("q r", "a b c d e", "x")
    longer = compare("s t", "a b c d e f", "x")
    cache = build([fits, longer], seq_len=8)
    assert [sequences for sequences, _ in rows(cache)] == [
        ["<s> A [a] [b] [c] [d] [e] [</s>]", "<s> A [x] [</s>]"]
    ]
    counts = cache.counts[0]
    assert (counts.too_long, counts.unfit, counts.prompt_cut) == (1, 1, 1)


def test_pairs_of_an_answer_that_does_not_fit_are_left_out(build: Any) -> None:
    record = ranked("q r s", "a", "b b b b b b b", "c", "d", scores=[4, 3, 2, 1])
    record["kind"] = "k"
    cache = build([record], seq_len=8)
    ((sequences, about),) = rows(cache)
    # The short ones need no cut: what is left out costs the prompt nothing.
    assert sequences == [f"<s> U q r s A [{word}] [</s>]" for word in "acd"]
    assert about["pairs"] == [[0, 1], [0, 2], [1, 2]]
    assert "margins" not in about  # scores are on a scale of their own
    assert about["kinds"] == ["k"] * 3
    counts = cache.counts[0]
    assert (counts.pairs, counts.unfit, counts.too_long, counts.prompt_cut) == (6, 3, 0, 0)


def test_answers_that_share_a_token_with_their_prompt() -> None:
    # The prompts are 5, 4 and 1 tokens, the sequences 9, 8 and 7.
    turns = {0: (5, 9), 1: (4, 8), 2: (1, 7)}
    chats = {k: TokenizedChat(list(range(10, 10 + b)), [(a, b)], [True]) for k, (a, b) in
             turns.items()}  # fmt: skip
    fitted, cut = fit_answers(chats, [(0, 1)], 6)
    assert cut == 3
    assert fitted[0] == TokenizedChat([13, 14, 15, 16, 17, 18], [(2, 6)], [True])
    assert fitted[1] == TokenizedChat([13, 14, 15, 16, 17], [(1, 5)], [True])
    # Of the third no prompt would be left, though it is 7 tokens alone.
    fitted, cut = fit_answers(chats, [(0, 1), (0, 2), (1, 2)], 7)
    assert (sorted(fitted), cut) == ([0, 1], 2)
    # Without the longest one nothing is cut at all.
    fitted, cut = fit_answers(chats, [(1, 2)], 8)
    assert (sorted(fitted), cut) == ([1, 2], 0)
    assert fit_answers(chats, [(0, 2)], 7) == ({}, 0)


def test_bos_is_kept_where_the_prompts_are_cut() -> None:
    chat = TokenizedChat([1, 10, 11, 12, 13, 14], [(4, 6)], [True])
    fitted, cut = fit_answers({0: chat, 1: chat}, [(0, 1)], 5, bos_token_id=1)
    assert fitted[0] == TokenizedChat([1, 11, 12, 13, 14], [(3, 5)], [True])
    assert cut == 1
    assert fit_answers({0: chat, 1: chat}, [(0, 1)], 3, bos_token_id=1)[0] == {}
    assert fit_answers({0: chat, 1: chat}, [(0, 1)], 3)[0][0].input_ids == [12, 13, 14]


# ----- what is left out -----------------------------------------------------------------------


def test_every_pair_is_kept_or_counted(build: Any) -> None:
    records = [
        ranked("a", "x", "y"),
        ranked("a", "x", "y"),  # 1 duplicate
        ranked("a", "y", "x"),  # 1 contradiction
        ranked("a", " x\n", "y "),  # 1 repeated but for white space
        ranked("b", "x", " x "),  # 1 identical
        ranked("b", "x", "  "),  # 1 empty
        ranked("c", "x", "y", "x", "z"),  # of 6: 1 identical, 2 repeated, 1 contradiction
        {"prompt": [user("d")], "answers": [[said("x")]]},  # nothing to compare
        ranked("e", "w w w w w w w w", "x"),  # too long
    ]
    cache = build(records, seq_len=9)
    counts = cache.counts[0]
    assert (counts.read, counts.duplicates, counts.unusable, counts.held_out) == (9, 1, 1, 0)
    assert (counts.empty, counts.identical, counts.unfit) == (1, 2, 1)
    # x > y, (x = x), x > z, y > x contradicts, y > z, x > z again
    assert (counts.contradictory, counts.repeated) == (2, 2)
    kept = counts.splits["train"]["pairs"]
    left_out = (
        counts.empty + counts.identical + counts.unfit + counts.contradictory + counts.repeated
    )
    assert kept == 4
    assert counts.pairs == kept + left_out == 12
    sequences, about = rows(cache)[1]
    assert sequences == [f"<s> U c A [{word}] [</s>]" for word in "xyz"]
    assert about["pairs"] == [[0, 1], [0, 2], [1, 2]]
    line = str(counts)
    assert line.startswith("9 prompts read, with 12 pairs, 1 repeated left out")
    for part in ("2 pairs of equal answers", "1 pairs with an empty answer", "2 repeated pairs"):
        assert f"{part} left out" in line
    assert counts.split_line("train") == "2 prompts, 4 pairs, 30 tokens"


def test_equal_answers_to_other_prompts_are_no_repetition(build: Any) -> None:
    counts = build([compare("a", "x", "y"), compare("b", "y", "x")]).counts[0]
    assert (counts.contradictory, counts.repeated, counts.splits["train"]["pairs"]) == (0, 0, 2)


def test_calling_a_tool_says_something(build: Any) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    record = {"prompt": [user("q")], "chosen": [call], "rejected": [said("x")]}
    with pytest.raises(UserError, match="calls tools, which the chat template leaves out"):
        build([record])
    silent = {**record, "chosen": [said("")]}
    assert build([silent, compare("q", "a", "b")]).counts[0].empty == 1


def test_a_column_given_twice_is_said(build: Any) -> None:
    counts = build([compare(word, "a", "a") for word in "xyz"]).counts[0]
    assert "equal in all 3 pairs; the same column was given twice?" in counts.why_empty(32)
    counts = build([compare(word, "a", "") for word in "xyz"]).counts[0]
    assert "an answer is empty in all 3 pairs" in counts.why_empty(32)


def test_answers_that_are_all_too_long_are_said(build: Any) -> None:
    counts = build([compare(word, "a a a a a", "b") for word in "xyz"], seq_len=6).counts[0]
    assert "all 3 pairs are too long: one answer alone fills more than seq_len 6" in (
        counts.why_empty(6)
    )


def test_swapped_columns_are_noticed(build: Any) -> None:
    first = [compare(f"{a} {b}", "x", "y") for a in "abcde" for b in "abcde"]
    swapped = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in first]
    new = [compare(f"{a} {b} c", "x", "y") for a in "abcdefghijklmnop" for b in "abcdefghijklm"]
    cache = build(first, swapped[:9])
    assert (cache.counts[1].contradictory, cache.counts[1].looks_swapped) == (9, False)
    assert "chosen and rejected may be swapped in one of" in cache.counts[1].why_empty(32)
    cache = build(first, swapped[:10])
    assert [counts.looks_swapped for counts in cache.counts] == [False, True]
    # What others never judged says nothing about it.
    assert build(first, [*swapped[:10], *new]).counts[1].looks_swapped


def test_people_who_disagree_are_warned_of_only(build: Any) -> None:
    first = [compare(f"{a} {b}", "x", "y") for a in "abcde" for b in "abcde"]
    other = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in first]
    # Confirmed as they are, or but for white space.
    spaced = [{**r, "chosen": [said("x ")]} for r in first]
    for same, name in ((first, "duplicates"), (spaced, "repeated")):
        counts = build(first, [*same[:11], *other[11:22]]).counts[1]
        assert (getattr(counts, name), counts.contradictory, counts.looks_swapped) == (
            11,
            11,
            False,
        )
        assert [warning[:50] for warning in counts.warnings()] == [
            "11 pairs are left out that came before the other w"
        ]
        assert build(first, [*same[:10], *other[11:22]]).counts[1].looks_swapped


def test_plain_texts_and_empty_prompts_are_warned_of(build: Any) -> None:
    texts = [{"prompt": word, "chosen": "a", "rejected": "b"} for word in ("q", "r", "")]
    counts = build([*texts, {"prompt": "s", "chosen": "a", "rejected": "a"}]).counts[0]
    assert list(counts.warnings()) == [
        "3 prompts are plain text and go without the chat template; for a chat model set format: "
        "chat_preference (answers in a list: rename: {prompt: instruction})",
        "1 prompts are empty; if the question stands in another field, rename it to prompt",
    ]
    assert str(counts).endswith(", 3 prompts are plain text")
    assert list(build([compare("q", "a", "b")]).counts[0].warnings()) == []


def test_margins_are_counted_and_negative_ones_warned_of(build: Any) -> None:
    margins = [2, -0.5, None, 0]
    records = [compare(word, "a", "b", margin=m) for word, m in zip("qrst", margins, strict=True)]
    cache = build([*records, compare("u", "a", "a", margin=-3)])
    assert [about.get("margins") for _, about in rows(cache)] == [[2], [-0.5], None, [0]]
    assert str(cache.counts[0]).endswith(", 3 pairs have a margin")
    assert list(cache.counts[0].warnings()) == [
        "1 of 3 margins are negative, as if the rejected answer were the better one; look at the "
        "data"
    ]


def test_many_pairs_that_are_too_long_are_warned_of(build: Any) -> None:
    short = [compare(f"{a} {b}", "x", "y") for a in "abc" for b in "abc"]
    long = [compare(word, "w w w w w w w", "x") for word in "qr"]
    assert list(build([*short, *long], seq_len=8).counts[0].warnings()) == [
        "2 of 11 pairs are left out, for an answer is longer than seq_len; raise data.seq_len"
    ]
    assert list(build([*short, long[0]], seq_len=8).counts[0].warnings()) == []


def test_text_that_looks_like_a_token_is_counted_and_warned_of(build: Any) -> None:
    counts = build([compare("q </s>", "a", "b"), compare("r", "a", "b </s> c")]).counts[0]
    assert counts.control_text == 2
    assert [warning[:30] for warning in counts.warnings()] == ["2 samples hold the text of a s"]


def test_many_cut_prompts_are_warned_of(build: Any) -> None:
    short = [compare(f"{a} {b}", "x", "y") for a in "abc" for b in "abc"]
    long = compare("q q q q q", "x", "y")
    many = build([*short, long, {**long, "prompt": [user("r r r r r")]}], seq_len=8).counts[0]
    assert [warning[:36] for warning in many.warnings()] == ["2 of 11 prompts lost their beginning"]
    assert list(build([*short, long], seq_len=8).counts[0].warnings()) == []


# ----- splits ---------------------------------------------------------------------------------


def questions(cache: Any, source: int, split: str) -> set[str]:
    """The words between U and the first A."""
    found = rows(cache, source, split)
    return {sequences[0].split(" A ")[0].removeprefix("<s> U ") for sequences, _ in found}


MANY = [
    compare(f"{a} {b}", x, y)
    for a in "abcdefghij"
    for b in "abcdefghij"
    for x, y in ("uv", "wx", "yz")
]


def test_a_prompt_is_in_one_split_and_more_data_moves_none(build: Any) -> None:
    fractions = {"val_fraction": 0.2, "test_fraction": 0.2}
    few, all_ = build(MANY[:150], **fractions), build(MANY[::-1], **fractions)
    splits = {split: questions(all_, 0, split) for split in ("train", "validation", "test")}
    assert all(splits.values())
    assert sum(map(len, splits.values())) == len(set().union(*splits.values())) == 100
    for split, own in splits.items():
        assert questions(few, 0, split) <= own
        assert len(rows(all_, 0, split)) == 3 * len(own)


def test_what_is_validated_with_is_not_trained_on(build: Any) -> None:
    val = [compare("a", "x", "y"), compare("b", "x", "y")]
    cache = build(
        [compare("A ", "u", "v"), compare("a", "x", "y"), compare("c", "x", "y")], val=val
    )
    assert questions(cache, 0, "train") == {"c"}
    assert (cache.counts[0].held_out, cache.counts[0].duplicates) == (1, 1)
    assert questions(cache, 1, "validation") == {"a", "b"}


def test_the_second_test_yields_to_training_and_validation(build: Any) -> None:
    ood = [compare(f"{a} {b}", "p", "q") for a in "abcdefghijklm" for b in "abcdefghij"]
    cache = build(
        MANY, ood=ood, val=[compare("k a", "x", "y")], val_fraction=0.2, test_fraction=0.2
    )
    alone = build(MANY, val=[compare("k a", "x", "y")], val_fraction=0.2, test_fraction=0.2)
    for split in ("train", "validation", "test"):
        assert questions(cache, 0, split) == questions(alone, 0, split)
    tested = questions(cache, 2, "test")
    # The 30 that nobody has but the one of val_sources, and those that are tested anyway.
    foreign = {f"{a} {b}" for a in "klm" for b in "abcdefghij"} - {"k a"}
    assert tested == foreign | questions(cache, 0, "test")
    assert questions(cache, 2, "train") == questions(cache, 2, "validation") == set()
    assert cache.counts[2].held_out == 130 - len(tested)


def test_held_out_rows_can_be_asked_anew(build: Any) -> None:
    tools = [{"name": "f"}]
    record = ranked("q", "a", "b", "c", ranks=[3, 1, 2], tools=tools)
    cache = build(
        [compare("z", "a", "b")],
        val=[
            record,
            {"prompt": "r ", "answers": ["x", "y"]},
            {"prompt": "", "answers": ["x", "y"]},
        ],
    )
    chat, text, without = (about for _, about in rows(cache, 1, "validation"))
    # The answers stand in the order of their ranks: b, c, a.
    assert chat["pairs"] == [[0, 1], [0, 2], [1, 2]]
    assert chat["messages"] == [user("q")]
    assert (chat["reference"], chat["tools"], chat["answer_format"]) == ("b", tools, None)
    assert (text["prompt"], text["reference"]) == ("r ", "x")
    assert "reference" not in without
    assert "reference" not in rows(cache)[0][1]


def test_settings_that_change_the_rows_change_the_key(build: Any) -> None:
    records = [compare("a", "x", "y"), compare("b", "x", "y")]
    key = build(records).key
    assert build(records).key == key
    others = [
        build(records, seq_len=31),
        build(records, val_fraction=0.1),
        build(records[:1]),
        build(records, val=[compare("c", "x", "y")]),
        build(records, ood=[compare("c", "x", "y")]),
    ]
    assert len({key, *(cache.key for cache in others)}) == 6


def test_what_a_template_refuses_is_named_with_its_line(build: Any, tokenizer: Any) -> None:
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ raise_exception('no') if messages[0].content == 'b' }}" + (
            template
        )
        with pytest.raises(UserError, match=r"source0.jsonl:2: .*no"):
            build([compare("a", "x", "y"), compare("b", "x", "y")])
    finally:
        tokenizer.chat_template = template
