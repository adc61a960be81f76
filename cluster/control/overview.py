"""All runs on a cluster, for `cluster.status --all`: whose they are, and what they reserve."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from cluster.control.control_actor import FleetStatus, active_runs, control_actor
from cluster.ray_session.address import AUTO, written_address
from cluster.ray_session.session import RayConfig, RaySession, find_cluster
from cluster.spans import role_of

ANSWER_S = 5.0  # longest wait for the control actors of all runs together
STALE_S = 10.0  # an older status is pointed out


@contextmanager
def joined_cluster(address: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """Join a cluster while the block runs; yields a function that looks at its runs, as JSON's
    values.

    Args:
        address: empty: $RAY_ADDRESS, else the cluster on this machine.

    Raises:
        ConfigError, FleetError: it cannot be reached; within seconds.
    """
    text, source = written_address(address or AUTO, "--address")
    cluster = find_cluster(RayConfig(address=text), source)
    with RaySession(RayConfig(), cluster) as session:
        yield lambda: {
            "cluster": session.address,
            **_resources(),
            "runs": [_described(name, status) for name, status in _statuses(active_runs())],
        }


def _resources() -> dict[str, Any]:
    """What the cluster has, and what is free of it."""
    import ray

    there, free = ray.cluster_resources(), ray.available_resources()
    return {
        "nodes": sum(node["Alive"] for node in ray.nodes()),
        "cpus": there.get("CPU", 0.0),
        "cpus_free": free.get("CPU", 0.0),
        "gpus": there.get("GPU", 0.0),
        "gpus_free": free.get("GPU", 0.0),
    }


def _statuses(names: Sequence[str]) -> list[tuple[str, FleetStatus | None]]:
    """The status of each run; None: its control actor does not answer. Ended ones are left out."""
    import ray
    from ray.exceptions import RayActorError

    asked: dict[Any, str] = {}
    for name in names:
        try:
            asked[control_actor(name).status.remote()] = name
        except ValueError:  # it has ended since
            continue
    if not asked:
        return []
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    found: list[tuple[str, FleetStatus | None]] = [(asked[ref], None) for ref in late]
    for ref in ready:
        try:
            found.append((asked[ref], ray.get(ref)))
        except RayActorError:
            continue
    return sorted(found, key=lambda each: each[0])


def _described(name: str, status: FleetStatus | None) -> dict[str, Any]:
    try:
        return run_as_dict(name, status)
    except AttributeError:  # a status without the newest fields: another user's environment
        return _unknown(name, "another version of Tessera")


def _unknown(name: str, stage: str) -> dict[str, Any]:
    known = run_as_dict(name, FleetStatus())
    return dict.fromkeys(known) | {"run": name, "stage": stage}


def run_as_dict(name: str, status: FleetStatus | None) -> dict[str, Any]:
    """One run, ready for JSON; of one that does not answer, only its name is not None."""
    if status is None:
        return _unknown(name, "no answer")
    progress, quota = status.progress, status.quota
    workers = {pool.role: pool.serving + pool.starting for pool in status.pools}
    for single in status.singles:
        workers[role_of(single.name)] = workers.get(role_of(single.name), 0) + 1
    return {
        "run": name,
        "user": status.driver.user,
        "host": status.driver.host,
        "pid": status.driver.pid,
        "stage": progress.stage,
        "directory": progress.directory,
        "unit": progress.unit,
        "iteration": progress.done,
        "iterations": progress.iterations or None,
        "eta_s": progress.eta_s,
        "said_s_ago": status.age_s,
        "workers": workers,
        "cpus": status.reserved.cpus,
        "gpus": status.reserved.gpus,
        "quota_cpus": quota.cpus or None,
        "quota_gpus": quota.gpus or None,
        "held_back": list(status.held_back),
    }


def overview(found: Mapping[str, Any]) -> Group:
    """For people."""
    about = (
        f"cluster {found['cluster']}: {found['nodes']} nodes, {found['cpus_free']:g} of "
        f"{found['cpus']:g} CPUs and {found['gpus_free']:g} of {found['gpus']:g} GPUs are free"
    )
    if not found["runs"]:
        return Group(about, "no run is active on it")
    rows = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("run", "user", "driver", "state", "done", "workers", "CPUs", "GPUs"):
        right = heading in ("CPUs", "GPUs")
        short = heading in ("run", "user", "state")  # the others wrap in a narrow terminal
        rows.add_column(heading, justify="right" if right else "left", no_wrap=short)
    notes = []
    for run in found["runs"]:
        if run["user"] is None:
            rows.add_row(run["run"], "-", "-", run["stage"])
            continue
        left = "" if run["eta_s"] is None else f", {timedelta(seconds=round(run['eta_s']))} left"
        rows.add_row(
            run["run"],
            run["user"],
            f"{run['host']} {run['pid']}",
            _state(run),
            f"{run['unit']} {run['iteration']} of {run['iterations'] or '?'}{left}",
            ", ".join(f"{count} {role}" for role, count in run["workers"].items()) or "-",
            _of_quota(run["cpus"], run["quota_cpus"]),
            _of_quota(run["gpus"], run["quota_gpus"]),
        )
        notes += [f"{run['run']}: {why}" for why in run["held_back"]]
    return Group(about, rows, *notes)


def _state(run: Mapping[str, Any]) -> str:
    age = run["said_s_ago"]
    return run["stage"] + (f" (said {age:.0f} s ago)" if age is not None and age > STALE_S else "")


def _of_quota(reserved: float, quota: float | None) -> str:
    return f"{reserved:g}" if quota is None else f"{reserved:g} of {quota:g}"
