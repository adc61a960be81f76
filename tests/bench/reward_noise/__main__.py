"""Signal to noise of leave-one-out FID rewards: by batch, window, covariance and drift.

python -m tests.bench.reward_noise            completes results.csv (6 minutes of CPU from nothing)
python -m tests.bench.reward_noise --page     writes the tables of rewards/window-and-batch.md

Parts: `arithmetic` (every combination; `population_...`: figures of rewards with an infinite,
current history, the best that a covariance can do), `simulation` (histories sampled; D = 256
widely, 2,048 where it decides), and `plan` (seconds of an iteration by number of GPUs). The random
numbers of a row belong to its settings, so an interrupted command goes on where it was, with the
same rows.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
import tyro
from threadpoolctl import threadpool_limits

from learner.plan import main as plan
from rewards.distribution.diagnostics import bias_constant
from rewards.distribution.moments import Moments
from rewards.distribution.reference import distance_to_reference
from tests.bench.reward_noise.arithmetic import AGES, Arithmetic, populations
from tests.bench.reward_noise.mixture import CLASSES, Mixture, faults_at, generator
from tests.bench.reward_noise.page import write_page
from tests.bench.reward_noise.results import RESULTS, Job, Results, Row
from tests.bench.reward_noise.simulation import (
    DIAGONAL,
    FULL,
    Scorer,
    Setting,
    Space,
    figures,
    simulated,
    spaces,
)

BATCHES = (144, 288, 576, 1152, 2048)
WINDOWS = (432, 1000, 1500, 2000, 3000, 5000, 7000, 10000, 15000, 20000, 30000, 50000)
RUNS = (0, 300, 100, 30)
"""Iterations in which the FID falls from the base's to the tuned policy's; 0: it stays."""
DECISIVE = (
    *((144, window, 0) for window in (432, 1000, 5000, 20000)),
    *((144, window, 100) for window in (2000, 20000)),
    (1152, 20000, 100),
    (2048, 5000, 0),
)
"""Batch, window, run: simulated at 2,048 dimensions."""
COMPARED = (FULL, DIAGONAL, Space("pca-256", dims=256), Space("pca-512", dims=512))
"""At 2,048 dimensions."""
OTHER_EXPONENTS = (0.7, 1.3)
WEAK = 0.5
"""Strength of faults of a better policy."""
SCORED = 432  # images for the statistics of a simulation, at least
GPUS = {1: (12, 12), 4: (24, 12), 8: (48, 12), 32: (96, 12), 64: (128, 16)}
"""GPUs -> groups of an iteration, rollouts of a group."""


@dataclass(frozen=True)
class Options:
    """Signal to noise of leave-one-out FID rewards."""

    out: Path = RESULTS
    """CSV; rows that it has are kept."""
    page: bool = False
    """Write the page's tables from the CSV, and compute nothing."""
    smallest: bool = False
    """A few rows in 24 dimensions, not written, to try the bench."""
    threads: int = 1


def main(options: Options) -> None:
    if options.page:
        write_page(Results.read(options.out))
        return
    torch.set_num_threads(options.threads)
    results = Results() if options.smallest else Results.read(options.out)
    with threadpool_limits(options.threads):
        for job in smallest() if options.smallest else jobs():
            if not results.has(job):
                results.add(job, RUN[job.part](job))
                print(*job.key, flush=True)
                if not options.smallest:
                    results.write(options.out)
    for row in results.rows:
        job = row.job
        if row.figure == "correlation" and job.part == "simulation" and job.strength == 1:
            name = f"{row.space}_d{job.dim}_n{job.batch}_w{job.window}_t{job.iterations}"
            print(f"RESULT reward_noise.{name.replace('-', '_')}={row.value:.3f}")


def smallest() -> Iterator[Job]:
    yield Job("arithmetic", 24, 1.0)
    yield Job("simulation", 24, 1.0, batch=24, window=240)


def jobs() -> Iterator[Job]:
    yield Job("arithmetic", 2048, 1.0)
    for setting in DECISIVE:
        yield Job("simulation", 2048, 1.0, 1.0, *setting)
    yield Job("arithmetic", 2048, 1.0, WEAK)
    for window in (432, 1000, 5000, 20000):
        yield Job("simulation", 2048, 1.0, WEAK, 144, window)
    for gpus, (groups, rollouts) in GPUS.items():
        yield Job("plan", gpus, 0.0, batch=groups * rollouts)
    yield Job("arithmetic", 256, 1.0)
    for batch, window, run in product((144, 1152), (432, 1000, 5000, 20000), (0, 100)):
        if window >= batch:
            yield Job("simulation", 256, 1.0, 1.0, batch, window, run)
    for exponent in OTHER_EXPONENTS:
        yield Job("arithmetic", 2048, exponent)


