"""The study on the miniature: `python -m learner.miniature.arms --part llamagen`.

A part trains a system with and without each part of the method ("arms") over several seeds, and
evaluates every result with the same judge. Each seed rebuilds all networks (tokenizer, policy,
scorers); judge and data split are fixed. Writes PART.csv, with a line for each figure of each
policy and seed. Stopped or killed at any point, the same command continues, and writes the same
file.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program.start import run_command

    sys.exit(run_command("learner.miniature.arms"))

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cluster.errors import ConfigError, TesseraError, did_you_mean
from cluster.io.locks import locked
from cluster.io.paths import output_path
from cluster.program.console import FAILED, INTERRUPTED, REFUSED, make_console
from cluster.program.invocation import command_of
from cluster.program.streams import safe_streams
from learner.miniature.study.names import BASE
from learner.miniature.study.part import Arm, Part
from learner.miniature.study.parts import PARTS
from learner.miniature.study.plan import Plan, plan_of
from learner.miniature.study.pool import run_all
from learner.miniature.study.results import Results, write_csv
from learner.miniature.study.stages import Job, built, check_arm, figures_of, read_record
from learner.miniature.study.statistics import mean

SHOWN = {
    "FID↓": "fid",
    "dens.↑": "density",
    "cov.↑": "coverage",
    "recall↑": "recall",
    "class↑": "accuracy",
    "R-prec.↑": "r_precision",
    "CLIP↑": "clip",
    "pixel FID↓": "second/fid",
    "pixel rec.↑": "second/recall",
    "CLIP rec.↑": "clip/recall",
}
"""Heading of the table on the console -> metric. The file has all."""


@dataclass(frozen=True, kw_only=True)
class ArmsConfig:
    """Train and evaluate the arms of a part of the study."""

    part: str = "llamagen"
    """Part of the study: llamagen, vqgan, captions, mnist, recall or ablations."""
    out: Path = Path("runs/study")
    """Directory of networks, tuned policies and results; parts share it."""
    seeds: tuple[int, ...] = ()
    """One repetition a seed; none: the part's own."""
    arms: tuple[str, ...] = ()
    """Arms by name; none: the part's own."""
    iterations: int = 0
    """Learning iterations of each arm; 0: its own number."""
    scale: float = 1.0
    """Factor of the steps in which networks are trained (below 1 for quick tests)."""
    workers: int = 0
    """Parallel processes; 0: one a core."""
    dry_run: bool = False
    """Print arms and seeds, what is done, and how long the rest takes."""

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            hint = did_you_mean(self.part, PARTS)
            raise ValueError(f"no part {self.part!r}: {hint}there are {', '.join(PARTS)}")
        names = PARTS[self.part].names
        if unknown := [arm for arm in self.arms if arm not in names]:
            raise ValueError(f"no arms {unknown}: there are {', '.join(names)}")
        for name in ("arms", "seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must be distinct, found {getattr(self, name)}")
        if self.iterations < 0 or self.workers < 0 or not self.scale > 0:
            raise ValueError("iterations and workers must be >= 0, and scale > 0")

    def jobs(self) -> list[Job]:
        """Base policy and arms of each seed."""
        part: Part = PARTS[self.part]
        arms = [part.arm(name) for name in self.arms] or list(part.arms)
        return [
            Job(
                out=self.out.absolute(),
                part=part,
                seed=seed,
                arm=arm,
                iterations=self.iterations,
                scale=self.scale,
            )
            for seed in sorted(self.seeds or part.seeds)
            for arm in (Arm(name=BASE), *arms)
        ]

    @property
    def processes(self) -> int:
        return self.workers or len(os.sched_getaffinity(0))


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    prog = command_of("learner.miniature.arms")
    config = tyro.cli(ArmsConfig, args=arguments, description=__doc__, prog=prog)
    try:
        config = replace(config, out=output_path(config.out, "--out"))
        if config.dry_run:
            show_plan(plan_of(config.jobs()), config.processes, make_console())
            return 0
        with locked(config.out, f"--out {config.out}"):
            return _run(config)
    except TesseraError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED if isinstance(error, ConfigError) else FAILED


def _run(config: ArmsConfig) -> int:
    jobs = config.jobs()
    for job in jobs:  # before anything starts
        kept = read_record(job) if job.arm.name != BASE and built(job) else None
        if kept is not None:
            check_arm(job, kept)
    try:
        with safe_streams(output_is_all=False):
            run_all(jobs, config.processes)
    except KeyboardInterrupt:
        print("stopped; the same command continues with the other arms", file=sys.stderr)
        return INTERRUPTED
    results = collect(jobs)
    path = config.out / f"{config.part}.csv"
    write_csv(results, path)
    console = make_console()
    report(results, [policy for job in jobs for policy in job.policies], console)
    console.print(f"results: {path}", highlight=False, soft_wrap=True)
    return 0


def collect(jobs: list[Job]) -> Results:
    """The figures of all jobs."""
    figures = {
        (job.seed, policy): found
        for job in jobs
        for policy in job.policies
        if (found := figures_of(job, policy)) is not None
    }
    return Results(jobs[0].part.name, tuple(sorted({job.seed for job in jobs})), figures)


def report(results: Results, policies: list[str], console: Console) -> None:
    """Print means with intervals."""
    table = Table(title="Held-out judge, mean ± 95 % interval over seeds", box=SIMPLE_HEAD)
    table.add_column("policy", no_wrap=True)
    there = {heading: name for heading, name in SHOWN.items() if name in results.metrics(BASE)}
    for heading in there:
        table.add_column(heading, justify="right", no_wrap=True)
    for policy in dict.fromkeys(policies):
        found = (mean(results.values(policy, metric)) for metric in there.values())
        table.add_row(policy, *(f"{each.value:.2f}±{each.half:.2f}" for each in found))
    if not console.is_terminal:
        console.width = 180
    console.print(table)


def show_plan(plan: Plan, processes: int, console: Console) -> None:
    """Print what is done and what is left."""
    table = Table(box=SIMPLE_HEAD)
    for heading in ("", "of", "done", "CPU seconds each"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for line in plan.lines:
        table.add_row(line.what, str(line.count), str(line.done), f"{line.seconds:.0f}")
    console.print(table)
    console.print(
        f"seeds: {', '.join(map(str, plan.seeds))}\n"
        f"left: {plan.seconds / 3600:.2f} hours of CPU time, about "
        f"{plan.seconds / 3600 / processes:.2f} hours on {processes} cores",
        highlight=False,
        soft_wrap=True,
    )
