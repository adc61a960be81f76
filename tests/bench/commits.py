"""How long an iteration waits for the moments server, with the presets' numbers of images.

python -m tests.bench.commits

The server as the presets have it: the exact leave-one-out FID in 2,048 dimensions, an exponential
average over 20,000 images. Features are random, with a spectrum that falls by 1e5 as Inception's
does, and drift a little towards the reference. Between commits `refresh` is called, as the loop
does while samplers sample: its time is told apart, since nobody waits for it. For comparison some
commits are made without it, each with a decomposition of its own.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro

from rewards.distribution.config import MomentsConfig
from rewards.distribution.distribution_reward import DistributionReward
from rewards.distribution.history_basis import HistoryBasis
from rewards.distribution.reference import Reference
from rewards.servers.space_history import SpaceHistory


@dataclass(frozen=True)
class Options:
    """Seconds of a commit."""

    counts: tuple[int, ...] = (128, 144, 256)
    """Images of an iteration, N; the presets have these."""
    dim: int = 2048
    iterations: int = 16
    window: float = 20_000
    seed_images: int = 8000
    condition: float = 1e5
    """Of the covariances, whose eigenvalues fall geometrically."""
    threads: int = 1
    """Of the server (`rewards.loo_fid.num_threads`)."""
    plain: int = 2
    """Commits with a decomposition of their own, to compare."""


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    world = World(options)
    print(f"D={options.dim}, {options.iterations} iterations, {options.threads} threads")
    for count in options.counts:
        measure(options, world, count)


class World:
    """Images' features (N, D) float32 of a policy that comes nearer to real ones."""

    def __init__(self, options: Options) -> None:
        generator = np.random.default_rng(0)
        dim = options.dim
        basis, _ = np.linalg.qr(generator.normal(size=(dim, dim)))
        scales = np.geomspace(1, options.condition**-0.5, dim)
        self._mixing = basis * scales  # (D, D), of unit normal draws
        self._shift = generator.normal(size=dim) * 0.05
        self.reference = Reference(np.zeros(dim), self._mixing @ self._mixing.T)
        turned, _ = np.linalg.qr(basis + 0.05 * generator.normal(size=(dim, dim)) / dim**0.5)
        self._policy = turned * scales * 1.1
        self._generator = generator

    def features(self, count: int, progress: float) -> np.ndarray:
        """`progress` from 0, the base policy, to 1, the real images."""
        draws = self._generator.normal(size=(count, len(self._shift)))
        mixing = (1 - progress) * self._policy + progress * self._mixing
        return (draws @ mixing.T + (1 - progress) * self._shift).astype(np.float32)


def measure(options: Options, world: World, count: int) -> None:
    config = MomentsConfig(window=options.window, num_threads=options.threads)
    server = SpaceHistory(config)
    server.set_reference(world.reference, "bench")
    server.seed(world.features(options.seed_images, 0.0))
    commits, decompositions, plain = list[float](), list[float](), list[float]()
    with served() as batches:
        for iteration in range(options.iterations):
            features = world.features(count, 0.01 * iteration)
            server.refresh()
            seconds, answer = commit(server, iteration, features)
            commits.append(seconds)
            spans = (span for span in answer.spans if span.phase == "decompose")
            decompositions += [span.end - span.start for span in spans]
    server._basis.start(None)
    for iteration in range(options.iterations, options.iterations + options.plain):
        plain.append(commit(server, iteration, world.features(count, 0.2))[0])
    report(count, commits, decompositions, plain, len(batches))


@contextlib.contextmanager
def served() -> Iterator[list[int]]:
    """For every commit that an old decomposition serves, the batches since it was made."""
    found: list[int] = []
    original = HistoryBasis.leave_one_out

    def noted(self: HistoryBasis, pending: Any, features: np.ndarray, decay: float) -> Any:
        found.append(len(pending))
        return original(self, pending, features, decay)

    HistoryBasis.leave_one_out = noted  # type: ignore[method-assign]
    try:
        yield found
    finally:
        HistoryBasis.leave_one_out = original  # type: ignore[method-assign]


def commit(
    server: SpaceHistory, iteration: int, features: np.ndarray
) -> tuple[float, DistributionReward]:
    valid = np.ones(len(features), bool)
    start = time.perf_counter()
    answer = server.commit(iteration, features, valid, run="bench")
    return time.perf_counter() - start, answer


def report(
    count: int, commits: list[float], decompositions: list[float], plain: list[float], served: int
) -> None:
    median, worst, alone = statistics.median(commits), max(commits), statistics.median(plain)
    print(
        f"N={count}: a commit {median:.3f} s, the longest {worst:.3f} s; {served} of "
        f"{len(commits)} served by an old decomposition. Between them {len(decompositions)} "
        f"decompositions of {statistics.median(decompositions or [0.0]):.2f} s. With a "
        f"decomposition of its own a commit takes {alone:.2f} s"
    )
    results = {"median": median, "max": worst, "served": served, "plain": alone}
    for name, value in results.items():
        print(f"RESULT commits.{name}_{count}={value:.3g}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
