"""Run the parity tests and write what they measured into ``docs/strategies.md``.

    python -m tests.strategies.parity_table
    python -m tests.strategies.parity_table -k "sft and fsdp2" --to table.md

The table stands between two comments of the file; a file without them gets them at its end. A case
that has failed is shown as that, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BEGIN = "<!-- parity table: written by python -m tests.strategies.parity_table -->"
END = "<!-- end of the parity table -->"
COLUMNS = ("loss", "norm", "weights")
HEADINGS = ("loss", "gradient norm", "weights")


class Collector:
    """A pytest plugin that keeps what the tests of parity measured.

    Attributes:
        rows: Of each case (variant, recipe, strategy) the largest differences, or None where the
            test has failed.
    """

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str], dict[str, float] | None] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Take over what a test has recorded."""
        if report.when != "call":
            return
        kept = dict(report.user_properties)
        if "case" in kept:
            self.rows[kept["case"]] = kept.get("differences") if report.passed else None


def table(rows: dict[tuple[str, str, str], dict[str, float] | None]) -> str:
    """One Markdown table: a line for each recipe and strategy, columns for each precision."""
    cells: dict[tuple[str, str], dict[str, list[str]]] = {}
    for (variant, recipe, strategy), found in rows.items():
        precision, _, what = variant.partition(", ")
        special = precision == "fp32" and what  # of half precision it is always the same
        line = cells.setdefault((f"{recipe}, {what}" if special else recipe, strategy), {})
        line[precision] = ["failed" if found is None else f"{found[name]:.1e}" for name in COLUMNS]
    precisions = list(dict.fromkeys(name for line in cells.values() for name in line))
    headings = [f"{name}: {what}" for name in precisions for what in HEADINGS]
    lines = [
        f"| recipe | strategy | {' | '.join(headings)} |",
        "|---|---|" + "---:|" * len(headings),
    ]
    for (recipe, strategy), line in cells.items():
        values = [v for name in precisions for v in line.get(name, ["–"] * len(COLUMNS))]
        lines.append(f"| {recipe} | {strategy} | {' | '.join(values)} |")
    return "\n".join(lines)


def put(path: Path, text: str) -> None:
    """Write a text between the two comments of a file."""
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    if BEGIN not in page:
        page = f"{page.rstrip()}\n\n{BEGIN}\n{END}\n".lstrip()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main(args: Iterable[str] | None = None) -> int:
    """Run the tests, write the table, and say whether all have passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "strategies.md")
    parser.add_argument("-k", default="", help="Only these tests, as pytest selects them.")
    given = parser.parse_args(None if args is None else list(args))
    collector = Collector()
    tests = str(Path(__file__).with_name("test_parity.py"))
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--show-capture=no",
        "--tb=short",
        "--thorough",
        "-k",
        given.k,
    ]
    code = pytest.main([*options, tests], plugins=[collector])
    if collector.rows:
        put(given.to, table(collector.rows))
        print(f"wrote {given.to}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
