"""README's table of claims: its commands exist, and CI runs those that it says CI runs."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLOW, NOT_RUN = "slow", "**not run**"


def claims() -> list[tuple[str, str, str]]:
    """Claim, command, and the last column."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    section = page.split("## What shows it", 1)[1].split("\n## ", 1)[0]
    lines = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("|")]
    assert all(len(line) == 3 for line in lines), lines
    return [(line[0].strip(), line[1].strip(), line[2].strip()) for line in lines[2:]]


CLAIMS = claims()
TESTED = [(command.strip("`"), last) for _, command, last in CLAIMS if "`pytest " in command]
RUN = [run for _, command, _ in CLAIMS for run in re.findall(r"`(python [^`]+)`", command)]


def run_by_ci(path: Path) -> list[bool]:
    """Of each test below a path: has it no mark that CI leaves out?"""
    found = []
    for file in sorted(path.rglob("test_*.py")) if path.is_dir() else [path]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        of_file = [ast.unparse(node.value) for node in tree.body if isinstance(node, ast.Assign)
                   and ast.unparse(node.targets[0]) == "pytestmark"]  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = [*of_file, *map(ast.unparse, node.decorator_list)]
                found.append(not any(mark.endswith((".slow", ".gpu")) for mark in marks))
    return found


def test_there_is_a_command_for_every_claim() -> None:
    assert len(CLAIMS) > 10
    assert {command[0] for _, command, _ in CLAIMS} <= {"`", "["}
    without = [claim for claim, command, last in CLAIMS if command[0] == "[" and last != NOT_RUN]
    assert not without


@pytest.mark.parametrize(("command", "last"), TESTED)
def test_its_tests_exist_and_are_run(command: str, last: str) -> None:
    """Every path holds tests; CI runs some of each, or the row says that they are slow."""
    words = shlex.split(command)[1:]
    paths = [ROOT / word for word in words if not word.startswith("-")]
    assert paths
    for path in paths:
        by_ci = run_by_ci(path)
        assert by_ci, f"{path} has no tests"
        assert any(by_ci) != last.startswith(SLOW), (path, last)
    assert ("--slow" in words) == last.startswith(SLOW)


@pytest.mark.parametrize("command", RUN)
def test_its_command_is_one(command: str) -> None:
    """Options are parsed by the command itself; nothing is started."""
    python, m, module, *options = shlex.split(command)
    assert (python, m) == ("python", "-m")
    if "--results" in options:  # of what the command before it has written
        assert importlib.util.find_spec(module)
    elif module.startswith("learner."):
        assert importlib.import_module(module).main([*options, "--dry-run"]) == 0
    else:
        assert importlib.util.find_spec(module), "tests/unit/test_benches.py runs it"
