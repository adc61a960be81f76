"""The fleet on Ray: supervised actors, each group followed from request to scores.

The driver holds object references only: images go from sampler to reward server through the object
store. A lost sampler or reward server is replaced, and what it was working on is asked for again;
since randomness belongs to the request, the answer is the same.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from cluster.errors import FleetError, TesseraError
from cluster.fleet import StopRequestedError, Ticket
from cluster.learner_group import LearnerGroup
from cluster.messages import GroupScores, RolloutGroup, SampleRequest, ScoredGroup
from cluster.placement import Placement, place
from cluster.roles import FleetPlan, LearnerRole, MomentsRole, Role
from cluster.runtime import RaySession

QUEUE_DEPTH = 2  # requests at one worker: the next is at hand when one ends
POLL_S = 0.5  # how often a wait looks for a request to stop


@dataclass
class Worker:
    """One actor of a role."""

    role: Role
    index: int
    handle: Any
    """Ray's actor handle: its methods are those of the role."""
    busy: int = 0
    """Requests it has in hand."""
    lost: bool = False

    @property
    def name(self) -> str:
        return self.role.worker_name(self.index)


@dataclass(frozen=True)
class Job:
    """A group on its way. Its phase follows from what it has: rollouts, then scores."""

    ticket: Ticket
    position: int
    request: SampleRequest
    scored: bool
    """False for galleries, which want the images themselves."""
    rollouts: RolloutGroup | None = None
    images: Any = None
    """Reference to the images; they stay in the object store."""


@dataclass
class Answers:
    """Results of one ticket, in the order of its requests."""

    results: list[Any]
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.missing = len(self.results)

    def put(self, position: int, result: Any) -> None:
        self.results[position] = result
        self.missing -= 1


class RemoteRole:
    """A single actor that is called like the object it holds; every wait is bounded."""

    def __init__(self, worker: Worker, timeout_s: float) -> None:
        self._worker, self._timeout_s = worker, timeout_s

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            what = f"{self._worker.name}.{method}"
            ref = getattr(self._worker.handle, method).remote(*args, **kwargs)
            return answer(ref, what, self._timeout_s)

        return call


