"""How another process speaks with a running fleet: a small named actor between the two.

The run asks it, whenever it waits for something, what is wanted, and tells it how things are;
`python -m cluster.scale`, `cluster.status` and `cluster.stop` leave requests with it and read the
answers. It answers by itself, also while the run is busy.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.control.discovery import (
    RunLocation,
    check_alive,
    killed_error,
    not_on_cluster_error,
    still_starting,
)
from cluster.errors import FleetError
from cluster.ray_session.session import RayConfig, RaySession, find_cluster

NAMESPACE = "tessera"
PREFIX = "fleet:"
ANSWER_S = 30.0  # longest wait for the control actor itself


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One worker, for whoever asks."""

    name: str
    state: str
    actor: str
    """Ray's id of it, which leads to its node and process."""
    weight_version: int = 0
    """Of a sampler: version of the weights it was sent last."""
    busy: int = 0
    """Requests it has in hand."""


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
    wait_s: float | None = None
    """How long work waited lately, on average; None: there was none yet."""
    workers: tuple[WorkerStatus, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is."""

    stage: str = "starting"
    directory: str = ""
    done: int = 0
    """Iterations behind it."""
    iterations: int = 0
    """Iterations that there are to be; 0: not known yet."""
    seconds: float = 0.0
    """Of an iteration, on average over the last ones; 0: not known yet."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The newest line of the records."""
    free_bytes: int | None = None
    """Room on the disk of the run directory; None: not known yet."""

    @property
    def eta_s(self) -> float | None:
        """Seconds until the last iteration; None: not known yet."""
        return (self.iterations - self.done) * self.seconds if self.seconds else None


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetStatus:
    """What a fleet last said of itself."""

    pools: tuple[PoolStatus, ...] = ()
    """What can be scaled."""
    singles: tuple[WorkerStatus, ...] = ()
    """Learners and moments server."""
    restarts: int = 0
    weight_version: int = 0
    """Of the newest weights."""
    progress: Progress = field(default_factory=Progress)
    age_s: float | None = None
    """How long ago it was said; None: nothing was yet."""
    answered: int = 0
    """Number of the newest request that was carried out or refused."""
    refusals: tuple[tuple[int, str], ...] = ()
    """(number of the request, why it was refused)."""

    def pool(self, role: str) -> PoolStatus | None:
        return next((pool for pool in self.pools if pool.role == role), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleRequest:
    """Workers that somebody wants a role to have."""

    number: int
    role: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequest:
    """Somebody wants the run to end at the next safe point."""

    number: int
    checkpoint: bool
    """Whether it is to write a checkpoint first."""


class ControlActor:
    """The actor: requests in one direction, status in the other."""

    def __init__(self) -> None:
        self._requests: list[ScaleRequest | StopRequest] = []
        self._numbers = 0
        self._status = FleetStatus()
        self._told: float | None = None

    def scale(self, role: str, count: int) -> int:
        """Leave a request; returns its number."""
        return self._leave(ScaleRequest(number=self._numbers + 1, role=role, count=count))

    def stop(self, checkpoint: bool) -> int:
        """Leave the request that the run ends; returns its number."""
        return self._leave(StopRequest(number=self._numbers + 1, checkpoint=checkpoint))

    def _leave(self, request: ScaleRequest | StopRequest) -> int:
        self._numbers = request.number
        self._requests.append(request)
        return request.number

    def exchange(self, status: FleetStatus) -> list[ScaleRequest | StopRequest]:
        """The fleet's side: tell its status, and take what is wanted since the last call."""
        self._status, self._told = status, time.monotonic()
        requests, self._requests = self._requests, []
        return requests

    def status(self) -> FleetStatus:
        age = None if self._told is None else time.monotonic() - self._told
        return replace(self._status, age_s=age)


def start_control_actor(run: str) -> Any:
    """Start the control actor of a run; it ends with the process that started it.

    Raises:
        FleetError: a run of this name is active on the cluster.
    """
    import ray

    options = {"name": PREFIX + run, "namespace": NAMESPACE, "num_cpus": 0}
    try:
        return ray.remote(ControlActor).options(**options).remote()
    except ValueError as error:
        raise FleetError(
            f"a run named {run!r} is active on this cluster already: end it, or choose another "
            "--run-dir"
        ) from error


def find_control_actor(run: str) -> tuple[str, Any]:
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


@dataclass(frozen=True, kw_only=True)
class RunSelection:
    """What every command beside a run is told."""

    run: str = ""
    """Name of the run, or its directory; empty takes the newest that is active under runs/, else
    the only active one."""
    address: str = ""
    """Ray cluster of the run; empty: as its directory says, else $RAY_ADDRESS, else this machine's
    (`ray start`)."""


@dataclass(frozen=True)
class RunConnection:
    """A running fleet, as another process reaches it."""

    name: str
    control: Any
    place: RunLocation


@contextmanager
def connect_to_run(place: RunLocation) -> Iterator[RunConnection]:
    """Join a run's cluster, for as long as the block runs.

    Args:
        place: of `locate_run`.

    Raises:
        FleetError: the run is starting, was killed, or cannot be reached; within seconds.
    """
    check_alive(place)
    if not place.address:
        raise FleetError(f"{still_starting(place)}. Try again in a moment")
    cluster = find_cluster(RayConfig(address=place.address), place.source)
    with RaySession(RayConfig(), cluster):
        try:
            name, control = find_control_actor(place.run)
        except FleetError as error:
            known = place.directory is not None
            raise (
                killed_error(place) if known else not_on_cluster_error(place.run, error)
            ) from None
        yield RunConnection(name, control, place)


class RunEndedError(FleetError):
    """The run that was spoken with is not there any more."""


def control_answer(ref: Any) -> Any:
    """An answer of the control actor.

    Raises:
        RunEndedError: it is gone.
        FleetError: it did not answer in time.
    """
    from ray.exceptions import RayActorError

    from cluster.ray_session.calls import answer

    try:
        return answer(ref, "the run's control actor", ANSWER_S)
    except RayActorError:
        raise RunEndedError("the run has ended") from None
