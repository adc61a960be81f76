"""The import rule: cluster <- actors, rewards <- learner; ray under cluster/ alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "cluster": {"cluster"},
    "actors": {"cluster", "actors"},
    "rewards": {"cluster", "rewards"},
    "learner": {"cluster", "actors", "rewards", "learner"},
}
FILES = [(room, file) for room in ALLOWED for file in sorted((ROOT / room).rglob("*.py"))]


def imported_modules(source: str) -> set[str]:
    """Every module that a source text imports, wherever in the file."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer they reach"
            modules.add(node.module or "")
    return modules


def breaches(room: str, source: str) -> list[str]:
    tops = {module.split(".")[0] for module in imported_modules(source)}
    found = sorted(top for top in tops & ALLOWED.keys() if top not in ALLOWED[room])
    return found + (["ray"] if "ray" in tops and room != "cluster" else [])


@pytest.mark.parametrize(
    ("room", "file"), FILES, ids=[str(file.relative_to(ROOT)) for _, file in FILES]
)
def test_imports_point_one_way(room: str, file: Path) -> None:
    assert breaches(room, file.read_text()) == []


@pytest.mark.parametrize(
    ("room", "source", "found"),
    [
        ("actors", "import rewards.clip", ["rewards"]),
        ("cluster", "def f():\n    from learner.loop import train", ["learner"]),
        ("learner", "import ray", ["ray"]),
        ("rewards", "from ray.util import metrics", ["ray"]),
        ("cluster", "import ray", []),
    ],
)
def test_the_test_sees_a_breach(room: str, source: str, found: list[str]) -> None:
    assert breaches(room, source) == found


def test_messages_carry_neither_torch_nor_ray() -> None:
    modules = imported_modules((ROOT / "cluster" / "messages.py").read_text())
    assert not {module.split(".")[0] for module in modules} & {"torch", "ray"}
