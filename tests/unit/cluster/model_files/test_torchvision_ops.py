"""Whoever imports something that imports torchvision declares its operators first.

Beside a CPU-only torch, `import torchvision` fails without `cluster.model_files.torchvision_ops`;
whether it does depends on who came first in the process, so that other tests do not show it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
NEED_IT = {"open_clip", "timm", "torchvision", "transformers", "hpsv2", "peft"}
SHIM = "ensure_torchvision"
FILES = [
    file
    for folder in ("actors", "cluster", "learner", "rewards", "tests")
    for file in sorted((ROOT / folder).rglob("*.py"))
]


def unprepared(source: str) -> list[int]:
    """Lines that import one of them before the same function, or the module around it, has called
    the shim."""
    found: list[int] = []

    def walk(body: ast.AST, ready: bool) -> None:
        nested: list[ast.AST] = []
        nodes = list(ast.iter_child_nodes(body))
        while nodes:
            node = nodes.pop(0)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                nested.append(node)
                continue
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == SHIM:
                ready = True
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            imports = isinstance(node, ast.Import | ast.ImportFrom)
            if imports and not ready and {name.split(".")[0] for name in names} & NEED_IT:
                found.append(node.lineno)
            nodes[:0] = ast.iter_child_nodes(node)
        for function in nested:
            walk(function, ready)

    walk(ast.parse(source), False)
    return found


def test_the_shim_comes_first() -> None:
    found = {str(file.relative_to(ROOT)): unprepared(file.read_text("utf-8")) for file in FILES}
    breaches = {file: lines for file, lines in found.items() if lines}
    assert not breaches, f"call {SHIM}() in the function before the imports of these lines"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import timm", [1]),
        ("def f():\n    from torchvision import models", [2]),
        ("def f():\n    import open_clip\n    ensure_torchvision()", [2]),
        ("class A:\n    def f(self):\n        import open_clip.factory as factory", [3]),
        ("ensure_torchvision()\nimport timm\ndef f():\n    import timm", []),
        ("def f():\n    import timm\nensure_torchvision()", []),
        ("def f():\n    ensure_torchvision()\ndef g():\n    import timm", [4]),
    ],
)
def test_the_test_sees_a_breach(source: str, found: list[int]) -> None:
    assert unprepared(source) == found


def test_a_reward_may_import_torchvision(tmp_path: Path) -> None:
    """In a process of its own, where nobody has called the shim before."""
    (tmp_path / "mine.py").write_text("import torchvision\n\ndef make(device):\n    return max\n")
    text = (
        "from rewards.scorers.user_rewards import load_user_reward, parse_user_reward\n"
        f"load_user_reward(parse_user_reward({str(tmp_path / 'mine.py')!r} + ':make=1'), 'cpu')\n"
    )
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
