"""What an install brings: every file that is read at run time; and the bounds on what it needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cluster.own_packages import NAMES

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
READ_BY_PEOPLE = ("README.md", "DESIGN.md", "results/", "deploy/examples/")
"""Of what the packages hold, the only things that no program reads."""


def tracked(*folders: str) -> set[str]:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--", *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(filter(None, listing.stdout.split("\0")))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files of a wheel, built from tracked files alone."""
    copy = tmp_path_factory.mktemp("tracked")
    for name in tracked(*NAMES, "pyproject.toml", "README.md", "LICENSE"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('out'))"
    built = subprocess.run(
        [sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0, built.stdout + built.stderr
    with zipfile.ZipFile(copy / "out" / built.stdout.split()[-1]) as archive:
        return set(archive.namelist())


def test_the_wheel_has_every_file_that_is_read(wheel: set[str]) -> None:
    files = {name for name in tracked(*NAMES) if not any(kept in name for kept in READ_BY_PEOPLE)}
    entry = "cluster/entry/"
    expected = {name.removeprefix(entry) for name in files}
    assert len(expected) > 180
    assert any(name.endswith("preference/vocabulary.txt.gz") for name in expected)
    assert expected - wheel == set()


def test_the_wheel_has_nothing_else(wheel: set[str]) -> None:
    tops = {name.partition("/")[0] for name in wheel}
    assert tops - {*NAMES, "tessera_rl"} == {f"tessera_rl-{PROJECT['version']}.dist-info"}
    assert not [name for name in wheel if name.startswith("cluster/entry")]


REQUIREMENTS = [
    Requirement(line)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in group
]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_dependency_has_a_lower_and_an_upper_bound(requirement: Requirement) -> None:
    operators = {bound.operator for bound in requirement.specifier}
    pinned = operators == {"=="}
    assert pinned or operators == {">=", "<"}, f"{requirement}: found {operators or 'no bound'}"


def test_python_is_what_the_classifiers_say() -> None:
    named = [line for line in PROJECT["classifiers"] if ":: Python :: 3." in line]
    minors = sorted(int(line.rpartition(".")[2]) for line in named)
    assert PROJECT["requires-python"] == f">=3.{minors[0]},<3.{minors[-1] + 1}"
    nightly = (ROOT / ".github" / "workflows" / "nightly.yml").read_text()
    assert all(f'"3.{minor}"' in nightly for minor in minors)
