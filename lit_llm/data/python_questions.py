"""The embedded instruction data: questions and answers about Python's standard library.

Made from the documentation of the running Python, so a first fine-tuning needs no network and no
file. Three kinds of questions: what a function does, which parameters it takes, and how it is
called. An answer has one form a kind, so a regular expression tells a well-formed one, and the
answer to the second kind can be read off the question, for functions never seen too.
"""

import ast
import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lit_llm.data.conversations import Conversation
from lit_llm.data.python_docs import FunctionDoc, collect_functions

Kind = Literal["does", "parameters", "signature"]

# {call} is `calendar.isleap(year)`, {name} is `calendar.isleap`, {purpose} the first sentence of
# the docstring. A follow-up is asked in the same conversation, where the function is known.
_QUESTIONS: dict[Kind, tuple[str, ...]] = {
    "does": (
        "What does {call} do?",
        "What is {call} for?",
        "Explain {call} in one sentence.",
        "Describe {call} briefly.",
        "Tell me what {call} does.",
        "I found {call} in some code. What does it do?",
    ),
    "parameters": (
        "Which parameters does {call} take?",
        "List the parameters of {call}.",
        "What are the parameters of {call}?",
        "Name every parameter of {call}.",
        "What can I pass to {call}?",
    ),
    "signature": (
        "What is the signature of {name}? {purpose}",
        "How do I call {name}? {purpose}",
        "{purpose} That is {name}. How is it called?",
        "Show me how to call {name}. {purpose}",
        "Write down the signature of {name}.",
        "How is {name} called?",
    ),
}
_FOLLOW_UPS: dict[Kind, tuple[str, ...]] = {
    "does": (
        "And what does it do?",
        "What is it for?",
        "Explain it in one sentence.",
        "Describe it briefly.",
    ),
    "parameters": (
        "Which parameters does it take?",
        "List its parameters.",
        "And what are its parameters?",
        "Name every parameter of it.",
    ),
}
# What shares a conversation; the kind left over is asked in one of its own. What a function does is
# not asked after its signature, since that question may have told it.
_PAIRS: tuple[tuple[Kind, Kind], ...] = (
    ("does", "parameters"),
    ("parameters", "does"),
    ("signature", "parameters"),
)

ANSWER_FORMATS: dict[Kind, str] = {
    "does": r"`[\w.]+`: [^\n]+\.",
    "parameters": r"It takes no parameters\.|- `\*{0,2}\w+`(\n- `\*{0,2}\w+`)*",
    "signature": r"`[\w.]+\([^`\n]*\)`",
}
"""The form of an answer of each kind, for ``re.fullmatch``."""

_SENTENCE_END = r"(?<=[.?!])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.) +(?=[^a-z])"
_LONGEST_PURPOSE = 200
_LONGEST_CALL = 120


@dataclass(frozen=True)
class DescribedFunction:
    """A function that can be asked about.

    Attributes:
        module: Module that offers it.
        qualname: Name inside the module.
        purpose: First sentence of the docstring.
        more: Second sentence, where there is a clear one.
        call: Parameters in brackets; None where they are not known.
        parameters: Names of the parameters, with their stars.
        group: Name of the first function that is described alike.
    """

    module: str
    qualname: str
    purpose: str
    more: str | None
    call: str | None
    parameters: tuple[str, ...]
    group: str

    @property
    def name(self) -> str:
        """Name with the module."""
        return f"{self.module}.{self.qualname}"


def collect_conversations() -> list[Conversation]:
    """Collect the questions and answers, in the order of the functions; always the same ones.

    A function with a clear first sentence in its docstring is asked about once a kind; about one
    conversation in five has two turns, the second a follow-up. Where the signature is unknown only
    the first kind is asked. Functions that are described alike are one group, named after the first
    of them: a held-out answer is no answer of another module in the training data.

    Raises:
        UserError: When this Python comes without the sources of its library.
    """
    return [
        Conversation(
            messages=list(_messages(function, kinds)),
            origin=f"python-docs:{function.name}",
            group=function.group,
            answer_format=ANSWER_FORMATS[kinds[-1]],
        )
        for function in described_functions()
        for kinds in _conversations_about(function)
    ]


def described_functions() -> list[DescribedFunction]:
    """Collect the functions with a clear first sentence in their docstring, each once, in order.

    Raises:
        UserError: When this Python comes without the sources of its library.
    """
    groups: dict[str, str] = {}
    functions: dict[str, DescribedFunction] = {}
    for document in collect_functions():
        name = f"{document.module}.{document.qualname}"
        purpose, more, *_ = [*_sentences(document), None, None]
        if purpose is None or not _reads_well(purpose) or name in functions:
            continue
        call, parameters = _call(document)
        functions[name] = DescribedFunction(
            document.module,
            document.qualname,
            purpose,
            more if more is not None and _reads_well(more) else None,
            call,
            parameters,
            group=groups.setdefault(_normalized(purpose), name),
        )
    return list(functions.values())


