r"""Judge models: perplexity, benchmark tasks, safety, coherence, and one report over all of them.

    python recipes/evaluate.py runs/sft/model
    python recipes/evaluate.py runs/sft/model --compare runs/ppo/model --judge runs/reward/model
    python recipes/evaluate.py HuggingFaceTB/SmolLM2-135M-Instruct --suite reasoning,safety \\
        --limit 200 --texts wiki=wiki.test.txt
    python recipes/evaluate.py runs/pretrain/checkpoints --suite none --tasks lm_eval/arc_easy

docs/evaluation.md says what each number means. An evaluation that was stopped goes on where it was
when the command is repeated.
"""

import dataclasses
import shlex
import sys

from jsonargparse import ArgumentParser

from lit_llm.arguments import spaced_lists
from lit_llm.callbacks.loggers import LoggingConfig
from lit_llm.console import recipe
from lit_llm.evaluation.session import Comparison, evaluate_models
from lit_llm.evaluation.settings import LISTS, EvaluationSettings
from lit_llm.evaluation.tracking import track


def names_of(kind: type) -> list[str]:
    """The settings that a dataclass holds."""
    return [field.name for field in dataclasses.fields(kind)]


@recipe
def main(args: list[str] | None = None) -> None:
    """Evaluate, compare, report."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", action="config", help="YAML file with these options.")
    parser.add_class_arguments(Comparison)
    parser.add_class_arguments(EvaluationSettings)
    parser.add_class_arguments(LoggingConfig, "logging")
    given = sys.argv[1:] if args is None else args
    named = ["--model"] if given and not given[0].startswith("-") else []
    options = parser.parse_args(spaced_lists([*named, *given], ("compare", "names", *LISTS)))
    comparison = Comparison(**{own: options[own] for own in names_of(Comparison)})
    settings = EvaluationSettings(**{own: options[own] for own in names_of(EvaluationSettings)})
    command = shlex.join(["python", "recipes/evaluate.py", *given])
    results, win_rates, report = evaluate_models(comparison, settings, command=command)
    track(LoggingConfig(**options.logging.as_dict()), comparison.output_dir, results, win_rates)
    print(f"\nreport: {report}")


if __name__ == "__main__":
    main()
