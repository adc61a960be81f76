"""Time and memory of an evaluation's figures, on synthetic features.

python -m tests.bench.evaluation

By default 50,000 generated and 50,000 real images with features, spatial features and logits of
Inception's sizes, against moments as the ADM evaluator's files hold them. Peak memory is that of
this whole process, with Python, torch and all inputs. `cpu_` is CPU time over the number of cores:
what the same work would take if nothing else ran, at the least.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from threadpoolctl import threadpool_limits

from cluster.messages import MAIN_SPACE
from rewards.distribution.reference import Reference
from rewards.metrics import evaluation
from rewards.metrics.frechet import moments_of
from rewards.metrics.samples import LOGITS, SPATIAL, RealImages, Samples


@dataclass(frozen=True)
class Options:
    """Time and memory of the figures of one set, and of a paired comparison's resamples."""

    images: int = 50_000
    real: int = 50_000
    dim: int = 2048
    spatial: int = 2023
    logits: int = 1008
    classes: int = 1000
    neighbours: int = 3
    bootstrap: int = 1000
    threads: int = 2


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    generator = np.random.default_rng(0)
    real, samples = inputs(options, generator)
    sizes = [*samples.features.values(), *real.features.values()]
    print(f"inputs: {sum(array.nbytes for array in sizes) / 2**30:.2f} GiB of features")
    result("peak_gib_before", peak())
    with threadpool_limits(options.threads), stages(options.threads):
        start = clocks()
        settings = evaluation.MetricSettings(
            neighbours=options.neighbours, bootstrap=options.bootstrap
        )
        figures = evaluation.evaluate(samples, real, settings)
        report("whole", *start, options.threads)
    for name, figure in figures.items():
        print(f"{name:16} {figure.value:.6g}  [{figure.low:.6g}, {figure.high:.6g}]")
    result("peak_gib", peak())


@contextmanager
def stages(threads: int) -> Iterator[None]:
    """Report the time of each part of `evaluate`."""
    names = {
        "_of_moments": "fid",
        "_of_neighbours": "neighbours",
        "inception_score": "inception_score",
        "vendi_estimate": "vendi",
        "intervals": "bootstrap",
    }
    before = {name: getattr(evaluation, name) for name in names}

    def timed(function: Callable[..., object], figure: str) -> Callable[..., object]:
        def run(*args: object) -> object:
            start = clocks()
            found = function(*args)
            report(
                "sfid" if isinstance(args[0], str) and args[0] == "sfid" else figure,
                *start,
                threads,
            )
            return found

        return run

    for name, figure in names.items():
        setattr(evaluation, name, timed(before[name], figure))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(evaluation, name, function)


def inputs(options: Options, generator: np.random.Generator) -> tuple[RealImages, Samples]:
    """Real and generated features; the generated ones spread less and lie a little aside."""

    def features(count: int, dim: int, spread: float = 1.0, shift: float = 0.0) -> np.ndarray:
        x = generator.standard_normal((count, dim), dtype=np.float32)
        x *= spread * np.exp(-np.arange(dim) * (4 / dim), dtype=np.float32)
        x += np.float32(shift)
        return x

    spatial = features(max(options.spatial * 3, 1000), options.spatial)
    moments = moments_of(spatial)
    real = features(options.real, options.dim)
    of_real = moments_of(real)
    classes = np.arange(options.images) % options.classes
    samples = Samples(
        {
            MAIN_SPACE: features(options.images, options.dim, 0.95, 0.02),
            SPATIAL: features(options.images, options.spatial, 1.05),
            LOGITS: features(options.images, options.logits, 4.0),
        },
        {"clip": generator.standard_normal(options.images, dtype=np.float32)},
        generator.standard_normal(options.images),
        classes,
    )
    references = {
        MAIN_SPACE: Reference(of_real.mean, of_real.cov),
        SPATIAL: Reference(moments.mean, moments.cov),
    }
    return RealImages({MAIN_SPACE: real}, references), samples


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def report(figure: str, wall: float, cpu: float, threads: int) -> None:
    """Print the time since these clocks."""
    now = clocks()
    result(f"{figure}_s", now[0] - wall)
    result(f"cpu_{figure}_s", (now[1] - cpu) / threads)


def result(figure: str, value: float) -> None:
    print(f"RESULT evaluation.{figure}={value:.3g}", flush=True)


def peak() -> float:
    """Largest resident memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main(tyro.cli(Options))