@lru_cache(maxsize=1)
def scorer_of(dim: int, exponent: float) -> Scorer:
    return Scorer(Mixture(dim, exponent))


@lru_cache(maxsize=1)
def now_of(dim: int, exponent: float, strength: float) -> Moments:
    """The population in the iteration looked at."""
    return scorer_of(dim, exponent).mixture.population(faults_at(0.5, strength))


def compared(dim: int) -> tuple[Space, ...]:
    return COMPARED if dim == 2048 else spaces(dim)


def arithmetic(job: Job) -> Iterator[Row]:
    """The mixture's distances, each space's signal and noise, and all correlations."""
    scorer = scorer_of(job.dim, job.exponent)
    mixture, reference = scorer.mixture, scorer.mixture.reference
    past = populations(mixture, job.strength)
    for name, progress in {"base": 0.0, "now": 0.5, "tuned": 1.0}.items():
        found = mixture.population(faults_at(progress, job.strength))
        yield Row(job, "", f"fid_{name}", distance_to_reference(found.mean, found.cov, reference))
    yield Row(job, "", "bias_constant", bias_constant(reference))
    yield Row(job, "", "trace", float(np.trace(reference.sigma)))
    rollouts = 12
    classes = generator("arithmetic").permutation(CLASSES)[:200].repeat(rollouts)
    rng = generator("images", "arithmetic", job.dim, job.exponent, 0, 0, 0)
    images = mixture.sample(classes, faults_at(0.5, job.strength), rng)
    truth = scorer.influence(FULL, images.features, past[-1])
    for space in compared(job.dim):
        ages = AGES if job.exponent == 1 and job.strength == 1 else (0.0,)
        known = Arithmetic(scorer, space, images, rollouts, past, ages)
        best = scorer.influence(space, images.features, past[-1])
        for name, value in figures(best, truth, images, rollouts).items():
            yield Row(job, space.name, f"population_{name}", value)
        yield Row(job, space.name, "signal", known.signal[0])
        yield Row(job, space.name, "noise", known.noise.of(1.0, rollouts))
        for setting in settings(job.dim, RUNS[:1] if len(ages) == 1 else RUNS):
            at = job.at(setting.batch, setting.window, setting.iterations)
            yield Row(at, space.name, "correlation", known.correlation(setting))


def settings(dim: int, runs: Sequence[int]) -> Iterator[Setting]:
    for batch, run, window in product(BATCHES, runs, WINDOWS):
        if window >= batch:
            yield Setting(dim, batch, window, run)


def simulation(job: Job) -> Iterator[Row]:
    """Figures of sampled histories."""
    scorer = scorer_of(job.dim, job.exponent)
    batches = max(1, round(SCORED / job.batch))
    setting = Setting(
        job.dim, job.batch, job.window, job.iterations, batches, strength=job.strength
    )
    images, history = simulated(scorer.mixture, setting)
    now = now_of(job.dim, job.exponent, job.strength)
    truth = scorer.influence(FULL, images.features, now)
    for space in compared(job.dim):
        parts = [
            scorer(space, part, history, setting.decay)
            for part in np.split(images.features, batches)
        ]
        found = figures(np.concatenate(parts), truth, images, setting.rollouts)
        for name, value in found.items():
            yield Row(job, space.name, name, value)


def planned(job: Job) -> Iterator[Row]:
    """Seconds of an iteration of the preset paper-fixed on H100s."""
    groups, rollouts = GPUS[job.dim]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        plan(
            f"--preset paper-fixed --gpu h100 --gpus {job.dim} --groups-per-iteration {groups} "
            f"--rollouts-per-group {rollouts} --json".split()
        )
    document = json.loads(printed.getvalue())
    yield Row(job, "", "iteration_s", document["iteration_s"])


RUN = {"arithmetic": arithmetic, "simulation": simulation, "plan": planned}

if __name__ == "__main__":
    main(tyro.cli(Options))
