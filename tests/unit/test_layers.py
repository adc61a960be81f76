"""The import rules: cluster <- actors, rewards <- learner; ray under cluster/ alone; between rooms
(sub-packages and modules at the top of a package) one way; no cycles; limits of size."""

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
PRIVATE = ROOT / "cluster" / "ray_session" / "private.py"
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
        ("actors", "import rewards.scorers.clip", ["rewards"]),
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


# Rooms: rules between them.
MOST_FILES, MOST_LINES, LONGEST_FUNCTION = 16, 400, 60
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for _, file in FILES
}
FORBIDDEN = {
    # room -> what it must not reach, directly or through others
    "actors.kernels": {"actors.models", "actors.decoding"},
    "learner.grpo": {"learner.config", "learner.training", "learner.data"},
    "learner.data": {"learner.config", "learner.training"},
    "learner.training": {"learner.config", "learner.monitoring", "learner.checkpoints"},
    "cluster.scheduling": {"ray", "cluster.ray_session", "cluster.ray_backend", "cluster.control"},
    "cluster.placement": {"ray", "torch", "cluster.roles", "cluster.scheduling"},
    "cluster.control": {"cluster.ray_backend"},
    "cluster.ray_session": {"cluster.control", "cluster.ray_backend"},
    "cluster.io": {"ray", "torch"},
    "rewards.distribution": {"rewards.reference", "rewards.servers", "rewards.config"},
}


def imported_names(source: str) -> set[str]:
    """Every module that a source text imports, `from package import module` included."""
    names = set(imported_modules(source))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(module: str) -> str:
    """cluster.io.files -> cluster.io; a module at the top of its package is its own room."""
    return ".".join(module.split(".")[:2])


def graph_of(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> the modules among these, and packages of others, that it imports."""
    graph = {}
    for module, source in sources.items():
        found = imported_names(source)
        ours = {name for name in found if name in sources and name != module}
        graph[module] = ours | ({name.split(".")[0] for name in found} & {"ray", "torch"})
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other."""
    reach = {node: reached(graph, node) for node in graph}
    found = {
        tuple(sorted({node} | {each for each in reach[node] if node in reach.get(each, ())}))
        for node in graph
        if node in reach[node]
    }
    return [list(each) for each in sorted(found)]


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """Every node on a path from `start`; `start` itself only where it is on a cycle."""
    seen: set[str] = set()
    left = list(graph[start])
    while left:
        node = left.pop()
        if node not in seen:
            seen.add(node)
            left += graph.get(node, ())
    return seen


def between_rooms(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    rooms: dict[str, set[str]] = {}
    for module, targets in graph.items():
        room = room_of(module)
        rooms.setdefault(room, set()).update({room_of(each) for each in targets} - {room})
    return rooms


def room_breaches(graph: dict[str, set[str]]) -> list[str]:
    rooms = between_rooms(graph)
    return [
        f"{room} reaches {', '.join(sorted(found))}"
        for room, forbidden in FORBIDDEN.items()
        if room in rooms and (found := reached(rooms, room) & forbidden)
    ]


GRAPH = graph_of({module: file.read_text() for module, file in MODULES.items()})


def test_no_modules_import_each_other() -> None:
    assert cycles(GRAPH) == []


def test_imports_between_rooms_point_one_way() -> None:
    rooms = between_rooms(GRAPH)
    assert len(rooms) > 40  # it sees them
    assert cycles(rooms) == []


def test_rooms_keep_their_rules() -> None:
    named = FORBIDDEN.keys() | set().union(*FORBIDDEN.values())
    assert named - {"ray", "torch"} <= between_rooms(GRAPH).keys()  # none was renamed
    assert room_breaches(GRAPH) == []


@pytest.mark.parametrize(
    ("sources", "looped", "broken"),
    [
        ({"a.x.m": "import a.y.n", "a.y.n": "def f():\n    from a.x import m"}, 1, []),
        ({"a.x.m": "import a.y.n", "a.y.n": "import a.x.other", "a.x.other": ""}, 1, []),
        ({"a.x.m": "from a.y.n import f", "a.y.n": ""}, 0, []),
        (
            {"learner.grpo.loss": "import learner.other", "learner.other": "import learner.config",
             "learner.config": ""},
            0,
            ["learner.grpo reaches learner.config"],
        ),
        ({"cluster.scheduling.pool": "def f():\n    import ray"}, 0,
         ["cluster.scheduling reaches ray"]),
    ],
)  # fmt: skip
def test_the_test_sees_cycles_and_broken_rules(
    sources: dict[str, str], looped: int, broken: list[str]
) -> None:
    graph = graph_of(sources)
    assert len(cycles(between_rooms(graph))) == looped
    assert room_breaches(graph) == broken


def test_no_room_no_file_and_no_function_is_too_large() -> None:
    folders: dict[Path, int] = {}
    tests = (ROOT / "tests").rglob("*.py")
    for file in [*(file for _, file in FILES), *tests]:
        folders[file.parent] = folders.get(file.parent, 0) + 1
    assert {str(each): count for each, count in folders.items() if count > MOST_FILES} == {}
    lengths = {str(file): len(file.read_text().splitlines()) for _, file in FILES}
    assert {file: lines for file, lines in lengths.items() if lines > MOST_LINES} == {}
    functions = {
        f"{file}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for _, file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in functions.items() if lines > LONGEST_FUNCTION} == {}


def test_every_room_says_what_it_is_for() -> None:
    for folder in {file.parent for _, file in FILES}:
        if folder.name not in ("entry", "tessera_rl"):
            assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def before_main(source: str) -> list[str]:
    """What a program imports before it starts `run_command`, which other imports would delay."""
    found: list[str] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.If) and "run_command" in ast.unparse(node):
            return found
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(ast.unparse(node))
    return ["from __future__ import annotations"]  # it starts none


def test_programs_import_nothing_before_they_start() -> None:
    for _, file in FILES:
        assert before_main(file.read_text()) == ["from __future__ import annotations"], file
    late = "if __name__ == '__main__':\n    from cluster.program.start import run_command"
    assert before_main(f"import json\n{late}") == ["import json"]
