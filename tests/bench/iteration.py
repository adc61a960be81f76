"""Seconds of each phase of one iteration, for any preset with random weights, and peak memory.

python -m tests.bench.iteration --preset paper-llamagen-l-256            the preset's own size
python -m tests.bench.iteration --preset llamagen-b-256 --width 64       reduced, for a CPU

Beside the phases: what a run's records, TensorBoard and the live table cost an iteration.

Every role runs in this process, one after another, so that each phase has the machine to itself.
Scorers are small ones of random or the miniature's weights, unless --scorers preset, which needs
the published weights of those that the preset names.
"""

from __future__ import annotations

import io
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from actors.checkpoints.loading import count_parameters
from cluster.fleet import InlineFleet
from learner.config import RunConfig
from learner.fleet_plan import fleet_plan
from learner.loggers.opening import open_loggers
from learner.loop import Iteration
from learner.monitoring.console import RunConsole
from learner.monitoring.metrics import Recorder
from learner.runs.run_dir import RunDirectory
from tests.bench.measuring import synchronise
from tests.reduced import FULL, Reduction, architectures, random_run, values_of
from tests.small_run import run_training

PHASES = ("sample", "images", "score", "moments", "learn", "publish")


class PhaseClock:
    """Seconds of each phase of a fleet in this process: of the calls to its roles, each from an
    idle device to an idle device. (The roles' own spans end when a GPU's work is queued, so that
    the next phase would pay for it.)"""

    def __init__(self, fleet: InlineFleet, device: str) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._device = device
        sampler: Any = fleet._sampler
        calls: list[tuple[str, Any, str]] = [
            ("sample", sampler, "sample"),
            ("images", sampler, "images"),
            *(("score", server, "score") for server in fleet._servers.values()),
            ("moments", fleet.moments, "commit"),
            ("learn", fleet.learner, "step"),
            ("publish", fleet, "broadcast"),
        ]
        for phase, owner, method in calls:
            setattr(owner, method, self._timed(phase, getattr(owner, method)))

    def _timed(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            synchronise(self._device)
            start = time.perf_counter()
            result = call(*args, **options)
            synchronise(self._device)
            self.seconds[phase] += time.perf_counter() - start
            return result

        return run


@dataclass(frozen=True)
class Options:
    """Phases of one iteration."""

    preset: str = "miniature"
    width: int = 0
    """Width of the policy; 0 is the preset's own size in every respect."""
    layers: int = 2
    """With width: layers of the policy."""
    grid: int = 8
    """With width: side of the token grid."""
    vocab: int = 1024
    """With width: codes of the tokenizer."""
    iterations: int = 3
    """Iterations that are timed, after one that is not."""
    groups: int = 0
    """Groups of an iteration; 0 is the preset's."""
    rollouts: int = 0
    """Rollouts of a group; 0 is the preset's."""
    microbatch: int = 0
    """Rollouts of one pass of the learner; 0 is the preset's."""
    scorers: Literal["small", "preset"] = "small"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 2


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        config = configured(options, Path(folder), device)
        phases, whole, iterations = measure(config, device)
        recording = recording_seconds(config, iterations[-1])
    report(options, config, phases, whole, device)
    print(f"RESULT iteration.recording_ms={recording * 1000:.2f}")
    print(f"RESULT iteration.recording_share={recording / whole:.4f}")


def measure(config: RunConfig, device: str) -> tuple[dict[str, float], float, list[Iteration]]:
    """Mean seconds of each phase and of a whole iteration, over all iterations but the first; and
    the iterations."""
    with InlineFleet(fleet_plan(config)) as fleet:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        clock = PhaseClock(fleet, device)
        marks: list[tuple[float, dict[str, float]]] = []

        def mark(done: int) -> bool:
            synchronise(device)
            marks.append((time.perf_counter(), dict(clock.seconds)))
            return False

        iterations = run_training(config, fleet, mark)
    (first, before), (last, after) = marks[0], marks[config.iterations - 1]
    count = config.iterations - 1
    phases = {name: (after[name] - before[name]) / count for name in PHASES}
    return phases, (last - first) / count, iterations


def recording_seconds(config: RunConfig, done: Iteration, times: int = 10) -> float:
    """Processor seconds in which all threads record and show an iteration: metrics, rollouts,
    trace, TensorBoard, live table; the least of several passes of `times` iterations each."""
    passes = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(4):  # the first imports TensorBoard
            run = RunDirectory.create(f"{folder}/run{number}", config)
            console = Console(file=io.StringIO(), force_terminal=True, width=120)
            with open_loggers(config, run) as loggers, RunConsole(times, console) as shown:
                recorder = Recorder(run, 0, rollouts=config.output.rollouts, loggers=loggers)
                shown.start(0)
                start = time.process_time()
                for iteration in range(1, times + 1):
                    metrics = {**done.metrics, "iteration": iteration}
                    recorder.record(metrics, done.groups, done.advantages, done.spans)
                    shown.roles(recorder.usage.shares())
                    shown.update(metrics)
                recorder.close()
            passes.append((time.process_time() - start) / times)  # what threads were behind, too
    return min(passes)


def configured(options: Options, folder: Path, device: str) -> RunConfig:
    """The preset with what the options change."""
    values = values_of(options.preset)
    rollouts = options.rollouts or values["rollouts_per_group"]
    gpus = {"num_gpus": 1 if device == "cuda" else 0, "num_threads": options.threads}
    changes: dict[str, Any] = {
        "iterations": options.iterations + 1,
        "rollouts_per_group": rollouts,
        "groups_per_iteration": options.groups or values["groups_per_iteration"],
        "num_samplers": 1,
        "learner": gpus | ({"microbatch": options.microbatch} if options.microbatch else {}),
        "sampler": gpus,
        "reward": gpus,
        "rewards": {"loo_fid": {"seed_images": 2 * rollouts}},
    }
    small = options.scorers == "small"
    return random_run(options.preset, folder, reduction_of(options), changes, scorers=small)


def report(
    options: Options, config: RunConfig, phases: dict[str, float], whole: float, device: str
) -> None:
    """A table for people, and RESULT lines for programs."""
    policy, _ = architectures(values_of(options.preset), reduction_of(options))
    images = config.groups_per_iteration * config.rollouts_per_group
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {options.threads} threads"
    size = f"{count_parameters(policy) / 1e6:.1f} M parameters, {policy.num_tokens} tokens"
    table = Table(title=f"{options.preset}: {size}, {images} rollouts, {name}")
    table.add_column("phase")
    for heading in ("seconds", "share"):
        table.add_column(heading, justify="right")
    for phase, seconds in phases.items():
        table.add_row(phase, f"{seconds:.3f}", f"{seconds / whole:.0%}")
    table.add_row("iteration", f"{whole:.3f}", "")
    Console().print(table)
    for phase, seconds in phases.items():
        print(f"RESULT iteration.{phase}_s={seconds:.4f}")
    print(f"RESULT iteration.whole_s={whole:.4f}")
    print(f"RESULT iteration.images_per_s={images / whole:.3f}")
    print(f"RESULT iteration.peak_memory_gb={peak_memory(device) / 1e9:.2f}")


def reduction_of(options: Options) -> Reduction:
    if not options.width:
        return FULL
    return Reduction(
        width=options.width, layers=options.layers, grid=options.grid, vocab=options.vocab
    )


def peak_memory(device: str) -> int:
    """Bytes: of the GPU's allocator, or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
