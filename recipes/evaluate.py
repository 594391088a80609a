r"""Judge models: perplexity, benchmark tasks, safety, coherence, and one report over all of them.

    python recipes/evaluate.py runs/sft/model
    python recipes/evaluate.py runs/sft/model --compare runs/ppo/model --judge runs/reward/model
    python recipes/evaluate.py HuggingFaceTB/SmolLM2-135M-Instruct --suite reasoning,safety \\
        --limit 200 --texts wiki=wiki.test.txt
    python recipes/evaluate.py runs/pretrain --suite none --tasks lm_eval/arc_easy

docs/evaluation.md says what each number means. An evaluation that was stopped goes on where it was
when the command is repeated.
"""

import dataclasses
import shlex
import sys

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from lit_llm.arguments import in_one_sentence, spaced_lists
from lit_llm.callbacks.loggers import LoggingConfig
from lit_llm.console import recipe
from lit_llm.errors import UserError
from lit_llm.evaluation.session import Comparison, evaluate_models
from lit_llm.evaluation.settings import LISTS, EvaluationSettings
from lit_llm.evaluation.tracking import track


def names_of(kind: type) -> list[str]:
    """The settings that a dataclass holds."""
    return [field.name for field in dataclasses.fields(kind)]


def parsed(parser: ArgumentParser, given: list[str]) -> Namespace:
    """Read the command line, whose first word may be the model.

    Raises:
        UserError: It cannot be read, or names no value for a list.
    """
    lists = ("compare", "names", *LISTS)
    if given and not given[0].startswith("-"):
        given = [*given[1:], f"--model={given[0]}"]  # last, so that no --config changes it
    try:
        options = parser.parse_args(spaced_lists(given, lists))
    except ArgumentError as error:
        told = in_one_sentence(str(error))
        if told.startswith("unrecognized arguments: ") and told.split()[2][0] != "-":
            told += "; more models are named by --compare"
        raise UserError(told) from error
    except UnicodeDecodeError as error:
        raise UserError(f"the file of --config is no text in UTF-8 ({error.reason})") from error
    for name in lists:
        if not options[name] and {f"--{name}", f"--{name}="} & set(given):
            none = " none," if name in LISTS else ""
            raise UserError(f"--{name} has no value: give one,{none} or leave --{name} out")
    return options


@recipe
def main(args: list[str] | None = None) -> None:
    """Evaluate, compare, report."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0], exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with these options.")
    parser.add_class_arguments(Comparison)
    parser.add_class_arguments(EvaluationSettings)
    parser.add_class_arguments(LoggingConfig, "logging")
    given = sys.argv[1:] if args is None else args
    options = parsed(parser, given)
    comparison = Comparison(**{own: options[own] for own in names_of(Comparison)})
    settings = EvaluationSettings(**{own: options[own] for own in names_of(EvaluationSettings)})
    command = shlex.join(["python", "recipes/evaluate.py", *given])
    logging = LoggingConfig(**options.logging.as_dict())
    try:
        _, _, report = evaluate_models(
            comparison,
            settings,
            command=command,
            track=lambda results, rates: track(logging, comparison.output_dir, results, rates),
        )
    except KeyboardInterrupt:
        print(
            f"\ninterrupted: finished tasks are kept in {comparison.output_dir}; the same command "
            "goes on from there",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    print(f"\nreport: {report.with_suffix('.html')} (the same as text: {report.name})")


if __name__ == "__main__":
    main()
