"""The pages against the code: links, commands, options, files and names on them; README's
claims, each with its command."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from cluster.own_packages import NAMES
from tests.file_rows import marks, rows

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
)
HISTORY = "CHANGELOG.md"  # names things that are gone
FOLDERS = [f"{name}/README.md" for name in NAMES]
FOREIGN = "learner/coming-from-the-public-code.md"  # names another repository's files
HELP = {  # command -> arguments that list all of its options
    "learner.run": [["--help-all"]],
    "learner.plan": [["--help-all"]],
    "learner.evaluate": [["--help-all"]],
    "learner.report": [["--help"]],
    "learner.rollouts": [["--help-all"]],
    "learner.replay": [["--help-all"]],
    "learner.miniature.arms": [["--help"]],
    "learner.miniature.build": [["--help"]],
    "learner.miniature.page": [["--help"]],
    "actors.sample": [["--help-all"]],
    "actors.captions": [["--help"]],
    "actors.weights": [[c, "--help"] for c in ("list", "fetch", "convert", "export")],
    "rewards.reference": [["--help-all"], ["fetch", "--help"]],
    "cluster.status": [["--help"]],
    "cluster.scale": [["--help"]],
    "cluster.stop": [["--help"]],
    "cluster.deploy.nodes": [["--help"]],
    "cluster.deploy": [[target, "--help"] for target in ("kuberay", "slurm", "ray-up")],
}
OTHERS = {"--signal", "--slow", "--parity-data", "--help-all", "--stats", "--array", "--build-arg",
          "--shm-size"}  # fmt: skip
"""Options on the pages that no help shows: of Slurm, Docker, pytest, the public code."""
BENCHES = "tests/bench/README.md"  # their options are argparse's, and in no help above
WRITTEN = ("gallery", "evaluation", "checkpoints", "rollouts", "runs", "train", "test", "snapshots")
"""Folders on the pages that are not the repository's: of runs, and of users' images."""
OPTION = re.compile(r"(?<![\w-])--[a-z][\w.-]*\w")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def fenced(page: str) -> list[str]:
    """Its fenced blocks."""
    return re.findall(r"^```\w*\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def blocks(page: str) -> list[str]:
    """Fenced and indented blocks, continued lines joined."""
    indented = re.findall(r"^    \S.*$", prose(page), re.MULTILINE)
    return [re.sub(r"\\\n\s*", "", block) for block in (*fenced(page), *indented)]


def anchors(page: str) -> set[str]:
    """Of the page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page: str) -> Iterator[tuple[str, str]]:
    """Each `python -m MODULE ...` on the page: the module, and the rest of its line."""
    spans = re.findall(r"`([^`\n]+)`", prose(page))
    for line in "\n".join([*blocks(page), *spans]).splitlines():
        for found in re.finditer(r"python -m ([\w.]+)([^#|;]*)", line):
            yield found[1], found[2]


@cache
def options(module: str) -> frozenset[str]:
    """Every option in a command's help."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "250")
        main = importlib.import_module(module).main
        for arguments in HELP[module]:
            with (
                contextlib.redirect_stdout(shown),
                contextlib.redirect_stderr(shown),
                contextlib.suppress(SystemExit),
            ):
                main(arguments)
    return frozenset(OPTION.findall(shown.getvalue())) | {"--help"}


@cache
def options_of_ray() -> frozenset[str]:
    """Every option of `ray start` and `ray job submit`."""
    from ray.dashboard.modules.job.cli import submit
    from ray.scripts.scripts import start

    return frozenset(name for command in (start, submit) for p in command.params for name in p.opts)


def test_the_pages_are_found() -> None:
    assert {"README.md", "CONTRIBUTING.md", HISTORY, FOREIGN, *FOLDERS} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            name = str(target.resolve().relative_to(ROOT))
            assert anchor in anchors(name), f"{page}: {link}; there are {sorted(anchors(name))}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != HISTORY])
def test_every_command_exists_with_its_options(page: str) -> None:
    for module, rest in commands(page):
        if module.partition(".")[0] not in (*NAMES, "tests") or module.endswith(".NAME"):
            continue
        assert importlib.util.find_spec(module.rstrip(".")), f"{page}: python -m {module}"
        if module in HELP:
            unknown = set(OPTION.findall(rest)) - options(module)
            assert not unknown, f"{page}: python -m {module} has no {unknown}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in (HISTORY, FOREIGN, BENCHES)]
)
def test_every_option_in_the_text_exists(page: str) -> None:
    known = options_of_ray().union(OTHERS, *(options(module) for module in HELP))
    spans = re.findall(r"`(--[^`\n]+)`", prose(page))
    named = {option for span in spans for option in OPTION.findall(span)}
    unknown = named - known
    assert not unknown, page


@pytest.mark.parametrize("page", [page for page in PAGES if page != HISTORY])
def test_blocks_fit_on_a_screen(page: str) -> None:
    long = [line for block in fenced(page) for line in block.splitlines() if len(line) > 100]
    assert not long


@pytest.mark.parametrize("page", [page for page in PAGES if page not in (HISTORY, FOREIGN)])
def test_every_file_that_is_named_exists(page: str) -> None:
    """By a path from the page's folder or the repository's, or by a name somewhere below."""
    folder = (ROOT / page).parent
    for name in re.findall(r"`((?:\w+/)*\w+\.py|(?:\w+/)+)`", prose(page)):
        at = [folder / name, ROOT / name]
        somewhere = [] if "/" in name else list(folder.rglob(name))
        written = name.startswith("my_") or "NAME" in name or name.split("/")[0] in WRITTEN
        assert written or somewhere or any(path.exists() for path in at), f"{page}: {name}"


@pytest.mark.parametrize("page", FOLDERS)
def test_every_room_is_in_its_table(page: str) -> None:
    section = text_of(page).split("## Where to look", 1)[1].split("\n| to find", 1)[0]
    first_cells = re.findall(r"^\| (.+?) \|", section, re.MULTILINE)
    named = {room for cell in first_cells for room in re.findall(r"`(\w+)/`", cell)}
    folder = (ROOT / page).parent
    rooms = {path.parent.relative_to(folder).parts[0] for path in folder.glob("*/**/*.py")}
    assert rooms <= named, f"{page} lacks {rooms - named}"


@pytest.mark.parametrize("page", FOLDERS)
def test_what_may_be_imported_can_be(page: str) -> None:
    listed = text_of(page).split("To import in your own code:", 1)[1].split("\n\n", 1)[0]
    found = re.findall(r"((?:`\w+`(?:,\s+|\s+and\s+)?)+)\s*of\s+`([a-z_.]+)`", listed)
    assert found
    for names, module in found:
        for name in re.findall(r"\w+", names):
            assert hasattr(importlib.import_module(module), name), f"{page}: {module}.{name}"


@pytest.mark.parametrize("page", ["actors/README.md", "rewards/README.md"])
def test_every_kind_of_file_that_is_read_has_a_test(page: str) -> None:
    assert sorted(set(rows(page))) == sorted(set(marks(page)))
    assert len(set(rows(page))) == len(rows(page)), "a row twice"


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
                its_marks = [*of_file, *map(ast.unparse, node.decorator_list)]
                found.append(not any(mark.endswith((".slow", ".gpu")) for mark in its_marks))
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
