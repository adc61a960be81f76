"""How another process speaks with a running fleet: a small named actor between the two.

The run asks it, whenever it waits for groups, what is wanted, and tells it what the fleet is like;
`python -m cluster.scale` leaves wishes with it and reads the answers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import FleetError
from cluster.files import replacing

NAMESPACE = "tessera"
PREFIX = "fleet:"
WHEREABOUTS = "fleet.json"
AUTH_MODE, TOKEN = "RAY_AUTH_MODE", "token"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """One role's workers, for whoever asks."""

    role: str
    serving: int
    starting: int
    draining: int
    queued: int
    """Pieces of work that wait for a worker."""
    wanted: int
    """Workers that there are to be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetStatus:
    """What a fleet last said of itself."""

    pools: tuple[PoolStatus, ...] = ()
    restarts: int = 0
    answered: int = 0
    """Number of the newest wish that was carried out or refused."""
    refusals: tuple[tuple[int, str], ...] = ()
    """(number of the wish, why it was refused)."""

    def pool(self, role: str) -> PoolStatus | None:
        return next((pool for pool in self.pools if pool.role == role), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Workers that somebody wants a role to have."""

    number: int
    role: str
    count: int


class Control:
    """The actor: wishes in one direction, status in the other."""

    def __init__(self) -> None:
        self._wishes: list[Wish] = []
        self._numbers = 0
        self._status = FleetStatus()

    def ask(self, role: str, count: int) -> int:
        """Leave a wish; returns its number."""
        self._numbers += 1
        self._wishes.append(Wish(number=self._numbers, role=role, count=count))
        return self._numbers

    def exchange(self, status: FleetStatus) -> list[Wish]:
        """The fleet's side: tell its status, and take what is wanted since the last call."""
        self._status = status
        wishes, self._wishes = self._wishes, []
        return wishes

    def status(self) -> FleetStatus:
        return self._status


@contextmanager
def announced(directory: Path, address: str) -> Iterator[None]:
    """While the block runs, a file in the run's directory says which cluster it is on."""
    file = directory / WHEREABOUTS
    token = os.environ.get(AUTH_MODE) == TOKEN  # Ray says so once it has turned it on
    with replacing(file) as partial:
        found = {"run": directory.name, "address": address, "token_authentication": token}
        partial.write_text(json.dumps(found) + "\n")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def whereabouts(directory: Path) -> tuple[str, str]:
    """Name of the run in a directory, and the address of its cluster. Where that asks for a token,
    this process will show the user's (Ray would not by itself, for a cluster named by address);
    Ray must not have been imported yet.

    Raises:
        FleetError: nothing runs there, or the file is damaged.
    """
    file = directory / WHEREABOUTS
    try:
        found = json.loads(file.read_text())
        if found["token_authentication"]:
            os.environ.setdefault(AUTH_MODE, TOKEN)
        return str(found["run"]), str(found["address"])
    except FileNotFoundError:
        raise FleetError(
            f"no run is active in {directory}: it has ended, or was started with --inline"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FleetError(
            f"{file} cannot be read ({error}): name the cluster by --address"
        ) from None


def start_control(run: str) -> Any:
    """Start the control actor of a run; it ends with the process that started it.

    Raises:
        FleetError: a run of this name is active on the cluster.
    """
    import ray

    options = {"name": PREFIX + run, "namespace": NAMESPACE, "num_cpus": 0}
    try:
        return ray.remote(Control).options(**options).remote()
    except ValueError as error:
        raise FleetError(
            f"a run named {run!r} is active on this cluster already: end it, or choose another "
            "--run-dir"
        ) from error


def find_control(run: str) -> tuple[str, Any]:
    """The control actor of a run on the cluster that this process has joined.

    Args:
        run: its name; empty takes the only run there is.

    Raises:
        FleetError: no such run, or several to choose from.
    """
    import ray
    from ray.util import list_named_actors

    found = sorted(
        entry["name"].removeprefix(PREFIX)
        for entry in list_named_actors(all_namespaces=True)
        if entry["namespace"] == NAMESPACE and entry["name"].startswith(PREFIX)
    )
    if run and run not in found:
        there = f"the runs there are {', '.join(found)}" if found else "no run is active there"
        raise FleetError(f"no run named {run!r} on this cluster: {there}")
    if not found:
        raise FleetError("no run is active on this cluster")
    if not run and len(found) > 1:
        raise FleetError(f"several runs are active: choose one with --run ({', '.join(found)})")
    name = run or found[0]
    return name, ray.get_actor(PREFIX + name, namespace=NAMESPACE)
