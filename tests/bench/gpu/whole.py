"""Checks 6 and 12: whole iterations."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from cluster.fleet import InlineFleet
from learner.fleet_plan import fleet_plan
from learner.loop import Iteration
from tests.bench import iteration as bench
from tests.bench.gpu.scene import Scene
from tests.small_run import run_training, small_config

GPUS = {"learner": 0.4, "sampler": 0.3, "reward": 0.3}
"""Fractions of one card."""


def iteration(scene: Scene) -> None:
    """`paper-fixed` with random weights and small scorers: seconds of each phase, images/s."""
    device = "cuda" if scene.on_gpu else "cpu"
    small = {"width": 32, "grid": 4, "groups": 1, "rollouts": 2, "microbatch": 2}
    changes: dict[str, Any] = small if scene.tiny else {}
    options = bench.Options(
        preset="paper-fixed", iterations=1, threads=scene.threads, device=device, **changes
    )
    config = bench.configured(options, scene.folder(), scene.device)
    phases, whole = bench.measure(config, scene.device)
    for name, seconds in phases.items():
        scene.figure(f"iteration_{name}_s", seconds)
    count = config.groups_per_iteration * config.rollouts_per_group
    scene.figure("iteration_s", whole)
    scene.figure("iteration_images_per_s", count / whole)
    scene.figure("iteration_peak_gb", bench.peak_memory(scene.device) / 1e9)


def miniature(scene: Scene) -> None:
    """The miniature on the device against the CPU, in one process; and, where Ray is installed, on
    the one card under Ray with fractional roles."""
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

    with RaySession(config.ray), RayFleet(fleet_plan(config)) as fleet:
        return run_training(config, fleet)
