"""Checks 1, 6 and 12: the tests marked gpu, and whole iterations."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.bench.gpu.scene import Scene, SkippedError
from tests.bench.gpu.supervisor import ROOT

if TYPE_CHECKING:  # a run's packages may be missing, which the tests do not need
    from learner.loop import Iteration

MARKS = ("pytest.mark.gpu", "helpers import DEVICES")
COUNT = re.compile(r"(\d+) (passed|failed|skipped|error)")
TESTS_S = 120.0  # longest time of the tests, below the check's limit
FIRST = "tests/unit/actors/decoding/test_steps.py"
GPUS = {"learner": 0.4, "sampler": 0.3, "reward": 0.3}
"""Fractions of one card."""


def iteration(scene: Scene) -> None:
    """`paper-fixed` with random weights and small scorers: seconds of each phase, images/s."""
    from tests.bench import iteration as bench

    device = "cuda" if scene.on_gpu else "cpu"
    small = {"width": 32, "grid": 4, "groups": 1, "rollouts": 2, "microbatch": 2}
    changes: dict[str, Any] = small if scene.tiny else {}
    options = bench.Options(
        preset="paper-fixed", iterations=1, threads=scene.threads, device=device, **changes
    )
    config = bench.configured(options, scene.folder(), scene.device)
    phases, whole, _ = bench.measure(config, scene.device)
    for name, seconds in phases.items():
        scene.figure(f"iteration_{name}_s", seconds)
    count = config.groups_per_iteration * config.rollouts_per_group
    scene.figure("iteration_s", whole)
    scene.figure("iteration_images_per_s", count / whole)
    scene.figure("iteration_peak_gb", bench.peak_memory(scene.device) / 1e9)


def miniature(scene: Scene) -> None:
    """The miniature on the device against the CPU, in one process; and, where Ray is installed, on
    the one card under Ray with fractional roles."""
    from cluster.fleet import InlineFleet
    from learner.fleet_plan import fleet_plan
    from tests.small_run import run_training, small_config

    less = {
        "iterations": 1,
        "groups_per_iteration": scene.size(4, 1),
        "rewards": {"loo_fid": {"seed_images": scene.size(40, 8)}},
    }
    on_cpu = small_config(**less)
    num_gpus = GPUS if scene.on_gpu else dict.fromkeys(GPUS, 0)
    shares = {role: {"num_gpus": share} for role, share in num_gpus.items()}
    config = small_config(**less, **shares)
    here = run_training(on_cpu, InlineFleet(fleet_plan(on_cpu)))
    inline = run_training(config, InlineFleet(fleet_plan(config)))
    compare(scene, "inline", inline, here)
    if scene.tiny:
        return
    if importlib.util.find_spec("ray") is None:
        scene.note("not run under Ray, which is not installed")
        return
    compare(scene, "ray", under_ray(config), inline)


def compare(scene: Scene, name: str, found: list[Iteration], expected: list[Iteration]) -> None:
    """The first iteration: later ones follow from it, and rounding grows."""
    one, other = found[0], expected[0]
    tokens, entropies = (
        [np.stack([getattr(group.rollouts, field) for group in run.groups]) for run in (one, other)]
        for field in ("tokens", "entropies")
    )
    scene.figure(f"miniature_{name}_tokens_same", np.mean(tokens[0] == tokens[1]))
    gap = np.abs(entropies[0] - entropies[1]).mean()
    scene.figure(f"miniature_{name}_entropy_gap", gap)


def under_ray(config: Any) -> list[Iteration]:
    from cluster.ray_backend.fleet import RayFleet
    from cluster.ray_session.session import RaySession
    from learner.fleet_plan import fleet_plan
    from tests.small_run import run_training

    with RaySession(config.ray) as session, RayFleet(fleet_plan(config), session) as fleet:
        return run_training(config, fleet)


def marked_tests(scene: Scene) -> None:
    """Run the files with such a test, all in one process beside the worker."""
    if importlib.util.find_spec("pytest") is None:
        raise SkippedError("the package pytest is not installed")
    files = [FIRST] if scene.tiny else marked_files()
    options = ["-m", "gpu", "-v", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options.append("--continue-on-collection-errors")  # of a file that needs a missing package
    # Not the project's settings: they name plugins that a borrowed machine may lack.
    settings = ["-c", os.devnull, "--rootdir", str(ROOT)]
    call = [sys.executable, "-m", "pytest", *settings, *options, "--tb=short", *files]
    try:
        done = subprocess.run(
            call, capture_output=True, text=True, cwd=ROOT, check=False, timeout=TESTS_S
        )
    except subprocess.TimeoutExpired as late:
        told = late.stdout or b""
        told = told if isinstance(told, str) else told.decode(errors="replace")
        raise RuntimeError(f"longer than {TESTS_S:g} s; so far:\n{told[-1800:]}") from None
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
    marked = (file for file in found if any(mark in file.read_text() for mark in MARKS))
    return sorted(str(file.relative_to(ROOT)) for file in marked)
