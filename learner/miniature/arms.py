"""Ablation study on the miniature: `python -m learner.miniature.arms`.

Trains the miniature with and without each part of the method ("arms") over several seeds, and
evaluates every result with the same judge. Each seed rebuilds all networks (tokenizer, policy,
scorers); judge and data split are fixed. Writes results.csv, arms.png and the table, as means over
seeds with 95 % intervals (Student's t). A second call with the same --out continues.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program.start import run_command

    sys.exit(run_command("learner.miniature.arms"))

import csv
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from scipy import stats

from cluster.errors import ConfigError, TesseraError
from cluster.fleet import InlineFleet
from cluster.io.files import replacing
from cluster.io.locks import locked
from cluster.io.paths import output_path
from cluster.io.strict_json import dumps, number
from cluster.program.console import FAILED, INTERRUPTED, REFUSED, make_console
from cluster.program.streams import safe_streams
from learner.config import DEFAULT_PRESET, RunConfig, load_preset, merge, validate
from learner.evaluation import held_out
from learner.fleet_plan import fleet_plan
from learner.loop import prepare, train
from learner.miniature.build import BuildConfig, Builder, with_networks
from learner.monitoring.console import COLUMNS
from learner.rollouts.feature_space import set_reference

BASE, GUIDED, BOTH = "base", "base, CFG 2", "instance + LOO-FID"
JOINT = "joint LOO-FID only"
JOINTLY = {"loo_fid": {"joint": True}}
INSTANCE_OFF = {"clip": {"weight": 0.0}, "hps": {"weight": 0.0}}
ARMS: dict[str, dict[str, Any]] = {
    "instance only": {"rewards": {"loo_fid": {"weight": 0.0}}},
    "LOO-FID only": {"rewards": INSTANCE_OFF},
    BOTH: {},
    "both + entropy": {"entropy": {"controller": "target"}},
    JOINT: {"rewards": {**INSTANCE_OFF, **JOINTLY}},
    "instance + joint": {"rewards": JOINTLY},
    "instance + joint + entropy": {"rewards": JOINTLY, "entropy": {"controller": "target"}},
}
"""Arm -> changes to the preset."""
AHEAD = "both, one iteration ahead"
FURTHER: dict[str, dict[str, Any]] = {
    AHEAD: {"max_staleness": 1},
    "both, two iterations ahead": {"max_staleness": 2},
}
"""Arms that run only if named."""
SPACES = {
    **COLUMNS,
    "pixel FID↓": "second/fid",
    "pixel cov.↑": "second/coverage",
    "pixel rec.↑": "second/recall",
}
"""Heading -> metric, in the judge's features and in raw pixels."""
DIVERSITY = ("coverage", "recall", "second/fid", "second/coverage", "second/recall")
COMPARISONS = (
    (BOTH, GUIDED, ("fid", "accuracy", "density", *DIVERSITY)),
    ("instance only", BASE, ("accuracy", "fid", *DIVERSITY)),
    (BOTH, "instance only", ("accuracy", "fid", *DIVERSITY)),
    (BOTH, BASE, DIVERSITY),
    (JOINT, "LOO-FID only", ("accuracy", "fid", "density", *DIVERSITY)),
    ("instance + joint", BOTH, ("accuracy", "fid", "density", *DIVERSITY)),
    (AHEAD, BOTH, ("accuracy", "fid", "density", *DIVERSITY)),
)
"""Policy, compared with, metrics; if both were trained."""
LOWER_IS_BETTER = ("fid", "second/fid")
WIDTH = 180  # columns of the table where there is no terminal
PLOT_COLUMNS = 6


@dataclass(frozen=True, kw_only=True)
class ArmsConfig:
    """Ablation study of the method on the miniature."""

    out: Path = Path("runs/arms")
    """Directory of results and rebuilt networks."""
    seeds: tuple[int, ...] = (101, 102, 103, 104, 105)
    """One repetition a seed."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Arms by name; also "both, one iteration ahead" and "both, two iterations ahead"."""
    iterations: int = load_preset(DEFAULT_PRESET).iterations
    """Learning iterations of each arm."""
    workers: int = 0
    """Parallel processes; 0: one a core."""

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in ARMS | FURTHER]
        if unknown:
            raise ValueError(f"no arms {unknown}: there are {', '.join(ARMS | FURTHER)}")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    prog = "python -m learner.miniature.arms"
    config = tyro.cli(ArmsConfig, args=arguments, description=__doc__, prog=prog)
    try:
        config = replace(config, out=output_path(config.out, "--out"))
        with locked(config.out, f"--out {config.out}"):
            return _run(config)
    except TesseraError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED if isinstance(error, ConfigError) else FAILED


def _run(config: ArmsConfig) -> int:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        with (
            safe_streams(output_is_all=False),
            Progress(*columns, TimeElapsedColumn(), console=make_console()) as progress,
        ):
            run_all(config, progress)
    except KeyboardInterrupt:
        print("stopped; the same command continues with the other arms", file=sys.stderr)
        return INTERRUPTED
    results = collect(config)
    write_csv(results, config.out / "results.csv")
    plot(results, config.out / "arms.png")
    console = make_console()
    report(results, console if console.is_terminal else make_console(width=WIDTH))
    return 0


def run_all(config: ArmsConfig, progress: Progress) -> None:
    """Build the networks of each seed, then train every arm, in parallel processes."""
    workers = config.workers or len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")  # a forked process inherits torch's threads
    with ProcessPoolExecutor(workers, mp_context=context) as pool, _ending_processes():
        for title, job, arguments in (
            ("building networks", build_networks, [(config, seed) for seed in config.seeds]),
            (
                "training arms",
                run_arm,
                [(config, seed, arm) for seed in config.seeds for arm in (BASE, *config.arms)],
            ),
        ):
            task = progress.add_task(title, total=len(arguments))
            submitted: Callable[..., None] = job
            futures = {pool.submit(submitted, *each): each for each in arguments}
            for future in as_completed(futures):
                future.result()
                progress.advance(task)
                if not progress.console.is_terminal:
                    what = ", ".join(str(part) for part in futures[future][1:])
                    print(f"{title}: {what} done", flush=True)


