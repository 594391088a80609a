"""A page of blocks, as Markdown and as self-contained HTML; no text in it can break it."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from lit_llm.evaluation.reward_report import fenced

if TYPE_CHECKING:
    from lit_llm.evaluation.evaluation_plots import Panel

_MARKS = {"better": "▲ better", "worse": "▼ worse", "differs": "◆ differs"}
_SAMPLES_IN_MARKDOWN = 3
# Invisible marks that turn the direction of all text after them.
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What it says.
        detail: What is said smaller below, such as an interval.
        mark: "better", "worse" or "differs" where that is certain.
        change: By how much, against another model.
    """

    text: str
    detail: str = ""
    mark: str = ""
    change: str = ""

    @property
    def marked(self) -> str:
        """The change with its mark in words."""
        return f"{_MARKS[self.mark]} {self.change}" if self.mark else self.change


@dataclass(frozen=True)
class Prose:
    """Sentences, one paragraph each."""

    sentences: list[str]
    kind: str = "prose"


@dataclass(frozen=True)
class Bullets:
    """A list under a few words.

    Attributes:
        title: The words.
        sentences: The list.
        mark: "better" or "worse", for its colour.
    """

    title: str
    sentences: list[str]
    mark: str = ""
    kind: str = "bullets"


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: Names of the columns; the first one names the rows.
        rows: As many cells a row.
    """

    columns: list[str]
    rows: list[list[Cell]]
    kind: str = "table"


@dataclass(frozen=True)
class Figure:
    """Plots of several models, in HTML only.

    Attributes:
        panels: The plots.
        models: Names of the models, in the order of the marks.
        chance: Whether a line of chance is in them.
    """

    panels: list[Panel]
    models: list[str]
    chance: bool = False
    kind: str = "figure"


@dataclass(frozen=True)
class Reply:
    """What one model answered, and what is said of it."""

    model: str
    text: str
    about: str


@dataclass(frozen=True)
class Sample:
    """One item with the answers of all models.

    Attributes:
        title: What names it.
        prompt: What the models were given.
        reference: The right answer, where there is one.
        replies: What they answered.
    """

    title: str
    prompt: str
    reference: str | None
    replies: list[Reply]
    kind: str = "sample"


@dataclass(frozen=True)
class Command:
    """What to type."""

    text: str
    kind: str = "command"


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown when they are asked for."""

    title: str
    blocks: list[Block]
    kind: str = "fold"


Block = Union[Prose, Bullets, Table, Figure, Sample, Command, Fold]  # noqa: UP007 (Fold is later)


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading."""

    title: str
    blocks: list[Block] = field(default_factory=list)


def visible(text: str) -> str:
    """A text with everything that a reader would not see, or that would mislead, written out.

    Control characters and marks that turn the direction of text become their number (⟨U+202E⟩),
    halves of surrogate pairs �; line feeds and tabs stay.

    Args:
        text: Any text, such as a model's answer.
    """
    return "".join(_visible(one) for one in text.replace("\r\n", "\n"))


def html_page(title: str, sections: list[Section]) -> str:
    """The page as one HTML file without scripts that needs nothing else.

    Every text goes through :func:`visible` and is escaped, by the template's own rule and not one
    by one; a policy in the page forbids what would load or run all the same.

    Args:
        title: Its title.
        sections: Its parts.
    """
    from jinja2 import Environment, StrictUndefined

    def shown(value: Any) -> Any:
        safe = not isinstance(value, str) or hasattr(value, "__html__")  # what a macro has made
        return value if safe else visible(value)

    environment = Environment(
        autoescape=True,
        finalize=shown,
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    source = Path(__file__).with_suffix(".jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(title=title, sections=sections) + "\n"


def markdown_page(title: str, sections: list[Section]) -> str:
    """The page as Markdown that can also be read as it is.

    Args:
        title: Its title.
        sections: Its parts.
    """
    parts = [f"# {_inline(title)}"]
    for section in sections:
        parts += [f"## {_inline(section.title)}", *_markdown(section.blocks)]
    return "\n\n".join(parts) + "\n"


def _visible(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cs":
        return "\N{REPLACEMENT CHARACTER}"
    hidden = category in ("Cc", "Zl", "Zp") and character not in "\n\t"
    return f"⟨U+{ord(character):04X}⟩" if hidden or character in _TURNING else character


def _markdown(blocks: list[Block]) -> list[str]:
    parts = []
    shown = [block for block in blocks if block.kind == "sample"][:_SAMPLES_IN_MARKDOWN]
    for block in blocks:
        if isinstance(block, Prose):
            parts += [_inline(sentence) for sentence in block.sentences]
        elif isinstance(block, Bullets):
            lines = [f"- {_inline(sentence)}" for sentence in block.sentences]
            parts += [f"**{_inline(block.title)}**", "\n".join(lines)]
        elif isinstance(block, Table):
            parts.append(_table(block))
        elif isinstance(block, Sample) and block in shown:
            parts += _sample(block)
        elif isinstance(block, Command):
            parts.append(f"```bash\n{visible(block.text)}\n```")
        elif isinstance(block, Fold):
            parts += [f"### {_inline(block.title)}", *_markdown(block.blocks)]
    return parts


def _table(table: Table) -> str:
    lines = [
        "| " + " | ".join(map(_inline, table.columns)) + " |",
        "|---|" + "---:|" * (len(table.columns) - 1),
    ]
    for row in table.rows:
        cells = []
        for cell in row:
            detail = f"({cell.detail})" if cell.detail else ""
            cells.append(_inline(" ".join(filter(None, [cell.text, detail, cell.marked]))))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _sample(sample: Sample) -> list[str]:
    parts = [f"**{_inline(sample.title)}**"]
    if sample.prompt:
        parts += ["Prompt:", fenced(visible(sample.prompt))]
    if sample.reference is not None:
        parts += ["Right answer:", fenced(visible(sample.reference))]
    for reply in sample.replies:
        about = f" ({_inline(reply.about)})" if reply.about else ""
        parts += [f"{_inline(reply.model)}{about}:", fenced(visible(reply.text))]
    return parts


def _inline(text: str) -> str:
    """A text on one line of Markdown, where none of it is read as markup."""
    text = " ".join(visible(text).split())
    text = re.sub(r"([\\`*|<>\[\]~&])", r"\\\1", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # within a word it is no markup
    return re.sub(r"^([#+-]|\d+[.)])(?=\s)", r"\\\1", text)
