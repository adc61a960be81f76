"""Check 1: the tests that are marked gpu."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

from tests.bench.gpu.scene import Scene, SkippedError
from tests.bench.gpu.supervisor import ROOT

MARK = "pytest.mark.gpu"
COUNT = re.compile(r"(\d+) (passed|failed|skipped|error)")
FIRST = "tests/unit/actors/decoding/test_steps.py"


def marked_tests(scene: Scene) -> None:
    """Run every file with such a test in a process of its own."""
    if importlib.util.find_spec("pytest") is None:
        raise SkippedError("the package pytest is not installed")
    files = [str(file) for file in marked_files()]
    if scene.tiny:
        files = [FIRST]
    options = ["-m", "gpu", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist"]
    # Not the project's settings: they name plugins that a borrowed machine may lack.
    settings = ["-c", os.devnull, "--rootdir", str(ROOT)]
    call = [sys.executable, "-m", "pytest", *settings, *options, "--tb=short", *files]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, check=False)
    lines = done.stdout.splitlines()
    counts = {kind: int(number) for number, kind in COUNT.findall(lines[-1] if lines else "")}
    if not counts:
        raise RuntimeError("\n".join([*lines[-8:], *done.stderr.splitlines()[-8:]]))
    bad = counts.get("failed", 0) + counts.get("error", 0)
    scene.figure("tests_passed", counts.get("passed", 0))
    scene.figure("tests_failed", bad)
    if bad:
        for line in lines[-30:]:
            scene.note(line)


def marked_files() -> list[str]:
    """Files of the unit tests that hold a test marked gpu."""
    found = (ROOT / "tests" / "unit").rglob("test_*.py")
    return sorted(str(file.relative_to(ROOT)) for file in found if MARK in file.read_text())
