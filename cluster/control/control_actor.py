"""The control actor: a small named Ray actor between a running fleet and the commands beside it.

The driver sends it status and takes requests; `python -m cluster.scale`, `cluster.status` and
`cluster.stop` leave requests and read the status. It answers while the driver is busy.
"""

from __future__ import annotations

import os
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.control.discovery import (
    RunLocation,
    check_alive,
    find_run,
    killed_error,
    not_on_cluster_error,
)
from cluster.errors import FleetError
from cluster.program.invocation import command_of
from cluster.ray_session.address import user_name
from cluster.ray_session.session import RayConfig, RaySession, find_cluster
from cluster.roles import QuotaConfig
from cluster.scheduling.quota import Share
from cluster.scheduling.weight_versions import NO_WEIGHTS

NAMESPACE = "tessera"
PREFIX = "fleet:"
ANSWER_S = 30.0  # longest wait for an answer of the control actor
POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One worker."""

    name: str
    state: str
    actor: str
    """Ray's id of the actor."""
    weight_version: int = NO_WEIGHTS
    """Of a sampler: version of the weights it was sent last."""
    busy: int = 0
    """Requests that it is processing."""
    waits_for: str = ""
    """Of one that starts: why no node had room for it; empty if one had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """The workers of one role."""

    role: str
    serving: int
    starting: int
    draining: int
    queued: int | None
    """Tasks that wait for a worker; None: the role has no queue."""
    wanted: int
    """Target number of workers."""
    wait_s: float | None = None
    """Recent average queue wait, seconds; None: no task yet."""
    workers: tuple[WorkerStatus, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run or an evaluation is."""

    stage: str = "starting"
    directory: str = ""
    done: int = 0
    """Finished iterations; of an evaluation, images."""
    iterations: int = 0
    """Of the whole run; 0: not known yet."""
    unit: str = "iteration"
    """What is counted: "iteration" or "image"."""
    seconds: float = 0.0
    """Of one of them, a recent average; 0: not known yet."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Newest line of metrics."""
    free_bytes: int | None = None
    """Free space on the disk of the run directory; None: not known yet."""

    @property
    def eta_s(self) -> float | None:
        """Seconds until the last iteration; None: not known yet."""
        return (self.iterations - self.done) * self.seconds if self.seconds else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """Whose process a run is, and where."""

    user: str = ""
    host: str = ""
    pid: int = 0

    @classmethod
    def this_process(cls) -> Driver:
        return cls(user=user_name(os.getuid()), host=socket.gethostname(), pid=os.getpid())


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetStatus:
    """The status that a fleet last sent."""

    pools: tuple[PoolStatus, ...] = ()
    """Roles that can be scaled."""
    singles: tuple[WorkerStatus, ...] = ()
    """Learners and moments server."""
    restarts: int = 0
    weight_version: int = NO_WEIGHTS
    """Of the newest weights."""
    progress: Progress = field(default_factory=Progress)
    age_s: float | None = None
    """Seconds since it was sent; None: none was sent yet."""
    answered: int = 0
    """Number of the newest request that was carried out or refused."""
    refusals: tuple[tuple[int, str], ...] = ()
    """(number of the request, why it was refused)."""
    driver: Driver = field(default_factory=Driver)
    reserved: Share = field(default_factory=Share)
    """What its workers count for."""
    quota: QuotaConfig = field(default_factory=QuotaConfig)
    held_back: tuple[str, ...] = ()
    """Why the autoscaler starts no more workers, for each role that it would add to."""

    def pool(self, role: str) -> PoolStatus | None:
        return next((pool for pool in self.pools if pool.role == role), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleRequest:
    """Set the number of workers of a role."""

    number: int
    role: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequest:
    """End the run at the next safe point."""

    number: int
    checkpoint: bool
    """Whether to write a checkpoint first."""


class ControlActor:
    """Holds requests until the driver takes them, and the newest status of the fleet."""

    def __init__(self, driver: Driver | None = None) -> None:
        self._driver = driver or Driver()
        self._requests: list[ScaleRequest | StopRequest] = []
        self._numbers = 0
        self._status = FleetStatus()
        self._received: float | None = None

    def scale(self, role: str, count: int) -> int:
        """Add a request; returns its number."""
        return self._add(ScaleRequest(number=self._numbers + 1, role=role, count=count))

    def stop(self, checkpoint: bool) -> int:
        """Add a request; returns its number."""
        return self._add(StopRequest(number=self._numbers + 1, checkpoint=checkpoint))

    def _add(self, request: ScaleRequest | StopRequest) -> int:
        self._numbers = request.number
        self._requests.append(request)
        return request.number

    def exchange(self, status: FleetStatus) -> list[ScaleRequest | StopRequest]:
        """Of the driver: store its status; returns the requests since the last call."""
        self._status, self._received = status, time.monotonic()
        requests, self._requests = self._requests, []
        return requests

    def status(self) -> FleetStatus:
        age = None if self._received is None else time.monotonic() - self._received
        return replace(self._status, age_s=age, driver=self._driver)


def start_control_actor(run: str) -> Any:
    """Start the control actor of a run; it ends with this process.

    Raises:
        FleetError: a run of this name is active on the cluster.
    """
    import ray

    status = command_of("cluster.status")
    options = {"name": PREFIX + run, "namespace": NAMESPACE, "num_cpus": 0}
    try:
        return ray.remote(ControlActor).options(**options).remote(Driver.this_process())
    except ValueError as error:
        raise FleetError(
            f"a run named {run!r} is active on this cluster already (`{status} --all` shows whose "
            "it is): end it, or choose another --run-dir"
        ) from error


def active_runs() -> list[str]:
    """Names of all runs on the cluster that this process has joined."""
    from ray.util import list_named_actors

    return sorted(
        entry["name"].removeprefix(PREFIX)
        for entry in list_named_actors(all_namespaces=True)
        if entry["namespace"] == NAMESPACE and entry["name"].startswith(PREFIX)
    )


def control_actor(run: str) -> Any:
    """The control actor of a run.

    Raises:
        ValueError: there is none.
    """
    import ray

    return ray.get_actor(PREFIX + run, namespace=NAMESPACE)


def find_control_actor(run: str) -> tuple[str, Any]:
    """Name and control actor of a run on the cluster that this process has joined.

    Args:
        run: its name; empty: the only run.

    Raises:
        SeveralRunsError: none was named, and there are several.
        FleetError: no such run.
    """
    found = active_runs()
    if run and run not in found:
        there = f"the runs there are {', '.join(found)}" if found else "no run is active there"
        raise FleetError(f"no run named {run!r} on this cluster: {there}")
    if not found:
        raise FleetError("no run is active on this cluster")
    if not run and len(found) > 1:
        raise SeveralRunsError(
            f"several runs are active: choose one with --run ({', '.join(found)})"
        )
    name = run or found[0]
    return name, control_actor(name)


@dataclass(frozen=True, kw_only=True)
class RunSelection:
    """Options by which a command selects a run."""

    run: str = ""
    """Name of the run, or its directory; empty: the only active run under runs/, else the only
    active one."""
    address: str = ""
    """Ray cluster of the run; empty: from its directory, else $RAY_ADDRESS, else this machine's
    (`ray start`)."""

    @contextmanager
    def connect(self) -> Iterator[RunConnection]:
        """Find the run and join its cluster while the block runs.

        Raises:
            FleetError: the run is starting, has ended, or cannot be reached; within seconds.
        """
        with connect_to_run(find_run(self.run, self.address)) as connection:
            yield connection


class SeveralRunsError(FleetError):
    """A command did not say which of several runs it is meant for."""


class RunEndedError(FleetError):
    """The run ended while a command was connected to it."""


@dataclass(frozen=True)
class RunConnection:
    """A running fleet, as another process reaches it."""

    name: str
    control: Any
    location: RunLocation

    def call(self, method: str, *arguments: Any) -> Any:
        """Call the control actor.

        Raises:
            RunEndedError: it is gone.
            FleetError: it did not answer in time.
        """
        from ray.exceptions import RayActorError

        from cluster.ray_session.calls import answer

        try:
            reference = getattr(self.control, method).remote(*arguments)
            return answer(reference, "the run's control actor", ANSWER_S)
        except RayActorError:
            raise RunEndedError("the run has ended") from None

    def status(self) -> FleetStatus:
        found: FleetStatus = self.call("status")
        return found

    def check_meant(self, named: str) -> None:
        """Check that a command which changes the run was meant for it.

        Args:
            named: --run of the command; empty: it took the only run on the cluster.

        Raises:
            FleetError: that is another user's.
        """
        if named or self.location.directory is not None:
            return
        driver = self.status().driver
        if driver.user != user_name(os.getuid()):
            raise FleetError(
                f"the only run on this cluster is {self.name}, of {driver.user} on {driver.host}: "
                f"to change it, name it by --run {shlex.quote(self.name)}"
            )

    def await_status(
        self,
        ready: Callable[[FleetStatus], bool],
        timeout_s: float,
        too_late: Callable[[FleetStatus], str],
    ) -> FleetStatus:
        """Poll the status until it is ready.

        Raises:
            FleetError: it was not in time; the message is `too_late(status)`.
        """
        deadline = time.monotonic() + timeout_s
        while not ready(status := self.status()):
            if time.monotonic() > deadline:
                raise FleetError(too_late(status))
            time.sleep(POLL_S)
        return status


@contextmanager
def connect_to_run(location: RunLocation) -> Iterator[RunConnection]:
    """Join the cluster of a run while the block runs; errors as `RunSelection.connect`."""
    check_alive(location)
    if not location.address:
        raise FleetError(
            f"the run {location.run} is starting (process {location.pid} on {location.host}): its "
            "workers are not there yet. Try again in a moment"
        )
    cluster = find_cluster(RayConfig(address=location.address), location.source)
    with RaySession(RayConfig(), cluster):
        try:
            name, control = find_control_actor(location.run)
        except SeveralRunsError:
            raise
        except FleetError as error:
            if location.directory is not None:
                raise killed_error(location.directory) from None
            raise not_on_cluster_error(location.run, error) from None
        yield RunConnection(name, control, location)
