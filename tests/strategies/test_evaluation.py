"""An evaluation during training on two processes: the numbers of one process, on every rank."""

import csv
import json
from pathlib import Path

import pytest

from tests.strategies.recipe_cases import arguments, run
from tests.strategies.world import World

pytestmark = [pytest.mark.xdist_group("two_ranks"), pytest.mark.thorough]

CALLBACK = [
    "--trainer.callbacks+=lit_llm.callbacks.evaluation.EvaluationCallback",
    "--trainer.callbacks.every_n_steps=6",
    "--trainer.callbacks.settings.suite=[]",
    "--trainer.callbacks.settings.tasks=[piqa]",
    "--trainer.callbacks.settings.num_prompts=5",
    "--trainer.callbacks.settings.max_new_tokens=4",
]


def measured(output: Path) -> list[dict[str, float]]:
    """The evaluations of a run, in order."""
    with (output / "metrics" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [{k: float(v) for k, v in row.items() if k.startswith("eval/") and v} for row in rows]
    return [row for row in found if row]


def settings(folder: Path, recipe: str) -> list[str]:
    """On texts and questions of the recipe's own, and a task."""
    rows = [{"goal": f"box {n}", "sol1": "red", "sol2": "a tree", "label": n % 2} for n in range(7)]
    (folder / "eval").mkdir(exist_ok=True)
    path = folder / "eval" / "piqa_valid.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"texts": "texts", "prompts": "chats"}
    given = [f"--trainer.callbacks.settings.{k}=[{folder / v}.jsonl]" for k, v in own.items()]
    return [*CALLBACK, f"--trainer.callbacks.settings.data_dir={path.parent}", *given]


@pytest.mark.parametrize(
    ("recipe", "strategy"),
    [("sft", "ddp"), ("sft", "fsdp2"), ("sft", "deepspeed_zero3"), ("ppo", "fsdp")],
)
def test_the_numbers_are_those_of_one_process(
    recipe: str, strategy: str, parity_folder: Path, two_ranks: World, tmp_path: Path
) -> None:
    """Both train the same model, so both must find the same of it."""
    more = settings(parity_folder, recipe)
    run(recipe, arguments(parity_folder, recipe, tmp_path / "one", None, *more))
    args = arguments(parity_folder, recipe, tmp_path / "two", strategy, *more)
    two_ranks.run("tests.strategies.recipe_cases:run", recipe, args)
    one, two = measured(tmp_path / "one"), measured(tmp_path / "two")
    assert len(one) == len(two) >= 2
    for mine, its in zip(one, two, strict=True):
        assert mine.keys() == its.keys()
        assert {"eval/texts/perplexity", "eval/piqa/acc"} <= mine.keys()
        for name, value in mine.items():
            assert its[name] == pytest.approx(value, rel=1e-3), name
    lines = [(tmp_path / name / "evaluation_answers.jsonl").read_text() for name in ("one", "two")]
    assert lines[0].count("\n") == lines[1].count("\n") == 5 * len(one)