class RayFleet:
    """See `cluster.fleet.Fleet`."""

    def __init__(
        self,
        plan: FleetPlan,
        session: RaySession,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._plan, self._should_stop = plan, should_stop
        self._refresh: Any = None  # the moments server's work of the iteration before
        self._placements = {p.role: p for p in place(plan, session.cpus, session.gpus)}
        self._learners = [self._start(plan.learner, i) for i in range(plan.learner.count)]
        self._learner, self._moments = self._learners[0], self._start(plan.moments_server)
        self._samplers = [self._start(plan.sampler, i) for i in range(plan.sampler.count)]
        self._servers = [
            self._start(plan.reward_server, i) for i in range(plan.reward_server.count)
        ]
        self._waiting: deque[Job] = deque()
        self._running: dict[ray.ObjectRef, tuple[Job, Worker]] = {}
        self._answers: dict[Ticket, Answers] = {}
        self._snapshot: ray.ObjectRef | None = None
        self._tickets = 0
        self.restarts = 0

    def __enter__(self) -> Self:
        try:
            for worker in self._all():
                answer(worker.handle.__ray_ready__.remote(), worker.name, self._plan.timeout_s)
            if len(self._learners) > 1:
                self._group().meet()
        except BaseException:  # whatever ends the start, the others must not stay behind
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def placements(self) -> list[Placement]:
        return list(self._placements.values())

    @property
    def learner(self) -> LearnerRole:
        if len(self._learners) > 1:
            return self._group()
        return cast(LearnerRole, RemoteRole(self._learner, self._plan.timeout_s))

    def _group(self) -> LearnerGroup:
        return LearnerGroup(
            [worker.handle for worker in self._learners],
            [worker.name for worker in self._learners],
            answer,
            self._plan.timeout_s,
        )

    @property
    def moments(self) -> MomentsRole:
        return cast(MomentsRole, RemoteRole(self._moments, self._plan.timeout_s))

    def submit(self, requests: Sequence[SampleRequest]) -> Ticket:
        return self._submit(requests, scored=True)

    def collect(self, ticket: Ticket) -> list[ScoredGroup]:
        return self._collect(ticket)

    def sample_images(self, requests: Sequence[SampleRequest]) -> list[np.ndarray]:
        return self._collect(self._submit(requests, scored=False))

    def features(self, images: np.ndarray, panel: str) -> dict[str, np.ndarray]:
        return RemoteRole(self._servers[0], self._plan.timeout_s).features(images, panel)

    def fingerprint(self, panel: str) -> str:
        return RemoteRole(self._servers[0], self._plan.timeout_s).fingerprint(panel)

    def refresh_moments(self) -> None:
        if self._refresh is not None:  # long done: a commit came after it
            answer(self._refresh, f"{self._moments.name}.refresh", self._plan.timeout_s)
        self._refresh = self._moments.handle.refresh.remote()

    def broadcast(self) -> int:
        """Publish the learner's weights once, and have every sampler take them up."""
        self._snapshot = self._learner.handle.snapshot.remote()
        loading = {w.handle.load_weights.remote(self._snapshot): w for w in self._samplers}
        version = -1
        for ref, worker in loading.items():
            try:
                version = answer(ref, f"{worker.name}.load_weights", self._plan.timeout_s)
            except RayActorError:
                self._replace(worker)
        if version < 0:  # every sampler was lost: their replacements queue up behind the weights
            probe = self._samplers[0].handle.load_weights.remote(self._snapshot)
            version = answer(probe, "load_weights", self._plan.timeout_s)
        return version

    def _start(self, role: Role, index: int = 0) -> Worker:
        placement = self._placements[role.name]
        actor = ray.remote(role.factory).options(
            num_cpus=placement.num_cpus, num_gpus=placement.num_gpus
        )
        handle = actor.remote(role.config, name=role.worker_name(index))
        return Worker(role, index, handle)

    def _end(self) -> None:
        for worker in self._all():
            ray.kill(worker.handle)

    def _all(self) -> list[Worker]:
        return [*self._learners, self._moments, *self._samplers, *self._servers]

    def _submit(self, requests: Sequence[SampleRequest], *, scored: bool) -> Ticket:
        self._tickets += 1
        ticket = Ticket(self._tickets)
        self._answers[ticket] = Answers([None] * len(requests))
        self._waiting.extend(
            Job(ticket, position, request, scored) for position, request in enumerate(requests)
        )
        self._dispatch()
        return ticket

    def _collect(self, ticket: Ticket) -> list[Any]:
        answers = self._answers[ticket]
        progress = time.monotonic()
        while answers.missing:
            if self._should_stop():
                raise StopRequestedError("stopped while sampling")
            ready, _ = ray.wait(list(self._running), num_returns=1, timeout=POLL_S)
            if ready:
                progress = time.monotonic()
                self._advance(ready[0])
                self._dispatch()
            elif time.monotonic() - progress > self._plan.timeout_s:
                busy = ", ".join(sorted({worker.name for _, worker in self._running.values()}))
                raise FleetError(
                    f"no answer for {self._plan.timeout_s:g} s from {busy or 'any worker'}: look "
                    "at their logs, or raise --timeout-s if a group may take that long"
                )
        return self._answers.pop(ticket).results

    def _dispatch(self) -> None:
        """Hand waiting jobs to the least busy worker of the role they need."""
        for _ in range(len(self._waiting)):
            job = self._waiting.popleft()
            pool = self._samplers if job.rollouts is None else self._servers
            worker = min(pool, key=lambda worker: (worker.busy, worker.index))
            if worker.busy >= QUEUE_DEPTH:
                self._waiting.append(job)
                continue
            worker.busy += 1
            if job.rollouts is None:
                call = worker.handle.sample.options(num_returns=2)
                ref, images = call.remote(job.request)
                job = Job(job.ticket, job.position, job.request, job.scored, None, images)
            else:
                ref = worker.handle.score.remote(job.request, job.images)
            self._running[ref] = (job, worker)

    def _advance(self, ref: ray.ObjectRef) -> None:
        """Take one finished call: pass its group on, or ask again where its worker was lost."""
        job, worker = self._running.pop(ref)
        worker.busy -= 1
        try:
            value = answer(ref, worker.name, self._plan.timeout_s)
        except RayActorError:
            self._replace(worker)
            self._waiting.appendleft(job)
            return
        if isinstance(value, GroupScores):
            assert job.rollouts is not None
            scored = ScoredGroup(rollouts=job.rollouts, scores=value)
            self._answers[job.ticket].put(job.position, scored)
        elif job.scored:
            # To the front: groups in hand are finished before new ones are begun.
            self._waiting.appendleft(
                Job(job.ticket, job.position, job.request, True, value, job.images)
            )
        else:
            images = answer(job.images, f"{worker.name} images", self._plan.timeout_s)
            self._answers[job.ticket].put(job.position, images)

    def _replace(self, worker: Worker) -> None:
        """Start another worker in the place of a lost one; a sampler gets the weights first."""
        if worker.lost:
            return
        worker.lost = True
        self.restarts += 1
        if self.restarts > self._plan.max_restarts:
            raise FleetError(
                f"{worker.name} was lost, and {self._plan.max_restarts} lost workers were already "
                "replaced: look at its log for the reason (out of memory?), or raise --max-restarts"
            )
        new = self._start(worker.role, worker.index)
        pool = self._samplers if worker in self._samplers else self._servers
        pool[pool.index(worker)] = new
        if pool is self._samplers and self._snapshot is not None:
            new.handle.load_weights.remote(self._snapshot)  # calls of one actor keep their order


def answer(ref: ray.ObjectRef, what: str, timeout_s: float) -> Any:
    """The value of a reference, within bounded time, with errors that name who failed.

    Raises:
        RayActorError: the worker is gone (the caller may replace it).
        TesseraError: what the worker itself raised.
        FleetError: no answer in time, or an error of the worker's that is no `TesseraError`.
    """
    try:
        return ray.get(ref, timeout=timeout_s)
    except GetTimeoutError:
        raise FleetError(
            f"{what} did not answer within {timeout_s:g} s: is the cluster short of CPUs or GPUs, "
            "or the worker stuck? (--timeout-s sets the bound)"
        ) from None
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, TesseraError):
            raise cause from None
        raise FleetError(f"{what} failed:\n{error}") from None
    except RayActorError as error:
        if getattr(error, "actor_init_failed", False):
            raise FleetError(f"{what} could not start:\n{error}") from None
        raise
    except RayError as error:
        raise FleetError(f"{what}: {type(error).__name__}: {error}") from error