@contextmanager
def _ending_processes() -> Iterator[None]:
    """Terminate child processes on an interrupt."""
    try:
        yield
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()
        raise


def build_networks(config: ArmsConfig, seed: int) -> None:
    """Build the networks of a seed, unless they exist."""
    folder = networks_of(config, seed)
    if (folder / "preference" / "open_clip_model.safetensors").is_file():  # written last
        return
    with Progress(disable=True) as progress:
        Builder(BuildConfig(out=folder, seed=seed, num_threads=1), progress).build()


def run_arm(config: ArmsConfig, seed: int, arm: str) -> None:
    """Train and evaluate one arm of one seed; writes a JSON file."""
    result = result_of(config, seed, arm)
    if result.is_file():
        return
    run = arm_config(config, seed, (ARMS | FURTHER).get(arm, {}))
    with InlineFleet(fleet_plan(run)) as fleet:
        fleet.broadcast(0)
        real = held_out.real_images(run, fleet)
        if arm == BASE:
            rows = {
                row.name: held_out.evaluate_policy(run, fleet, row.spec, real)
                for row in held_out.base_rows(run)
            }
        else:
            space = set_reference(run, fleet)
            prepare(run, fleet, space)
            train(run, fleet, space, 0, lambda _: None, lambda: False)
            row = held_out.tuned_row(run)
            rows = {arm: held_out.evaluate_policy(run, fleet, row.spec, real)}
    with replacing(result) as partial:
        partial.write_text(dumps(rows))


def arm_config(config: ArmsConfig, seed: int, changes: Mapping[str, Any]) -> RunConfig:
    """The preset with a seed's networks and an arm's changes."""
    folder = networks_of(config, seed)
    mine = {"seed": seed, "iterations": config.iterations, "learner": {"num_threads": 1}}
    values = merge(merge(with_networks(folder), mine), changes)
    return validate(values, f"arm of seed {seed}")


def networks_of(config: ArmsConfig, seed: int) -> Path:
    return config.out.absolute() / "networks" / f"seed_{seed}"


def result_of(config: ArmsConfig, seed: int, arm: str) -> Path:
    name = "".join(letter if letter.isalnum() else "_" for letter in arm)
    return config.out / f"{name}-seed_{seed}-{config.iterations}.json"


Results = dict[str, dict[str, np.ndarray]]
"""Policy -> metric -> values, one a seed."""


def collect(config: ArmsConfig) -> Results:
    """All results, by policy and metric."""
    results: Results = {}
    for arm in (BASE, *config.arms):
        seeds = [json.loads(result_of(config, seed, arm).read_text()) for seed in config.seeds]
        for name in seeds[0]:
            metrics = seeds[0][name]
            results[name] = {
                key: np.array([number(rows[name][key]) for rows in seeds]) for key in metrics
            }
    return results


def interval(values: np.ndarray) -> float:
    """Half width of the 95 % confidence interval of the mean; NaN for one value."""
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def write_csv(results: Results, path: Path) -> None:
    """One row a policy: mean and half interval of each metric, then the values."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["policy", "metric", "mean", "half_interval_95", "values"])
        for policy, metrics in results.items():
            for metric, values in metrics.items():
                numbers = " ".join(f"{value:.6g}" for value in values)
                writer.writerow([policy, metric, values.mean(), interval(values), numbers])


def report(results: Results, console: Console) -> None:
    """Print the table and the comparisons."""
    table = Table(title="Held-out judge, mean ± 95 % interval over seeds", box=SIMPLE_HEAD)
    table.add_column("policy", no_wrap=True)
    for heading in SPACES:
        table.add_column(heading, justify="right", no_wrap=True)
    for policy, metrics in results.items():
        cells = (metrics[key] for key in SPACES.values())
        table.add_row(policy, *(f"{cell.mean():.2f}±{interval(cell):.2f}" for cell in cells))
    console.print(table)
    for policy, other, compared in COMPARISONS:
        if not {policy, other} <= results.keys():
            continue
        console.print(f"{policy}, against {other}:")
        for metric in compared:
            console.print(f"  {compare(results, policy, other, metric)}", highlight=False)


def compare(results: Results, policy: str, other: str, metric: str) -> str:
    """One line of text: the mean difference policy - other of a metric, with its interval, and the
    number of seeds in which the policy is better."""
    change = results[policy][metric] - results[other][metric]
    better = change < 0 if metric in LOWER_IS_BETTER else change > 0
    return (
        f"{metric:<16} {change.mean():+8.3f} ± {interval(change):.3f}   "
        f"better in {better.sum()} of {len(change)} seeds"
    )


def plot(results: Results, path: Path) -> None:
    """Every metric as points (seeds) with mean and interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 6), layout="constrained")
    for index, (heading, key) in enumerate(SPACES.items()):
        axes = figure.add_subplot(2, PLOT_COLUMNS, index + 1)
        for row, metrics in enumerate(results.values()):
            values = metrics[key]
            axes.plot(values, np.full(len(values), row), "o", color="tab:blue", alpha=0.35)
            axes.errorbar(values.mean(), row, xerr=interval(values), fmt="D", color="black")
        axes.set_title(heading)
        axes.set_yticks(
            range(len(results)), list(results) if index % PLOT_COLUMNS == 0 else [""] * len(results)
        )
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
