"""How a running job is: roles and workers, iteration, rate, newest metrics.

python -m cluster.status                     the newest run under runs/
python -m cluster.status --run NAME          another one: a name, or its directory
python -m cluster.status --watch 5           again and again
python -m cluster.status --json              for programs

A run that is not active any more is shown, too: how it ended, what it left, how to go on. The exit
status is 0 where a run is shown, however it is, and 1 where there is none or it cannot be reached.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program.start import run_command

    sys.exit(run_command("cluster.status"))

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    RunConnection,
    RunEndedError,
    RunSelection,
    WorkerStatus,
    connect_to_run,
    control_answer,
)
from cluster.control.discovery import (
    LastRunError,
    RunLocation,
    check_alive,
    find_run,
    left_behind,
    read_discovery_file,
)
from cluster.io.run_layout import DISCOVERY_FILE
from cluster.io.strict_json import dumps
from cluster.program.console import REFUSED, exit_status, make_console
from cluster.program.invocation import command_of
from cluster.ray_session.object_store import format_bytes
from cluster.ray_session.private import living_actors

WIDTH = 120  # columns, where there is no terminal
PID_WIDTH = 8
SHOWN = 16  # workers of a role in the table; --json has all
QUIET_S = 10.0  # a run that has said nothing for so long is named
LEFT = ("checkpoint", "report", "resume")  # of a run that has ended
FIGURES = ("fid/", "reward/", "policy/entropy", "policy/reference_kl", "staleness/", "guards/")


@dataclass(frozen=True, kw_only=True)
class Arguments(RunSelection):
    """Show how a running job is."""

    watch: float = 0.0
    """Seconds between looks, until the run ends or Ctrl-C; 0 looks once."""
    json: bool = False
    """Print one JSON object (with --watch one a line) instead of tables."""

    def __post_init__(self) -> None:
        if not 0 <= self.watch < 1e6:
            raise ValueError(f"watch must be seconds, >= 0, found {self.watch}")


def as_dict(
    run: str, status: FleetStatus, actors: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Everything that is known of a run, ready for JSON.

    Args:
        actors: of `ray_private.living_actors`.
    """
    progress = status.progress
    metrics = dict(progress.metrics)
    newest = _newest_weights(status)
    return {
        "run": run,
        "directory": progress.directory,
        "stage": progress.stage,
        "said_s_ago": status.age_s,
        "iteration": progress.done,
        "iterations": progress.iterations or None,
        "iterations_per_h": 3600 / progress.seconds if progress.seconds else None,
        "images_per_s": metrics.get("time/images_per_s"),
        "eta_s": progress.eta_s,
        "free_bytes": progress.free_bytes,
        "restarts": status.restarts,
        "weight_version": newest,
        "edition": newest,  # name in 0.1, kept for one release
        "roles": [
            *(_role_of_singles(name, workers, actors) for name, workers in _singles(status)),
            *(_role(pool, status, actors) for pool in status.pools),
        ],
        "metrics": metrics,
    }


def _newest_weights(status: FleetStatus) -> int | None:
    """Policy version of the newest weights; None before the first broadcast."""
    return status.weight_version if status.weight_version >= 0 else None


