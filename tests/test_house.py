"""The house itself: docstrings, light imports, readable configs, a lock that pins, links that lead
somewhere. That imports only point down is checked by ``make check`` (import-linter)."""

import ast
import re
import socket
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "lit_llm").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
CONFIGS = sorted((ROOT / "recipes").rglob("*.yaml"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "data").rglob("*.md")])

# Slow to import, and needed by some stages only: imported inside the functions that use them.
# Lightning itself imports parts of transformers and matplotlib; no more of them may be added.
HEAVY = {
    "accelerate", "datasets", "deepspeed", "lm_eval", "matplotlib", "pandas", "peft", "pyarrow",
    "rensa", "scipy", "sklearn", "tensorboard", "tokenizers", "transformers", "wandb", "zstandard",
}  # fmt: skip
# Subclasses of the harness's, which are imported inside functions only.
OF_THE_HARNESS = {
    "lit_llm.evaluation.harness_encoding",
    "lit_llm.evaluation.harness_model",
    "lit_llm.evaluation.tasks.shots",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> list[str]:
    """Full names of the modules that a file imports, inside functions too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            names.append(node.module or "")
    return names


def packages_added(modules: list[str], before: str) -> set[str]:
    """Top-level packages of which importing ``modules`` loads more than ``before`` did."""
    code = (
        f"import sys, importlib\nsys.path.insert(0, 'recipes')\n{before}\n"
        "known = set(sys.modules)\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - known})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("path", [*MODULES, *RECIPES], ids=name_of)
def test_every_module_says_what_it_is(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring is not None
    assert len(docstring) > 20


def test_every_recipe_shows_commands() -> None:
    assert RECIPES
    for path in RECIPES:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert f"python recipes/{path.name}" in docstring, path.name


def test_functional_imports_torch_only() -> None:
    rooms = [path for path in MODULES if path.parent.name == "functional"]
    assert rooms
    for path in rooms:
        for name in imports_of(path):
            own = name.startswith("lit_llm.functional") or name == "lit_llm.errors"
            assert own or name.partition(".")[0] in {"torch", *sys.stdlib_module_names}, (
                f"{path.name} imports {name}"
            )


def test_every_imported_package_is_declared() -> None:
    declared = {canonicalize_name(Requirement(text).name) for text in requires("lit-llm") or []}
    providers = packages_distributions()
    own = {"lit_llm", *(path.stem for path in RECIPES)}
    for path in [*MODULES, *RECIPES]:
        for top in {name.partition(".")[0] for name in imports_of(path)}:
            if top not in own and top not in sys.stdlib_module_names and top in providers:
                found = {canonicalize_name(name) for name in providers[top]}
                assert found & declared, f"{name_of(path)} imports {top}: add it to pyproject.toml"


def test_light_rooms_stay_light() -> None:
    rooms = ("lit_llm.functional", "lit_llm.planning", "lit_llm.errors", "lit_llm.console")
    modules = [dotted(path) for path in MODULES if dotted(path).startswith(rooms)]
    assert "lit_llm.functional.language_model" in modules
    added = packages_added(modules, before="import torch")
    assert not added & (HEAVY | {"lightning", "torchmetrics"})


def test_importing_adds_nothing_heavy_to_lightning() -> None:
    modules = [*map(dotted, MODULES), *(path.stem for path in RECIPES)]
    modules = [name for name in modules if name not in OF_THE_HARNESS]
    added = packages_added(modules, before="import lightning.pytorch.cli")
    assert "lit_llm" in added
    assert not added & HEAVY


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_config_is_a_mapping(path: Path) -> None:
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(settings, dict)
    assert settings


def test_the_lock_pins_every_dependency() -> None:
    pinned: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            pin = Requirement(line)
            pinned.setdefault(canonicalize_name(pin.name), []).append(pin)
    assert [str(pin.specifier) for pin in pinned["torch"]] == ["==2.13.0"]
    for text in requires("lit-llm") or []:
        wanted = Requirement(text)
        pins = pinned.get(canonicalize_name(wanted.name))
        assert pins, f"{wanted.name} is not in constraints.txt; run make lock"
        for pin in pins:
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            assert specifier.version in wanted.specifier, f"{pin} is outside {wanted}"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_and_commands_of_the_docs_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    linked = [
        path.parent / target.partition("#")[0]
        for target in re.findall(r"\]\(([^)\s]+)\)", text)
        if not re.match(r"[a-z]+:|#", target)
    ]
    scripts = [ROOT / name for name in re.findall(r"python ((?:recipes|benchmarks)/\S+\.py)", text)]
    missing = [str(target) for target in [*linked, *scripts] if not target.exists()]
    assert not missing


def test_the_network_is_off(pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--network"):
        pytest.skip("the network was asked for with --network")
    with socket.socket() as connection, pytest.raises(RuntimeError, match="mark it network"):
        connection.connect(("192.0.2.1", 9))  # an address kept for documentation (RFC 5737)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as connection:
        connection.connect(server.getsockname())  # this machine is not the network
