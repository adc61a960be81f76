"""Scales the pools: by queue wait, and by requests of other processes (`cluster.scale`)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from cluster import clock
from cluster.control.control_actor import (
    FleetStatus,
    PoolStatus,
    Progress,
    ScaleRequest,
    StopRequest,
    WorkerStatus,
    start_control_actor,
)
from cluster.errors import FleetError
from cluster.ray_backend.prometheus import JobMetrics
from cluster.ray_session import backend
from cluster.ray_session.private import actor_id
from cluster.scheduling.autoscaling import desired_workers
from cluster.scheduling.pool import State, Worker, WorkerPool
from cluster.scheduling.quota import RunQuota
from cluster.scheduling.weight_versions import NO_WEIGHTS

logger = logging.getLogger(__name__)

EXCHANGE_S = 1.0  # between two calls of the control actor
MAX_WORKERS = 4096  # of a role


class Autoscaler:
    """Scales pools, and exchanges status and requests with the control actor.

    Args:
        run: name under which other processes find the run; empty hides it.
        quota: bounds what all workers reserve.
        others: workers that are in no pool, for the status.
        stop: called when the run is asked to stop, with whether to write a checkpoint.
    """

    def __init__(
        self,
        pools: Sequence[WorkerPool],
        run: str,
        quota: RunQuota,
        *,
        others: Callable[[], Sequence[Worker]] = lambda: (),
        stop: Callable[[bool], None] = lambda checkpoint: None,
    ) -> None:
        self._pools, self._run = {pool.role.name: pool for pool in pools}, run
        self._others, self._stop = others, stop
        self._quota = quota
        self._held_back: dict[str, str] = {}
        self.progress = Progress()
        """For the status."""
        self._metrics = JobMetrics(run)
        self._control: Any = None
        self._exchange: Any = None
        self._spoken = 0.0
        self._answered = 0
        self._refusals: list[tuple[int, str]] = []

    def start(self) -> None:
        """Start the control actor, by which other processes reach the run."""
        if self._run:
            self._control = start_control_actor(self._run)

    def end(self) -> None:
        if self._control is not None:
            backend.kill(self._control)

    def refs(self) -> list[Any]:
        """Pending answers, for `receive`."""
        return [self._exchange] if self._exchange is not None else []

    def tick(self, restarts: int, weight_version: int = NO_WEIGHTS, *, decide: bool = True) -> None:
        """End workers that have drained; scale by queue wait, if `decide`; send the status to the
        control actor, and its figures to Prometheus."""
        now = clock.monotonic()
        for pool in self._pools.values():
            pool.dismiss()
            if decide:
                self._scale_by_wait(pool, now)
        if self._control is None or self._exchange is not None or now - self._spoken < EXCHANGE_S:
            return
        self._spoken = now
        status = self.status(restarts, weight_version)
        self._metrics.report(status)
        self._exchange = self._control.exchange.remote(status)

    def restart(self) -> None:
        """Start a new observation: this process paused, so that waits were not the workers'."""
        for pool in self._pools.values():
            pool.meter.restart(clock.monotonic())

    def receive(self, ref: Any) -> None:
        """Take the control actor's answer and carry out its requests."""
        from ray.exceptions import RayActorError

        self._exchange = None
        try:
            requests = backend.get(ref)
        except RayActorError:
            self._control = None
            logger.warning(
                "the fleet's control actor was lost: cluster.scale cannot reach this run"
            )
            return
        for request in requests:
            if isinstance(request, StopRequest):
                self._answered = request.number
                self._stop(request.checkpoint)
            else:
                self._grant(request)

    def status(self, restarts: int = 0, weight_version: int = NO_WEIGHTS) -> FleetStatus:
        pools = tuple(
            PoolStatus(
                role=name,
                serving=len(pool.of(State.SERVING)),
                starting=len(pool.of(State.STARTING)),
                draining=len(pool.of(State.DRAINING)),
                queued=len(pool.waiting),
                wanted=pool.target,
                wait_s=pool.meter.recent_wait_s,
                workers=tuple(map(_status_of, pool.workers)),
            )
            for name, pool in self._pools.items()
        )
        return FleetStatus(
            pools=pools,
            singles=tuple(map(_status_of, self._others())),
            restarts=restarts,
            weight_version=weight_version,
            progress=self.progress,
            answered=self._answered,
            refusals=tuple(self._refusals),
            reserved=self._quota.reserved(self._counts()),
            quota=self._quota.config,
            held_back=tuple(self._held_back.values()),
        )

    def _counts(self) -> dict[str, int]:
        """Workers of each role, those that are leaving included."""
        counts = {name: len(pool.workers) for name, pool in self._pools.items()}
        return counts | Counter(worker.role.name for worker in self._others())

    def _grant(self, request: ScaleRequest) -> None:
        self._answered = request.number
        try:
            pool = self._pool(request)
        except FleetError as error:
            self._refusals.append((request.number, str(error)))
            return
        before = pool.target
        if before != request.count:
            logger.info("%s: %d -> %d workers, as asked for", request.role, before, request.count)
            pool.scale(request.count)
            pool.meter.restart(clock.monotonic())

    def _pool(self, request: ScaleRequest) -> WorkerPool:
        pool = self._pools.get(request.role)
        if pool is None:
            raise FleetError(f"no role {request.role!r}: there are {', '.join(self._pools)}")
        if not 1 <= request.count <= MAX_WORKERS:
            raise FleetError(
                f"{request.role}: the number must be in 1..{MAX_WORKERS}, found {request.count}"
            )
        auto = pool.role.autoscale
        if auto.on and request.count != auto.bounded(request.count):
            raise FleetError(
                f"{request.role} is scaled by its queue wait, between {max(auto.min, 1)} and "
                f"{auto.max}; found {request.count}"
            )
        if why := self._quota.refusal(request.role, request.count, self._counts()):
            raise FleetError(why)
        return pool

    def _scale_by_wait(self, pool: WorkerPool, now: float) -> None:
        auto = pool.role.autoscale
        if not auto.on or pool.meter.age(now) < auto.every_s:
            return
        if pool.of(State.STARTING) or pool.of(State.DRAINING):  # the last decision still unfolds
            pool.meter.restart(now)
            return
        load = pool.meter.load(len(pool.of(State.SERVING)), now)
        wanted = self._within_quota(pool, desired_workers(auto, load), load.workers)
        pool.meter.restart(now)
        if wanted != load.workers:
            logger.info(
                f"{pool.role.name}: {load.workers} -> {wanted} workers (work waited "
                f"{load.mean_wait_s:.2g} s on average, workers were busy {load.busy_share:.0%})"
            )
            pool.scale(wanted)

    def _within_quota(self, pool: WorkerPool, wanted: int, now: int) -> int:
        """The number of workers that a pool wants, or as many as the quota leaves it."""
        role, counts = pool.role.name, self._counts()
        most, before = self._quota.most(role, counts), self._held_back.pop(role, "")
        if most is None or wanted <= max(most, now):
            return wanted
        self._held_back[role] = why = (
            f"{role}: {wanted} workers would be started by its queue wait, and the quota of "
            f"{self._quota.config} leaves room for {max(most, now)}"
        )
        if why != before:
            logger.warning("note: %s", why)
        return max(most, now)


def _status_of(worker: Worker) -> WorkerStatus:
    return WorkerStatus(
        name=worker.name,
        state=worker.state.value,
        actor=actor_id(worker.handle),
        weight_version=worker.weight_version,
        busy=worker.busy,
        waits_for=worker.waits_for if worker.state is State.STARTING else "",
    )