def _role(
    pool: PoolStatus, status: FleetStatus, actors: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    newest = _newest_weights(status) if pool.role == "sampler" else None
    return {
        "role": pool.role,
        "serving": pool.serving,
        "starting": pool.starting,
        "leaving": pool.draining,
        "wanted": pool.wanted,
        "queued": pool.queued,
        "queue_wait_s": pool.wait_s,
        "workers": [_worker(worker, actors, newest) for worker in pool.workers],
    }


def _role_of_singles(
    name: str, workers: list[WorkerStatus], actors: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        "role": name,
        "serving": sum(worker.state == "serving" for worker in workers),
        "starting": sum(worker.state == "starting" for worker in workers),
        "leaving": 0,
        "wanted": len(workers),
        "queued": None,  # there is no queue
        "queue_wait_s": None,
        "workers": [_worker(worker, actors, None) for worker in workers],
    }


def _worker(
    worker: WorkerStatus, actors: Mapping[str, Mapping[str, Any]], newest: int | None
) -> dict[str, Any]:
    actor = actors.get(worker.actor, {})
    return {
        "name": worker.name,
        "state": worker.state,
        "node": actor.get("node"),
        "pid": actor.get("pid"),
        "weight_version": None if newest is None else worker.weight_version,
        "edition": None if newest is None else worker.weight_version,
        "behind": None if newest is None else max(newest - worker.weight_version, 0),
        "in_hand": worker.busy,
    }


def _singles(status: FleetStatus) -> Iterable[tuple[str, list[WorkerStatus]]]:
    """Learners and moments server, by role."""
    roles: dict[str, list[WorkerStatus]] = {}
    for worker in status.singles:
        role, _, number = worker.name.rpartition("-")
        roles.setdefault(role if number.isdigit() else worker.name, []).append(worker)
    return roles.items()


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
        for worker in role["workers"][:SHOWN]:
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
        if len(role["workers"]) > SHOWN:
            roles.add_row(f"  and {len(role['workers']) - SHOWN} more")
    return Group("\n".join(headlines(found)), roles, "\n".join(figures(found["metrics"])))


def _state(role: Mapping[str, Any]) -> str:
    parts = [f"{role[name]} {name}" for name in ("serving", "starting", "leaving") if role[name]]
    if role["queued"] or role["queue_wait_s"]:
        wait_s = role["queue_wait_s"]
        took = "" if wait_s is None else f" ({wait_s:.2g} s)"
        parts.append(f"{role['queued']} in queue{took}")
    return ", ".join(parts) or "none"


def headlines(found: Mapping[str, Any]) -> list[str]:
    """What is known of the run as a whole."""
    lines = [f"run {found['run']}: {found['stage']}  {found['directory']}"]
    if not found["roles"]:
        return [*lines, "its workers are not there yet"]
    parts = [f"iteration {found['iteration']} of {found['iterations'] or '?'}"]
    if found["iterations_per_h"]:
        parts.append(f"{found['iterations_per_h']:.4g} an hour")
        parts.append(f"{timedelta(seconds=round(found['eta_s']))} left")
    if found["images_per_s"]:
        parts.append(f"{found['images_per_s']:.3g} images/s")
    parts.append(f"{found['restarts']} workers replaced")
    if found["free_bytes"] is not None:
        parts.append(f"{format_bytes(found['free_bytes'])} free on its disk")
    lines.append(", ".join(parts))
    age = found["said_s_ago"]
    if age is None:
        lines.append("the run has not said anything yet")
    elif age > QUIET_S:
        lines.append(f"this is what it said {age:.0f} s ago; it is busy, or stuck")
    return lines


def figures(metrics: Mapping[str, Any]) -> list[str]:
    """The newest metrics that say how it goes, a line each group."""
    groups: dict[str, list[str]] = {}
    for name, value in metrics.items():
        if name.startswith(FIGURES) and isinstance(value, (int, float)):
            kind, _, rest = name.partition("/")
            groups.setdefault(kind, []).append(f"{rest} {value:.4g}")
    return [f"{kind}: {'  '.join(parts)}" for kind, parts in groups.items()]


def console() -> Console:
    """Wide enough for the table where nobody says how wide it is."""
    here = make_console()
    told = here.is_terminal or os.environ.get("COLUMNS") == str(here.width)
    return here if told else make_console(width=max(here.width, WIDTH))


def look(run: RunConnection) -> dict[str, Any]:
    """How the run is now."""
    return as_dict(run.name, control_answer(run.control.status.remote()), living_actors())


def before_its_fleet(place: RunLocation) -> dict[str, Any]:
    """The same of a run that is starting: everything that is not known yet is empty."""
    directory = str(place.directory or "")
    return as_dict(place.run, FleetStatus(progress=Progress(directory=directory)), {})


def after_its_end(directory: Path) -> dict[str, Any]:
    """The same of a run that is not active any more, and what it left: `checkpoint`, `report` and
    `resume`. What only a fleet would know is empty."""
    left = left_behind(directory)
    progress = Progress(stage=left["stage"], directory=str(directory))
    unknown = dict.fromkeys(("iteration", "restarts", "weight_version", "edition"))
    found = as_dict(directory.absolute().name, FleetStatus(progress=progress), {})
    return found | unknown | {name: left[name] or None for name in LEFT}


def last_lines(found: Mapping[str, Any]) -> list[str]:
    """What `after_its_end` found, for people."""
    lines = [f"last run: {found['run']}, {found['stage']}  {found['directory']}"]
    if found["report"]:
        return [*lines, f"report: {found['report']}"]
    newest = found["checkpoint"] or "none: it will begin anew"
    return [*lines, f"newest checkpoint: {newest}", f"resume with\n  {found['resume']}"]


def watch(run: RunConnection, show: Callable[[dict[str, Any]], None], seconds: float) -> None:
    """Show it again and again, until the run ends."""
    while not _ended(run.place):
        show(look(run))
        time.sleep(seconds)


def await_fleet(
    place: RunLocation, show: Callable[[dict[str, Any]], None], seconds: float
) -> RunLocation:
    """Show again and again that a run is starting, until it has its fleet.

    Raises:
        LastRunError: it has ended before that.
    """
    while not place.address:
        check_alive(place)
        show(before_its_fleet(place))
        time.sleep(seconds)
        place = read_discovery_file(place.directory) if place.directory else place
    return place


def _ended(place: RunLocation) -> bool:
    return place.directory is not None and not (place.directory / DISCOVERY_FILE).is_file()


@contextmanager
def shown(*, as_json: bool, live: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Shows a status: as JSON, as a table that a terminal refreshes, or table after table."""
    if as_json:
        yield lambda found: print(dumps(found), flush=True)
        return
    here = console()
    if not here.is_terminal:  # without a break in a line of text
        yield lambda found: here.print(table(found), soft_wrap=True)
        return
    if not live:
        yield lambda found: here.print(table(found))
        return
    with Live(console=here, auto_refresh=False) as screen:
        yield lambda found: screen.update(table(found), refresh=True)


def report(asked: Arguments) -> None:
    """Look once, or until the run ends; one that has ended is shown as it left its directory.

    Raises:
        FleetError: there is no run, or it cannot be reached.
    """
    try:
        look_or_watch(asked)
    except LastRunError as error:
        found = after_its_end(error.directory)
        print(dumps(found) if asked.json else "\n".join(last_lines(found)), flush=True)


def look_or_watch(asked: Arguments) -> None:
    """Look once, or until the run ends, at one that is active.

    Raises:
        LastRunError: it is not active any more.
        FleetError: as `report`.
    """
    place = find_run(asked.run, asked.address)
    with shown(as_json=asked.json, live=bool(asked.watch)) as show:
        if not place.address and not asked.watch:
            check_alive(place)
            show(before_its_fleet(place))
            return
        place = await_fleet(place, show, asked.watch)
        with connect_to_run(place) as run:
            if asked.watch:
                with contextlib.suppress(RunEndedError):  # told below, however it was noticed
                    watch(run, show, asked.watch)
            else:
                show(look(run))
    if asked.watch:
        print("the run has ended", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    try:
        asked = tyro.cli(Arguments, args=arguments, prog=command_of("cluster.status"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    return exit_status(lambda: report(asked))
