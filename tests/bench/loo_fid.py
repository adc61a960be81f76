"""Exact leave-one-out FID rewards against loops over the definition.

python -m tests.bench.loo_fid

All in this process, on the same features, taking turns. The two loops compute one FID for each
missing image and one for the whole batch, with `sqrtm` of the product of covariances (as FID tools
do) or with `eigvalsh` of the symmetric form. A few images of each are timed, the fastest counts,
and the loop's time is that times N + 1. Ours is the fastest of several whole calls. The reference's
own factors are computed before, once, for all but `sqrtm`, which has no use for them.

`over_eigh` is our time over that of one eigendecomposition of the same size, with vectors, by the
fastest of torch's and scipy's solvers, all on the CPU; `over_torch_eigh` over torch's, which ours
called at every size before it called LAPACK's parts.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy.linalg
import torch
import tyro
from threadpoolctl import threadpool_limits

from rewards.distribution.history_basis import HistoryBasis
from rewards.distribution.leave_one_out import leave_one_out_fid
from rewards.distribution.moments import Moments
from rewards.distribution.reference import Reference, distance_to_reference
from tests.unit.leave_one_out_oracle import Oracle, Scene, scene

SMALL, LARGE = 32, 512
"""Batches between which the growth of the cost is measured."""

EIGH: dict[str, Callable[[np.ndarray], object]] = {
    "torch": lambda matrix: torch.linalg.eigh(torch.from_numpy(matrix)),
    "evd": lambda matrix: scipy.linalg.eigh(matrix, driver="evd", check_finite=False),
    "evr": lambda matrix: scipy.linalg.eigh(matrix, driver="evr", check_finite=False),
}
"""Solvers of one eigenproblem: torch's LAPACK, and two drivers of scipy's."""


@dataclass(frozen=True)
class Options:
    """Speed and error of the leave-one-out FID."""

    dim: int = 2048
    count: int = 128
    """Images of the batch, N."""
    decay: float = 0.9875
    condition: float = 1e5
    """Of the covariances of history and reference, whose eigenvalues fall geometrically."""
    history: int = 6144
    """Images behind the history, and behind the reference; below `dim` both are singular."""
    timed: int = 2
    """Images timed of each loop."""
    repeats: int = 3
    """Calls of ours; the fastest counts."""
    checked: int = 2
    """Images compared with the definition (slow); 0 for none."""
    threads: int = 2
    device: str = "cpu"
    """Of ours; the loops run on the CPU."""


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    s = scene(options.dim, LARGE, options.history, options.history, options.condition)
    moments, reference = s.moments, s.reference
    _ = reference.factor, reference.triangle  # once in a run
    batch = Scene(s.x[: options.count], s.past, s.real)
    with threadpool_limits(options.threads):
        basis = HistoryBasis.of(moments, reference, options.device)
        seconds = measure(options, batch.x, s.x, moments, reference, basis)
        report(options, seconds)
        if options.checked:
            check(options, batch, moments, reference, basis)


def measure(
    options: Options,
    x: np.ndarray,
    many: np.ndarray,
    moments: Moments,
    reference: Reference,
    basis: HistoryBasis,
) -> dict[str, float]:
    """Best seconds of each, the runs taking turns, so that a slow minute hits them all."""

    def ours(features: np.ndarray) -> Callable[[], object]:
        return lambda: leave_one_out_fid(
            features, moments, reference, options.decay, device=options.device
        )

    def without_one(distance: Callable[..., float]) -> Callable[[], object]:
        def run() -> None:
            left = moments.update(x[1:], options.decay)
            distance(left.mean, left.cov, reference)

        return run

    factor = reference.factor
    squares = factor.T @ moments.cov @ factor
    squares = (squares + squares.T) / 2
    solvers = {name: (options.repeats, partial(solve, squares)) for name, solve in EIGH.items()}
    runs: dict[str, tuple[int, Callable[[], object]]] = solvers | {
        "sqrtm": (options.timed, without_one(with_sqrtm)),
        "eigvalsh": (options.timed + 1, without_one(distance_to_reference)),
        "whole": (options.repeats, ours(x)),
        "reused": (options.repeats, lambda: basis.leave_one_out([], x, options.decay)),
        "small": (options.repeats, ours(many[:SMALL])),
        "large": (options.repeats, ours(many)),
    }
    ours(many[:SMALL])()  # warm: allocations, thread pools
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(max(times for times, _ in runs.values())):
        for name, (times, run) in runs.items():
            if turn < times:
                best[name] = min(best[name], timed(run))
    return best


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def with_sqrtm(mean: np.ndarray, cov: np.ndarray, reference: Reference) -> float:
    """The FID tools' formula."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # singular products
        root = np.real(scipy.linalg.sqrtm(cov @ reference.sigma))
    gap = mean - reference.mu
    return float(gap @ gap + np.trace(cov) + np.trace(reference.sigma) - 2 * np.trace(root))


def report(options: Options, seconds: dict[str, float]) -> None:
    loops = {name: seconds[name] * (options.count + 1) for name in ("sqrtm", "eigvalsh")}
    print(
        f"D={options.dim}, N={options.count}, decay {options.decay}, condition "
        f"{options.condition:.0e}, {options.threads} threads, {options.device}"
    )
    for name, total in loops.items():
        print(f"loop of {name}: {total:.0f} s, extrapolated from {seconds[name]:.2f} s an image")
    print(
        f"ours: {seconds['whole']:.2f} s with the decomposition, {seconds['reused']:.3f} s with "
        f"one at hand; {seconds['small']:.2f} s for {SMALL} images, "
        f"{seconds['large']:.2f} s for {LARGE}"
    )
    solvers = {name: seconds[name] for name in EIGH}
    print("one eigh: " + ", ".join(f"{value:.2f} s {name}" for name, value in solvers.items()))
    results = {
        "over_eigh": seconds["whole"] / min(solvers.values()),
        "over_torch_eigh": seconds["whole"] / solvers["torch"],
        "speedup_sqrtm": loops["sqrtm"] / seconds["whole"],
        "speedup_eigvalsh": loops["eigvalsh"] / seconds["whole"],
        "speedup_reused": loops["sqrtm"] / seconds["reused"],
        "growth_32_512": seconds["large"] / seconds["small"] - 1,
    }
    for name, value in results.items():
        print(f"RESULT loo_fid.{name}={value:.3g}", flush=True)


def check(
    options: Options, s: Scene, moments: Moments, reference: Reference, basis: HistoryBasis
) -> None:
    """Errors over the rewards' standard deviation, against singular values of the data."""
    truth = Oracle(s, options.decay).rewards(range(options.checked))
    whole, _ = leave_one_out_fid(s.x, moments, reference, options.decay, device=options.device)
    reused, _ = basis.leave_one_out([], s.x, options.decay)
    for name, rewards in {"error": whole, "error_reused": reused}.items():
        worst = np.abs(rewards[: options.checked] - truth).max() / whole.std()
        print(f"RESULT loo_fid.{name}={worst:.1e}")


if __name__ == "__main__":
    main(tyro.cli(Options))
