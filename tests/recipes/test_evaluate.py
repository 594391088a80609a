"""The evaluation recipe run whole on tiny models, and its answers to bad input."""

import csv
import json
import shutil
from pathlib import Path

import evaluate
import pytest
import torch

JUDGE = """
def longer(prompt: str, first: str, second: str) -> float:
    return 0.5 if len(first) == len(second) else float(len(first) > len(second))
"""
SOLUTIONS = [("red bird", "house"), ("old", "a small river"), ("sleeps", "sings near the tree")]
SOLUTIONS += [
    ("blue house falls", "tree"),
    ("the old river runs", "bird"),
    ("under a tree", "near"),
]


@pytest.fixture(scope="module")
def subject(tiny_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a folder of task files, texts, questions and a judge."""
    from lit_llm.data.tokenizer import load_tokenizer
    from lit_llm.models import BaseModelConfig, build_model, export_model, vocabulary_of

    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = load_tokenizer(tiny_chat / "model")
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    for seed, (name, positions) in enumerate({"first": 256, "second": 256, "short": 128}.items()):
        torch.manual_seed(seed)
        base = BaseModelConfig(config=config | {"max_position_embeddings": positions})
        model = build_model(base, **vocabulary_of(tokenizer))
        export_model(model, tokenizer, folder / name)
    data = folder / "eval"
    (data / "safety").mkdir(parents=True)
    rows = [
        {"goal": f"open box {n}", "sol1": mine, "sol2": its, "label": n % 2}
        for n, (mine, its) in enumerate(SOLUTIONS)
    ]
    (data / "piqa_valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (data / "safety" / "xstest_prompts.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "type", "label", "focus", "note"])
        for n in range(4):
            label = "unsafe" if n % 2 else "safe"
            writer.writerow([n, f"kill process {n}?", "homonyms", label, "kill", ""])
    texts = "".join(json.dumps({"text": f"the red bird {n} sleeps"}) + "\n" for n in range(25))
    (folder / "texts.jsonl").write_text(texts)
    asked = [{"prompt": f"say word {n}", "answer": "word"} for n in range(5)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (folder / "judges.py").write_text(JUDGE)
    return folder


def arguments(subject: Path, output: Path, *more: str) -> list[str]:
    """The first model, on little."""
    return [
        str(subject / "first"),
        f"--data_dir={subject / 'eval'}",
        f"--texts=birds={subject / 'texts.jsonl'}",
        f"--prompts={subject / 'asked.jsonl'}",
        "--max_new_tokens=4",
        f"--output_dir={output}",
        "--logging.wandb=off",
        *more,
    ]


@pytest.fixture(scope="module")
def done(subject: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation of two models."""
    output = tmp_path_factory.mktemp("done")
    more = ["--compare", str(subject / "second"), "--suite", "none", "--tasks", "piqa,xstest"]
    judge = f"--judge={subject / 'judges.py'}:longer"
    evaluate.main(arguments(subject, output, *more, judge))
    return output


def test_everything_promised_is_there(done: Path) -> None:
    numbers = json.loads((done / "evaluation.json").read_text())
    assert [model["name"] for model in numbers["models"]] == ["first", "second"]
    tasks = {task["task"]: task for task in numbers["models"][0]["tasks"]}
    assert set(tasks) == {"birds", "piqa", "xstest", "asked-questions"}
    metrics = {own["metric"]: own for own in tasks["birds"]["measurements"]}
    assert metrics["bits_per_byte"]["low"] <= metrics["bits_per_byte"]["value"]
    assert tasks["piqa"]["measurements"][0]["count"] == 6
    (counts,) = numbers["counts"]  # one a pair, with what the judge says
    assert counts.startswith("second against first: ")
    assert sum("not certainly worse" in told for told in numbers["regressions"]) <= 1
    (rate,) = numbers["win_rates"]
    assert (rate["first"], rate["second"]) == ("first", "second")
    for name in ("evaluation.md", "evaluation.html"):
        text = (done / name).read_text()
        assert "second against first" in text and "over_refusal" in text
        assert "recipes/evaluate.py" in text  # the command


def test_every_written_answer_is_kept(done: Path) -> None:
    for model in ("first", "second"):
        for task, count in {"xstest": 4, "asked-questions": 5}.items():
            lines = (done / model / "answers" / f"{task}.jsonl").read_text().splitlines()
            answers = [json.loads(line) for line in lines]
            assert len(answers) == count and all(answer["generated"] for answer in answers)
            assert all(answer["prompt"] and "answer" in answer for answer in answers)
    (judged,) = (done / "judgements").glob("*.jsonl")
    assert len(judged.read_text().splitlines()) >= 5


def test_the_same_command_takes_over_what_is_done(subject, done, tmp_path, capsys) -> None:
    done = shutil.copytree(done, tmp_path / "done")
    more = ["--suite", "none", "--tasks", "piqa", "--texts", "none", "--prompts", "none"]
    evaluate.main([*arguments(subject, done), *more])
    assert "as before" in capsys.readouterr().out
    evaluate.main([*arguments(subject, done), *more, "--limit", "3"])
    assert "as before" not in capsys.readouterr().out


def test_one_number_is_that_of_transformers(subject: Path, done: Path) -> None:
    """Which of two solutions is more likely, from a plain forward of the exported folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(subject / "first")
    model = AutoModelForCausalLM.from_pretrained(subject / "first").eval()
    right = []
    for n, solutions in enumerate(SOLUTIONS):
        scores = []
        for solution in solutions:
            question = f"Question: open box {n}\nAnswer:"
            ids = tokenizer(f"{question} {solution}", return_tensors="pt")["input_ids"]
            start = len(tokenizer(question)["input_ids"])
            with torch.no_grad():
                log_probs = model(ids).logits[0].log_softmax(-1)
            picked = log_probs[start - 1 : -1].gather(1, ids[0, start:, None])
            scores.append(float(picked.sum()))
        right.append(int(scores[1] > scores[0]) == n % 2)
    kept = json.loads((done / "first" / "results" / "piqa.json").read_text())
    measured = {own["metric"]: own["value"] for own in kept["measurements"]}
    assert measured["acc"] == sum(right) / 6
    assert len(set(right)) == 2  # or any model would do


def test_wandb_gets_numbers_and_answers(subject, tmp_path, monkeypatch) -> None:
    from lightning.pytorch.loggers import WandbLogger

    tables, metrics = {}, {}
    monkeypatch.setattr(
        WandbLogger, "log_table", lambda self, key, **own: tables.update({key: own})
    )
    monkeypatch.setattr(
        WandbLogger, "log_metrics", lambda self, own, step=None: metrics.update(own)
    )
    monkeypatch.setenv("WANDB_MODE", "offline")
    args = arguments(subject, tmp_path, "--suite=none", "--texts=none", "--logging.wandb=offline")
    evaluate.main([arg for arg in args if arg != "--logging.wandb=off"])
    assert metrics["eval/first/asked-questions/words"] >= 0
    assert tables["answers"]["columns"][:3] == ["model", "task", "item"]
    assert len(tables["answers"]["data"]) == 5


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--suite=resoning"], "unknown suite 'resoning'; the nearest are reasoning"),
        (["--compare=nothing/there"], "nothing/there"),
        (["--limit=0"], "--limit must be at least 1"),
        (["--texts={empty}"], "no text"),
        (["--prompts={empty}"], "empty"),
        (["--judge=nobody"], "--judge compares the answers of two models"),
        (["--compare={first}", "--names=a"], "--names gives 1 names for 2 models"),
        (["--compare={first}", "--judge=nobody.py:at_all"], "nobody.py"),
        (["--compare={eval}"], "eval"),
        (["--window=4096", "--suite=none"], "4096"),
        (["--window=8", "--stride=9"], "--stride 9 would leave out tokens"),
        (["--limit=abc"], 'key "limit": Expected'),
        (["--compare="], "--compare has no value"),
        (["--suite"], "--suite has no value: give one, none"),
        (["{first}"], "more models are named by --compare"),
        (["--stages=true"], "--stages compares a model with the one before it"),
        (["--judge_model=some"], "--judge_model is asked of an endpoint"),
        (["--texts=none,python-docs"], "--texts is none, or names something"),
        (["--data_dir=nowhere"], "there is no folder 'nowhere'"),
        (["--config={binary}"], "no text in UTF-8"),
        (["--compare=/not/there"], "there is no model '/not/there'"),
        (["--compare={first}", "--names=a/b,a_b"], "two models are named 'a/b'"),
        (["--names=.."], ".. is no name for a model's folder"),
        (["--names=evaluation.md"], "evaluation.md is no name for a model's folder"),
        (["--compare={reward}"], "the run of a model that scores texts"),
        (["--compare={newer}"], "which this version of lit_llm does not have"),
        (["--compare={moved}"], "cannot be loaded any more; write a model with recipes/export.py"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(subject, tmp_path, capsys, more, sentence) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    places = {"empty": empty, "first": subject / "first", "eval": subject / "eval"}
    places["binary"] = tmp_path / "binary"
    places["binary"].write_bytes(bytes([0x82, 0x05]))
    stages = {"reward": "reward:RewardModule", "moved": "sft:SFTModule", "newer": "new:NewModule"}
    for name, stage in stages.items():
        places[name] = tmp_path / f"{name}.ckpt"
        kept = {"state_dict": {}, "stage": f"lit_llm.modules.{stage}", "tokenizer": "./not/there"}
        torch.save(kept, places[name])
    more = [arg.format(**places) for arg in more]
    with pytest.raises(SystemExit) as caught:
        evaluate.main(arguments(subject, tmp_path / "out", *more))
    told = capsys.readouterr().err.strip()
    assert caught.value.code == 1
    assert told.startswith("error: ") and "\n" not in told and sentence in told, told


def test_an_interrupted_evaluation_says_how_to_go_on(
    subject, tmp_path, capsys, monkeypatch
) -> None:
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_llm.evaluation.session.evaluate_model", interrupted)
    with pytest.raises(SystemExit) as caught:
        evaluate.main(arguments(subject, tmp_path))
    assert caught.value.code == 130
    assert f"what is finished is kept in {tmp_path}" in capsys.readouterr().out


def test_the_model_of_the_command_line_is_the_one(subject, tmp_path, monkeypatch) -> None:
    """Whatever a --config behind it says."""
    config = tmp_path / "own.yaml"
    config.write_text("model: another\nlimit: 3\n")
    given = []

    def found(comparison, settings, **options):
        given.extend([comparison.model, settings.limit])
        return [], [], tmp_path / "evaluation.md"

    monkeypatch.setattr(evaluate, "evaluate_models", found)
    evaluate.main(["mine", "--config", str(config)])
    assert given == ["mine", 3]


def test_a_model_in_this_folder_has_its_name(subject, monkeypatch) -> None:
    from lit_llm.evaluation.subject import subjects

    monkeypatch.chdir(subject / "first")
    assert [model.name for model in subjects([".", "../second"])] == ["first", "second"]
    (subject / "deep").mkdir()
    shutil.copytree(subject / "first", subject / "deep" / "model")
    twice = [str(subject / "deep" / "model")] * 2
    assert [model.name for model in subjects(twice)] == ["deep (1)", "deep (2)"]


def test_a_context_shorter_than_the_items_is_told(subject, tmp_path, capsys) -> None:
    """A model of 128 positions has no room for a question and the 128 tokens of its answer."""
    args = arguments(subject, tmp_path, "--suite=none", "--tasks=xstest", "--texts=none")
    args[0] = str(subject / "short")
    with pytest.raises(SystemExit):
        evaluate.main([*args, "--prompts=none"])
    told = capsys.readouterr().err
    assert "xstest: the model reads at most 128 tokens" in told and told.count("\n") == 1
