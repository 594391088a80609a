"""The embedded corpus: the documentation of the running Python.

The library's sources are parsed, never imported: importing some of its modules has effects
(``antigravity`` opens a browser, ``this`` prints) and costs time. Only a list of C modules, which
have no source to parse, is imported and asked for its docstrings. The reference topics are those
``help()`` shows.
"""

import ast
import functools
import importlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from lit_llm.data.files import Document
from lit_llm.errors import UserError

# Jokes, graphical tools, tests and tables; most are not installed everywhere.
_LEFT_OUT = {
    "antigravity",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "test",
    "this",
}
_LEFT_OUT |= {"tkinter", "turtle", "turtledemo"}
_FOLDERS_LEFT_OUT = {"__pycache__", "idle_test", "test", "tests"}

# C modules without effects on import. A private one is told under the public module that passes it
# on.
_C_MODULES = {
    "array": "array",
    "binascii": "binascii",
    "builtins": "builtins",
    "cmath": "cmath",
    "_collections": "collections",
    "_csv": "csv",
    "_datetime": "datetime",
    "_decimal": "decimal",
    "_functools": "functools",
    "gc": "gc",
    "_io": "io",
    "itertools": "itertools",
    "_json": "json",
    "marshal": "marshal",
    "math": "math",
    "_operator": "operator",
    "posix": "os",
    "_random": "random",
    "_sre": "re",
    "select": "select",
    "_socket": "socket",
    "_struct": "struct",
    "sys": "sys",
    "_thread": "threading",
    "time": "time",
    "unicodedata": "unicodedata",
    "_weakref": "weakref",
    "zlib": "zlib",
}

_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class FunctionDoc:
    """A public function or method of the standard library and its docstring.

    Attributes:
        module: Module that offers it, such as ``"calendar"``.
        qualname: Name inside the module, such as ``"isleap"`` or ``"Calendar.iterweekdays"``.
        signature: Parameters and return annotation, such as ``"(year)"``.
        docstring: The docstring without its indentation.
    """

    module: str
    qualname: str
    signature: str
    docstring: str


@dataclass(frozen=True)
class _Entry:
    """A docstring of a module (without a name), a class or a function."""

    name: str
    signature: str
    docstring: str
    is_function: bool = False


def collect_documents() -> list[Document]:
    """Collect the corpus ``python-docs``: one document a module, then one a reference topic.

    A module's document holds its docstring, then name, signature and docstring of its public
    classes, functions and methods. About 2 MB on CPython 3.11; the text differs between versions of
    Python, so record its ``documents_sha256``. The order is always the same.

    Raises:
        UserError: When this Python comes without the sources of its library.
    """
    documents = []
    for module, entries in _library().items():
        parts = [f"{entry.name or module}{entry.signature}\n{entry.docstring}" for entry in entries]
        documents.append(Document("\n\n".join(parts), f"python-docs:{module}"))
    return documents + list(_topics())


def collect_functions() -> list[FunctionDoc]:
    """Collect the standard library's public functions and methods that have a docstring, in order.

    Raises:
        UserError: When this Python comes without the sources of its library.
    """
    return [
        FunctionDoc(module, entry.name, entry.signature, entry.docstring)
        for module, entries in _library().items()
        for entry in entries
        if entry.is_function
    ]


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(topics[name].strip(), f"python-docs:topic {name}")


@functools.cache
def _library() -> dict[str, list[_Entry]]:
    """Docstrings by module; modules sorted by name, entries in the order of the source."""
    modules: dict[str, list[_Entry]] = {}
    for name, path in _source_files():
        modules[name] = list(_parse(path))
    if not modules:
        folder = sysconfig.get_path("stdlib")
        raise UserError(
            f"python-docs: this Python has no library sources in {folder}; "
            "give another source of text."
        )
    for name, public in _C_MODULES.items():
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        known = modules.setdefault(public, [])
        names = {entry.name for entry in known}
        known += [entry for entry in _inspect(module, {name, public}) if entry.name not in names]
    return {name: modules[name] for name in sorted(modules) if modules[name]}


def _source_files() -> Iterator[tuple[str, Path]]:
    library = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names - _LEFT_OUT):
        if name.startswith("_"):
            continue
        if (file := library / f"{name}.py").is_file():
            yield name, file
        for file in sorted((library / name).rglob("*.py")):
            parts = file.relative_to(library).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if _FOLDERS_LEFT_OUT.isdisjoint(parts) and not any(p.startswith("_") for p in parts):
                yield ".".join(parts), file


def _parse(path: Path) -> Iterator[_Entry]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    if docstring := ast.get_docstring(tree):
        yield _Entry("", "", docstring)
    yield from _definitions(tree, "")


def _definitions(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[_Entry]:
    for node in parent.body:
        if not isinstance(node, _DEFINITIONS) or node.name.startswith("_"):
            continue
        docstring = ast.get_docstring(node)
        if isinstance(node, ast.ClassDef):
            if docstring:
                bases = ", ".join(ast.unparse(base) for base in node.bases)
                yield _Entry(prefix + node.name, f"({bases})" if bases else "", docstring)
            yield from _definitions(node, f"{prefix}{node.name}.")
        elif docstring and _is_property(node):
            yield _Entry(prefix + node.name, "", docstring)
        elif docstring:
            returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            signature = f"({ast.unparse(node.args)}){returns}"
            yield _Entry(prefix + node.name, signature, docstring, is_function=True)


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(name).endswith("property") for name in node.decorator_list)


def _inspect(module: ModuleType, names: set[str]) -> Iterator[_Entry]:
    """Docstrings of a C module: what it defines itself (under one of its ``names``), sorted."""
    if module.__doc__:
        yield _Entry("", "", inspect.cleandoc(module.__doc__))
    for name, value in sorted(vars(module).items()):
        # A program may have put objects of its own into ``builtins`` or ``sys``.
        own = getattr(value, "__module__", None) in names
        # An alias, such as EnvironmentError for OSError, would repeat what it stands for; the
        # hooks of sys are there to be replaced, and wandb replaces its exit.
        alias = getattr(value, "__name__", "") != name
        if not own or alias or name.startswith("_") or name.endswith(("hook", "exit")):
            continue
        if inspect.isbuiltin(value):
            yield from _inspect_function(name, value)
        elif inspect.isclass(value):
            if value.__doc__:
                yield _Entry(name, "", inspect.cleandoc(value.__doc__))
            for method, member in sorted(vars(value).items()):
                if not method.startswith("_") and inspect.isroutine(member):
                    yield from _inspect_function(f"{name}.{method}", member)


def _inspect_function(name: str, function: object) -> Iterator[_Entry]:
    docstring = getattr(function, "__doc__", None)
    if not docstring:
        return
    try:
        signature = str(inspect.signature(function))  # type: ignore[arg-type]
    except (AttributeError, TypeError, ValueError):
        signature = ""
    # An address in a default would make the text differ from run to run.
    signature = "" if " at 0x" in signature else signature
    yield _Entry(name, signature, inspect.cleandoc(docstring), is_function=True)
