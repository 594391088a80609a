"""What a command line may say, and what is said of one that cannot be read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from lit_llm.errors import UserError

if TYPE_CHECKING:
    from lit_llm.callbacks.loggers import LoggingConfig
    from lit_llm.evaluation.session import Comparison
    from lit_llm.evaluation.settings import EvaluationSettings

_SOURCES = (
    "--data.sources",
    "--data.val_sources",
    "--data.ood_sources",
    "--data.ptx_sources",
    "--model.rewards",
    "--model.judges",
)

# How the parser speaks of types and of what it tried, which says nothing to people.
_ASIDES = (
    "Does not validate against any of the Union subtypes",
    "Subtypes:",
    "Errors:",
    "Problem with given class_path",
    "Expected a <class 'NoneType'>",
    "Given value",
)


def in_one_sentence(message: str) -> str:
    """The message of a command-line parser without its asides, in one line.

    Args:
        message: What jsonargparse says of arguments that do not fit, over several lines.
    """
    lines = [line.strip(" -") for line in message.splitlines()]
    told = [line for line in lines if line and not line.startswith(_ASIDES)]
    return "; ".join(told).replace(":;", ":") + " (--help lists the settings)"


def listed_sources(args: list[str], *, has_ood: bool = False) -> list[str]:
    """Put a single source, or a single reward, into a list, and empty the list first.

    Otherwise jsonargparse fills the fields that a source leaves out with those of the source that
    stands at its place in the recipe's YAML.

    Args:
        args: The command line.
        has_ood: Whether the data module has a second test set. That of the recipe's YAML belongs to
            the sources there, so other sources do without unless it is given too.
    """
    result: list[str] = []
    given: set[str] = set()
    rest = iter(args)
    for arg in rest:
        name, equals, value = arg.partition("=")
        if name in ("--config", "-c") and (equals or (value := next(rest, ""))):
            result += [f"{key}=[]" for key in _SOURCES if _sets(value, key)]
            given.update(key for key in _SOURCES if _sets(value, key))
            result.append(f"--config={value}")
        elif name in _SOURCES and (equals or (value := next(rest, ""))):
            result += [f"{name}=[]", f"{name}={_listed(value)}"]
            given.add(name)
        else:
            result.append(arg)
            given.add(name)
    own_ood = given & {"--data.ood_sources", "--data.ood_sources+"}
    if has_ood and "--data.sources" in given and not own_ood:
        return ["--data.ood_sources=null", *result]
    return result


def spaced_lists(args: list[str], names: Collection[str]) -> list[str]:
    """Put the values of settings that are lists into one list each: ``--compare A B``, ``A,B``.

    Args:
        args: The command line.
        names: Names of the settings, without the dashes.
    """
    result: list[str] = []
    values: list[str] | None = None
    for arg in args:
        name, equals, value = arg.partition("=")
        if arg.startswith("--"):
            values = None
        if arg.startswith("--") and name.removeprefix("--") in names:
            if value.lstrip().startswith("["):
                result.append(arg)
                continue
            values = [part for part in value.split(",") if part] if equals else []
            result.append(f"{name}={json.dumps(values, ensure_ascii=False)}")
        elif values is not None:
            given = json.loads(arg) if arg.lstrip().startswith("[") else arg.split(",")
            values += [part for part in given if part]
            known = result[-1].partition("=")[0]
            result[-1] = f"{known}={json.dumps(values, ensure_ascii=False)}"
        else:
            result.append(arg)
    return result


def evaluation_arguments(
    description: str, args: list[str]
) -> tuple[Comparison, EvaluationSettings, LoggingConfig]:
    """What is evaluated, what on, and who is told, from the command line of an evaluation.

    Args:
        description: First line of its help.
        args: The command line, whose first word may be the model.

    Raises:
        UserError: It cannot be read, or names no value for a list.
    """
    from lit_llm.callbacks.loggers import LoggingConfig
    from lit_llm.evaluation.session import Comparison
    from lit_llm.evaluation.settings import LISTS, EvaluationSettings

    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with these options.")
    kinds = (Comparison, EvaluationSettings)
    for kind in kinds:
        parser.add_class_arguments(kind)
    parser.add_class_arguments(LoggingConfig, "logging")
    if args and not args[0].startswith("-"):
        args = [*args[1:], f"--model={args[0]}"]  # last, so that no --config changes it
    lists = ("compare", "names", *LISTS)
    try:
        options = parser.parse_args(spaced_lists(args, lists))
    except ArgumentError as error:
        told = in_one_sentence(str(error))
        if told.startswith("unrecognized arguments: ") and told.split()[2][0] != "-":
            told += "; more models are named by --compare"
        raise UserError(told) from error
    except UnicodeDecodeError as error:
        raise UserError(f"the file of --config is no text in UTF-8 ({error.reason})") from error
    for name in lists:
        if not options[name] and {f"--{name}", f"--{name}="} & set(args):
            none = " none," if name in LISTS else ""
            raise UserError(f"--{name} has no value: give one,{none} or leave --{name} out")
    comparison, settings = (
        {field.name: options[field.name] for field in dataclasses.fields(kind)} for kind in kinds
    )
    logging = LoggingConfig(**options.logging.as_dict())
    return Comparison(**comparison), EvaluationSettings(**settings), logging


def _sets(config: str, key: str) -> bool:
    """Whether a YAML file sets a list of sources; a file that cannot be read is the parser's."""
    try:
        settings = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        section, _, name = key.removeprefix("--").partition(".")
        return bool(settings[section][name])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return False


def _listed(value: str) -> str:
    if value.lstrip().startswith("{"):
        return f"[{value}]"
    is_list = value.lstrip().startswith("[") or value == "null"
    return value if is_list else json.dumps([value])
