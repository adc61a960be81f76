"""The import rule: cluster <- actors, rewards <- learner; ray under cluster/ alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "cluster": {"cluster"},
    "actors": {"cluster", "actors"},
    "rewards": {"cluster", "rewards"},
    "learner": {"cluster", "actors", "rewards", "learner"},
}
RAY_OPTIONS = {"_temp_dir", "_node_ip_address", "_system_config", "_metrics_export_port",
               "_memory", "_owner", "_metadata", "_enable_object_reconstruction"}  # fmt: skip
PRIVATE = ROOT / "cluster" / "ray_private.py"
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


def unpromised_names(source: str) -> list[str]:
    """What a source text uses of Ray that Ray does not promise to keep: private and experimental
    modules, names and attributes, and options with a leading underscore."""
    found, modules = [], set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            modules.add(ast.unparse(node))
            if node.attr.startswith(("__ray_", "_ray_", "_actor_", "_method_")):
                found.append(node.attr)
        elif isinstance(node, ast.Call) and _of_ray(node.func):
            found += [word.arg for word in node.keywords if (word.arg or "").startswith("_")]
        elif isinstance(node, ast.Constant) and node.value in RAY_OPTIONS:
            found.append(str(node.value))
    private = re.compile(r"ray\.(.*\.)?(_|experimental\b)")
    return sorted({*found, *filter(private.match, modules)})


def _of_ray(function: ast.expr) -> bool:
    return ast.unparse(function).startswith("ray.")


@pytest.mark.parametrize(
    "file", [file for _, file in FILES if file != PRIVATE], ids=lambda f: str(f.relative_to(ROOT))
)
def test_what_ray_does_not_promise_is_used_in_one_file(file: Path) -> None:
    found = unpromised_names(file.read_text())
    assert not found, f"{file.name} uses {found}: put it into {PRIVATE.name}, and test it there"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from ray._private import services", ["ray._private.services"]),
        ("import ray._raylet", ["ray._raylet"]),
        ("from ray import _raylet", ["ray._raylet"]),
        ("ray._private.worker.global_worker", ["ray._private", "ray._private.worker",
         "ray._private.worker.global_worker"]),
        ("from ray.experimental.collective import x", ["ray.experimental.collective.x"]),
        ("import ray.util.state._private as x", ["ray.util.state._private"]),
        ("handle.__ray_call__.remote(f)", ["__ray_call__"]),
        ("handle._actor_id.hex()", ["_actor_id"]),
        ("ray.init(_temp_dir=x)", ["_temp_dir"]),
        ("ray.init(**{'_temp_dir': x})", ["_temp_dir"]),
        ("options['_node_ip_address'] = x", ["_node_ip_address"]),
        ("ray.get(ref, timeout=1); self._actor.remote(); x.ray._y", []),
    ],
)  # fmt: skip
def test_the_test_sees_what_ray_does_not_promise(source: str, found: list[str]) -> None:
    assert unpromised_names(source) == found
