"""Status of a running job: roles and workers, iteration, rate, newest metrics.

python -m cluster.status                     the only active run under runs/
python -m cluster.status --run NAME          another one: a name, or its directory
python -m cluster.status --all               all runs on the cluster, of all users
python -m cluster.status --watch 5           every 5 seconds
python -m cluster.status --json              for programs

A run that has ended is shown, too: how it ended, what it left, the command that resumes it. The
exit status is 0 if a run is shown, and 1 if there is none or it cannot be reached.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program.start import run_command

    sys.exit(run_command("cluster.status"))

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from cluster.control.control_actor import (
    FleetStatus,
    PoolStatus,
    Progress,
    RunEndedError,
    RunSelection,
    WorkerStatus,
    connect_to_run,
)
from cluster.control.discovery import (
    LastRunError,
    RunLocation,
    check_alive,
    find_run,
    left_behind,
    read_discovery_file,
)
from cluster.control.overview import STALE_S, joined_cluster, overview
from cluster.io.run_layout import CONFIG, DISCOVERY_FILE
from cluster.io.strict_json import dumps
from cluster.placement.nodes import Node
from cluster.placement.shown import free_lines, free_of
from cluster.program.console import REFUSED, exit_status, make_console
from cluster.program.invocation import command_of
from cluster.ray_session.object_store import format_bytes
from cluster.ray_session.private import living_actors
from cluster.ray_session.session import cluster_nodes
from cluster.spans import role_of

WIDTH = 120  # columns, where there is no terminal
PID_WIDTH = 8
MAX_ROWS = 16  # of a role in the table; --json has all
METRICS = ("fid/", "reward/", "policy/entropy", "policy/reference_kl", "staleness/", "guards/")

Status = dict[str, Any]
"""What `as_dict` and `ended_status` return: the object of --json."""


@dataclass(frozen=True, kw_only=True)
class Arguments(RunSelection):
    """Show the status of a running job."""

    watch: float = 0.0
    """Seconds between updates, until the run ends or Ctrl-C; 0 shows it once."""
    all: bool = False
    """Show all runs on the cluster: whose they are, and what they reserve of it."""
    json: bool = False
    """Print one JSON object (with --watch one a line) instead of tables."""

    def __post_init__(self) -> None:
        if not 0 <= self.watch < 1e6:
            raise ValueError(f"watch must be seconds, >= 0, found {self.watch}")
        if self.all and self.run:
            raise ValueError(f"--all shows every run: leave out --run {self.run}")


def as_dict(
    run: str,
    status: FleetStatus,
    actors: Mapping[str, Mapping[str, Any]],
    nodes: Sequence[Node] = (),
) -> Status:
    """The status of a run, ready for JSON.

    Args:
        actors: of `ray_session.private.living_actors`.
        nodes: of the cluster, with what is free.
    """
    progress = status.progress
    metrics = dict(progress.metrics)
    newest = status.weight_version if status.weight_version >= 0 else None  # none broadcast yet
    return {
        "run": run,
        "directory": progress.directory,
        "stage": progress.stage,
        "said_s_ago": status.age_s,
        "iteration": progress.done,
        "iterations": progress.iterations or None,
        "unit": progress.unit,
        "iterations_per_h": 3600 / progress.seconds if progress.seconds else None,
        "images_per_s": metrics.get("time/images_per_s"),
        "eta_s": progress.eta_s,
        "free_bytes": progress.free_bytes,
        "restarts": status.restarts,
        "weight_version": newest,
        "edition": newest,  # name in 0.1, kept for one release
        "roles": [
            _role(pool, actors, newest if pool.role == "sampler" else None)
            for pool in (*_single_roles(status), *status.pools)
        ],
        "user": status.driver.user,
        "host": status.driver.host,
        "pid": status.driver.pid,
        "cpus": status.reserved.cpus,
        "gpus": status.reserved.gpus,
        "quota_cpus": status.quota.cpus or None,
        "quota_gpus": status.quota.gpus or None,
        "held_back": list(status.held_back),
        "nodes": free_of(nodes),
        "metrics": metrics,
    }


def _single_roles(status: FleetStatus) -> list[PoolStatus]:
    """Learners and moments server, by role; they have no queue."""
    roles: dict[str, list[WorkerStatus]] = {}
    for worker in status.singles:
        roles.setdefault(role_of(worker.name), []).append(worker)
    return [
        PoolStatus(
            role=name,
            serving=sum(worker.state == "serving" for worker in workers),
            starting=sum(worker.state == "starting" for worker in workers),
            draining=0,
            queued=None,
            wanted=len(workers),
            workers=tuple(workers),
        )
        for name, workers in roles.items()
    ]


def _role(pool: PoolStatus, actors: Mapping[str, Mapping[str, Any]], newest: int | None) -> Status:
    def weights(worker: WorkerStatus) -> Status:
        version = None if newest is None else worker.weight_version
        behind = None if newest is None else max(newest - worker.weight_version, 0)
        return {"weight_version": version, "edition": version, "behind": behind}

    return {
        "role": pool.role,
        "serving": pool.serving,
        "starting": pool.starting,
        "leaving": pool.draining,
        "wanted": pool.wanted,
        "queued": pool.queued,
        "queue_wait_s": pool.wait_s,
        "workers": [
            {
                "name": worker.name,
                "state": worker.state,
                "node": actors.get(worker.actor, {}).get("node"),
                "pid": actors.get(worker.actor, {}).get("pid"),
                **weights(worker),
                "in_hand": worker.busy,
                "waits_for": worker.waits_for or None,
            }
            for worker in pool.workers
        ],
    }


def table(found: Mapping[str, Any]) -> Group:
    """For people."""
    roles = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("role", "state", "node", "pid", "weights", "in hand"):
        right = heading in ("pid", "weights", "in hand")
        least = PID_WIDTH if heading == "pid" else None
        roles.add_column(
            heading, justify="right" if right else "left", no_wrap=True, min_width=least
        )
    for role in found["roles"]:
        roles.add_row(role["role"], _state(role))
        for worker in role["workers"][:MAX_ROWS]:
            version, behind = worker["weight_version"], worker["behind"]
            weights = "" if version is None else f"{version}" + (f" (-{behind})" if behind else "")
            roles.add_row(
                f"  {worker['name']}",
                worker["state"],
                worker["node"] or "-",
                str(worker["pid"] or "-"),
                weights,
                str(worker["in_hand"]),
            )
        if len(role["workers"]) > MAX_ROWS:
            roles.add_row(f"  and {len(role['workers']) - MAX_ROWS} more")
    below = [*waiting(found), *free_lines(found["nodes"], MAX_ROWS), *figures(found["metrics"])]
    return Group("\n".join(headlines(found)), roles, "\n".join(below))


def waiting(found: Mapping[str, Any]) -> list[str]:
    """Workers for which there is no room, with the reason of each node."""
    return [
        f"{worker['name']} waits for room: {worker['waits_for']}"
        for role in found["roles"]
        for worker in role["workers"]
        if worker["waits_for"]
    ][:MAX_ROWS]


def _state(role: Mapping[str, Any]) -> str:
    parts = [f"{role[name]} {name}" for name in ("serving", "starting", "leaving") if role[name]]
    if role["queued"] or role["queue_wait_s"]:
        wait_s = role["queue_wait_s"]
        took = "" if wait_s is None else f" ({wait_s:.2g} s)"
        parts.append(f"{role['queued']} in queue{took}")
    return ", ".join(parts) or "none"


def headlines(found: Mapping[str, Any]) -> list[str]:
    """The run as a whole."""
    lines = [f"run {found['run']}: {found['stage']}  {found['directory']}"]
    if not found["roles"]:
        return [*lines, "its workers are not there yet"]
    parts = [f"{found['unit']} {found['iteration']} of {found['iterations'] or '?'}"]
    if found["iterations_per_h"]:
        if found["unit"] == "iteration":  # of images, the rate is below
            parts.append(f"{found['iterations_per_h']:.4g} an hour")
        parts.append(f"{timedelta(seconds=round(found['eta_s']))} left")
    if found["images_per_s"]:
        parts.append(f"{found['images_per_s']:.3g} images/s")
    parts.append(f"{found['restarts']} workers replaced")
    if found["free_bytes"] is not None:
        parts.append(f"{format_bytes(found['free_bytes'])} free on its disk")
    lines.append(", ".join(parts))
    if found["quota_cpus"] or found["quota_gpus"]:
        cpus, gpus = (
            f"{found[kind]:g} of {found[f'quota_{kind}'] or 'any number of'}"
            for kind in ("cpus", "gpus")
        )
        lines.append(f"quota: {cpus} CPUs, {gpus} GPUs")
    lines += found["held_back"]
    age = found["said_s_ago"]
    if age is None:
        lines.append("the run has not said anything yet")
    elif age > STALE_S:
        lines.append(f"this is what it said {age:.0f} s ago; it is busy, or stuck")
    return lines


def figures(metrics: Mapping[str, Any]) -> list[str]:
    """The most important of the newest metrics, one line for each group."""
    groups: dict[str, list[str]] = {}
    for name, value in metrics.items():
        if name.startswith(METRICS) and isinstance(value, (int, float)):
            kind, _, rest = name.partition("/")
            groups.setdefault(kind, []).append(f"{rest} {value:.4g}")
    return [f"{kind}: {'  '.join(parts)}" for kind, parts in groups.items()]


def starting_status(location: RunLocation) -> Status:
    """The status of a run whose fleet is starting; what is not known yet is empty."""
    directory = str(location.directory or "")
    return as_dict(location.run, FleetStatus(progress=Progress(directory=directory)), {})


def ended_status(directory: Path) -> Status:
    """The status of an ended run, and what it left: `checkpoint`, `report` and `resume`."""
    left = left_behind(directory)
    progress = Progress(stage=left.pop("stage"), directory=str(directory))
    unknown = dict.fromkeys(("iteration", "restarts"))
    found = as_dict(directory.absolute().name, FleetStatus(progress=progress), {})
    return found | unknown | {name: value or None for name, value in left.items()}


def ended_lines(found: Status) -> list[str]:
    """Of `ended_status`, for people."""
    lines = [f"last run: {found['run']}, {found['stage']}  {found['directory']}"]
    directory = Path(found["directory"])
    trains = (directory / CONFIG).is_file()  # evaluations have no checkpoints and no report
    if trains and found["stage"] != "finished":
        lines.append(f"newest checkpoint: {found['checkpoint'] or 'none: it will begin anew'}")
    if found["stage"] != "finished":
        lines.append(f"resume with\n  {found['resume']}")
    if found["report"]:
        lines.append(f"report: {found['report']}")
    elif trains:
        again = f"{command_of('learner.report')} {shlex.quote(str(directory))}"
        lines.append(f"report with\n  {again}")
    return lines


def console() -> Console:
    """A console that is wide enough for the table, unless its width is given."""
    here = make_console()
    given = here.is_terminal or os.environ.get("COLUMNS") == str(here.width)
    return here if given else make_console(width=max(here.width, WIDTH))


@contextmanager
def display(
    *, as_json: bool, live: bool, table: Callable[[Status], Group] = table
) -> Iterator[Callable[[Status], None]]:
    """Shows a status: as JSON, as a table that a terminal refreshes, or table after table."""
    if as_json:
        yield lambda found: print(dumps(found), flush=True)
        return
    screen = console()
    if live and screen.is_terminal:
        with Live(console=screen, auto_refresh=False) as refreshed:
            yield lambda found: refreshed.update(table(found), refresh=True)
    else:  # in a file, no line is broken
        yield lambda found: screen.print(table(found), soft_wrap=not screen.is_terminal)


def show_active(asked: Arguments) -> None:
    """Show a run that is starting or active: once, or until it ends.

    Raises:
        LastRunError: it has ended.
        FleetError: there is no run, or it cannot be reached.
    """
    location = find_run(asked.run, asked.address)
    with display(as_json=asked.json, live=bool(asked.watch)) as show:
        while not location.address:
            check_alive(location)
            show(starting_status(location))
            if not asked.watch:
                return
            time.sleep(asked.watch)
            if location.directory:
                location = read_discovery_file(location.directory)
        ending = contextlib.suppress(RunEndedError) if asked.watch else contextlib.nullcontext()
        with connect_to_run(location) as run, ending:
            while True:
                show(as_dict(run.name, run.status(), living_actors(), cluster_nodes()))
                if not asked.watch:
                    return
                time.sleep(asked.watch)
                if location.directory and not (location.directory / DISCOVERY_FILE).is_file():
                    break
    print("the run has ended", file=sys.stderr)


def show_all(asked: Arguments) -> None:
    """Show all runs on a cluster: once, or until Ctrl-C.

    Raises:
        FleetError: there is no cluster, or it cannot be reached.
    """
    with (
        joined_cluster(asked.address) as look,
        display(as_json=asked.json, live=bool(asked.watch), table=overview) as show,
    ):
        show(look())
        while asked.watch:
            time.sleep(asked.watch)
            show(look())


def report(asked: Arguments) -> None:
    """Show a run, also one that has ended; errors as `show_active`, but for LastRunError."""
    if asked.all:
        show_all(asked)
        return
    try:
        show_active(asked)
    except LastRunError as error:
        found = ended_status(error.directory)
        print(dumps(found) if asked.json else "\n".join(ended_lines(found)), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    try:
        asked = tyro.cli(Arguments, args=arguments, prog=command_of("cluster.status"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    return exit_status(lambda: report(asked))
