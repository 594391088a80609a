"""What a command line may say, and what is said of one that cannot be read."""

import json
from collections.abc import Collection
from pathlib import Path

import yaml

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
