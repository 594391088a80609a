"""Settings of an evaluation, and names of what is evaluated."""

import pytest

from lit_llm.arguments import spaced_lists
from lit_llm.errors import UserError
from lit_llm.evaluation.settings import EvaluationSettings
from lit_llm.evaluation.subject import subjects


def test_quick_alone_takes_a_hundred_items():
    assert EvaluationSettings().items == 100
    assert EvaluationSettings(limit=7).items == 7
    assert EvaluationSettings(suite=["facts"]).items is None
    assert EvaluationSettings(tasks=["piqa"]).items is None


def test_none_is_an_empty_list():
    settings = EvaluationSettings(suite=["none"], tasks=["piqa"], texts=["none"], prompts=["none"])
    assert (settings.suite, settings.texts, settings.prompts) == ([], [], [])
    with pytest.raises(UserError, match="nothing to evaluate"):
        EvaluationSettings(suite=["none"], texts=["none"], prompts=["none"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("limit", 0), ("window", 1), ("stride", 0), ("num_fewshot", -1), ("max_new_tokens", 0)],
)
def test_numbers_that_make_no_sense_are_refused(name, value):
    with pytest.raises(UserError, match=f"--{name} must be at least"):
        EvaluationSettings(**{name: value})


def test_lists_may_be_given_with_spaces_or_commas():
    args = "--compare a b,c --limit 3 --suite=quick,facts --names [x,y]".split()
    args[-1] = '["x", "y"]'
    assert spaced_lists(args, {"compare", "suite", "names"}) == [
        '--compare=["a", "b", "c"]',
        "--limit",
        "3",
        '--suite=["quick", "facts"]',
        '--names=["x", "y"]',
    ]


def test_models_are_called_by_as_few_parts_of_their_paths_as_tell_them_apart():
    def names(*sources):
        return [subject.name for subject in subjects(sources)]

    assert names("runs/life/sft/model", "runs/life/ppo/model") == ["sft", "ppo"]
    assert names("runs/one/sft/model", "runs/two/sft/model") == ["one/sft", "two/sft"]
    assert names("HuggingFaceTB/SmolLM2-135M") == ["SmolLM2-135M"]
    assert names("model") == ["model"]
    assert names("a", "a") == ["a (1)", "a (2)"]
    with pytest.raises(UserError, match="--names gives 1 names for 2 models"):
        subjects(["a", "b"], ["x"])
    with pytest.raises(UserError, match="two models are named 'x'"):
        subjects(["a", "b"], ["x", "x"])
