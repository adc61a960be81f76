"""The tables "Files that are read" of the folder READMEs, and the tests that stand for their rows.

`@reads("rewards/README.md", "torch-fidelity `.pt`")` on a test says: this test reads such a file.
`tests/unit/test_pages.py` compares the marks with the tables: no row without a test, no mark
without a row.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parents[1]
HEADING = "## Files that are read"

F = TypeVar("F", bound=Callable[..., object])


def reads(page: str, row: str) -> Callable[[F], F]:
    """Marks a test: it reads a file of the kind in `row`, the first cell of a row of `page`."""
    del page, row  # read from the source by `marks`
    return lambda test: test


def rows(page: str) -> list[str]:
    """First cells of the table of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert HEADING in text, f"{page}: no {HEADING!r}"
    section = text.split(HEADING, 1)[1].split("\n## ", 1)[0]
    lines = [line.strip() for line in section.splitlines() if line.lstrip().startswith("|")]
    return [line.strip("|").split(" | ")[0].strip() for line in lines[2:]]


def marks(page: str) -> list[str]:
    """Rows of a page that tests stand for."""
    found: list[str] = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "reads":
                    given = [ast.literal_eval(argument) for argument in call.args]
                    if given[0] == page:
                        assert node.name.startswith("test_"), f"{file}: {node.name} is no test"
                        found.append(given[1])
    return found