def _conversations_about(function: DescribedFunction) -> list[tuple[Kind, ...]]:
    """Kinds asked about in each conversation."""
    if function.call is None:
        return [("does",)]
    # Half of the functions: so one conversation in five has two turns.
    if stable_hash(function.name, "turns") % 2:
        return [("does",), ("parameters",), ("signature",)]
    pair = _PAIRS[stable_hash(function.name, "pair") % len(_PAIRS)]
    return [pair, *((kind,) for kind in _QUESTIONS if kind not in pair)]


def _messages(function: DescribedFunction, kinds: tuple[Kind, ...]) -> Iterator[dict[str, Any]]:
    for turn, kind in enumerate(kinds):
        yield {"role": "user", "content": ask(function, kind, follow_up=turn > 0)}
        yield {"role": "assistant", "content": answer(function, kind)}


def ask(function: DescribedFunction, kind: Kind, *, follow_up: bool = False) -> str:
    """A question about a function, in one of the phrasings of its kind; always the same one."""
    templates = _FOLLOW_UPS[kind] if follow_up else _QUESTIONS[kind]
    template = templates[stable_hash(function.name, kind) % len(templates)]
    return template.format(
        call=f"`{function.name}{function.call or ''}`",
        name=f"`{function.name}`",
        purpose=function.purpose,
    )


def answer(function: DescribedFunction, kind: Kind) -> str:
    """The answer, in the one form of its kind."""
    if kind == "does":
        return f"`{function.qualname}`: {function.purpose}"
    if kind == "signature":
        return f"`{function.qualname}{function.call}`"
    if not function.parameters:
        return "It takes no parameters."
    return "\n".join(f"- `{name}`" for name in function.parameters)


def _call(document: FunctionDoc) -> tuple[str | None, tuple[str, ...]]:
    """How a function is called, and the names of its parameters; None where it is not known."""
    arguments = _arguments(document)
    if arguments is None:
        return None, ()
    call = f"({ast.unparse(arguments)})"
    if len(call) > _LONGEST_CALL or "`" in call or "\n" in call:
        return None, ()
    parameters = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    parameters += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    parameters += [argument.arg for argument in arguments.kwonlyargs]
    parameters += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return call, tuple(parameters)


def _arguments(document: FunctionDoc) -> ast.arguments | None:
    """The parameters that a caller gives, without annotations; None where they are not known."""
    try:
        (definition,) = ast.parse(f"def function{document.signature}: pass").body
    except (SyntaxError, ValueError):
        return None
    assert isinstance(definition, ast.FunctionDef)
    arguments = definition.args
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    first = arguments.posonlyargs or arguments.args
    name = first[0].arg if first else ""
    if "." not in document.qualname:
        # typing's special forms are written as functions of self, and are none.
        return None if name == "self" else arguments
    if name in ("self", "cls", "type"):  # class methods of C code say "type"
        del first[0]
    return arguments


def _sentences(document: FunctionDoc) -> Iterator[str]:
    """The docstring's sentences, each on one line, up to the first list or example."""
    lines = document.docstring.strip().splitlines()
    # C code repeats the signature: "detach()\n\nClose the socket object without ..."
    if lines and re.match(rf"[\w.]*{re.escape(document.qualname.rpartition('.')[2])}\(", lines[0]):
        del lines[0]
    prose = itertools.takewhile(lambda line: not re.match(r"\s*([-*+:@>]|\d+[.)])", line), lines)
    for paragraph in re.split(r"\n\s*\n", "\n".join(prose).strip()):
        text = re.sub(r"``(.+?)``", r"`\1`", " ".join(paragraph.split()))
        for sentence in re.split(_SENTENCE_END, text):
            yield sentence + "." if re.search(r"[\w)'\"`]$", sentence) else sentence


def _reads_well(sentence: str) -> bool:
    return (
        10 <= len(sentence) <= _LONGEST_PURPOSE
        and sentence.isascii()
        and sentence.isprintable()
        and sentence.endswith(".")
        and " " in sentence
        and re.match(r"[A-Z]", sentence) is not None
        # reStructuredText, examples, signatures and what a cut has left open
        and not re.search(r">>>|->|::|:\w+:|\.\.\.|``|^\w+\(", sentence)
        and all(sentence.count(a) == sentence.count(b) for a, b in ("()", "[]", "{}"))
        and sentence.count("`") % 2 == sentence.count('"') % 2 == 0
    )


def _normalized(sentence: str) -> str:
    return " ".join(re.findall(r"\w+", sentence.lower()))


def stable_hash(name: str, choice: str) -> int:
    """A number that decides one choice about a function, the same everywhere."""
    digest = hashlib.blake2b(f"{choice}\n{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
