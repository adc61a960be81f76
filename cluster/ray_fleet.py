"""The fleet on Ray: supervised actors, each group followed from request to scores.

The driver holds object references only: images go from sampler to reward servers through the object
store. A lost sampler or reward server is replaced, and what it was working on is asked for again;
since randomness belongs to the request, the answer is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
import ray
from ray.exceptions import RayActorError

from cluster.errors import FleetError
from cluster.fleet import StopRequestedError, Ticket
from cluster.learner_group import LearnerGroup
from cluster.messages import SampleRequest, ScoredGroup, Span
from cluster.placement import Placement, place
from cluster.pool import State, Waiting, Worker, WorkerPool
from cluster.ray_calls import RemoteRole, answer
from cluster.roles import FleetPlan, LearnerRole, MomentsRole, Role
from cluster.runtime import RaySession
from cluster.steward import Steward
from cluster.tickets import Answers, GroupOnTheWay

POLL_S = 0.5  # how often a wait looks for a request to stop
WORK = ("sample", "decode", "score")  # phases in which a worker works


@dataclass(frozen=True)
class Call:
    """A worker's answer that is being waited for."""

    group: GroupOnTheWay
    pool: WorkerPool
    worker: Worker
    waited_s: float


class RayFleet:
    """See `cluster.fleet.Fleet`.

    Args:
        run: name under which other processes find the fleet (`python -m cluster.scale`); empty
            hides it.
        say: told of what happens to workers, a line each.
    """

    def __init__(
        self,
        plan: FleetPlan,
        session: RaySession,
        should_stop: Callable[[], bool] = lambda: False,
        *,
        run: str = "",
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._plan, self._session, self._should_stop, self._say = plan, session, should_stop, say
        self._refresh: Any = None  # the moments server's work of the iteration before
        self._snapshot: ray.ObjectRef | None = None
        self._placements = {p.role: p for p in place(plan, session.cpus, session.gpus)}
        self._learners = [self._launch(plan.learner, i) for i in range(plan.learner.count)]
        self._learner, self._moments = self._learners[0], self._launch(plan.moments_server)
        self._samplers = WorkerPool(plan.sampler, self._launch, self._dismiss)
        self._servers = {r.name: WorkerPool(r, self._launch, self._dismiss) for r in plan.servers}
        self._steward = Steward(self.pools, run, say)
        self._calls: dict[ray.ObjectRef, Call] = {}
        self._answers: dict[Ticket, Answers] = {}
        self._tickets = 0
        self.restarts = 0

    def __enter__(self) -> Self:
        try:
            self._steward.start()
            for worker in self._all():
                answer(worker.ready, worker.name, self._plan.timeout_s)
                worker.state = State.SERVING
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
    def pools(self) -> list[WorkerPool]:
        """What can be scaled."""
        return [self._samplers, *self._servers.values()]

    @property
    def placements(self) -> list[Placement]:
        return list(self._placements.values())

    @property
    def learner(self) -> LearnerRole:
        if len(self._learners) > 1:
            return self._group()
        worker = self._learner
        return cast(LearnerRole, RemoteRole(worker.handle, worker.name, self._plan.timeout_s))

    def _group(self) -> LearnerGroup:
        return LearnerGroup(
            [worker.handle for worker in self._learners],
            [worker.name for worker in self._learners],
            answer,
            self._plan.timeout_s,
        )

    @property
    def moments(self) -> MomentsRole:
        worker = self._moments
        return cast(MomentsRole, RemoteRole(worker.handle, worker.name, self._plan.timeout_s))

    def submit(self, requests: Sequence[SampleRequest]) -> Ticket:
        return self._submit(requests, scored=True)

    def collect(self, ticket: Ticket) -> list[ScoredGroup]:
        return self._collect(ticket)

    def sample_images(self, requests: Sequence[SampleRequest]) -> list[np.ndarray]:
        return self._collect(self._submit(requests, scored=False))

    def features(self, images: np.ndarray, panel: str) -> dict[str, np.ndarray]:
        return self._ask_server(panel, "features", images, panel)

    def fingerprint(self, panel: str) -> str:
        return self._ask_server(panel, "fingerprint", panel)

    def refresh_moments(self) -> None:
        if self._refresh is not None:  # long done: a commit came after it
            answer(self._refresh, f"{self._moments.name}.refresh", self._plan.timeout_s)
        self._refresh = self._moments.handle.refresh.remote()

    def broadcast(self) -> int:
        """Publish the learner's weights once, and have every sampler take them up. Samplers that
        are still starting are not waited for: they serve once they have them."""
        # All are asked: in a group, each has a part of the weights, and the first gives the whole.
        snapshots = [worker.handle.snapshot.remote() for worker in self._learners]
        self._snapshot = snapshots[0]
        loading = {w.handle.load_weights.remote(self._snapshot): w for w in self._samplers.workers}
        version = -1
        for ref, worker in loading.items():
            if worker.state is State.STARTING:
                worker.ready = ref
                continue
            try:
                version = answer(ref, f"{worker.name}.load_weights", self._plan.timeout_s)
            except RayActorError:
                self._lost(self._samplers, worker)
        if version < 0:  # every sampler was lost
            worker = self._await_worker(self._samplers)
            probe = worker.handle.load_weights.remote(self._snapshot)
            version = answer(probe, f"{worker.name}.load_weights", self._plan.timeout_s)
        return version

    def _launch(self, role: Role, index: int = 0, addition: bool = False) -> Worker:
        placement = self._placements[role.name]
        cpus = placement.num_cpus
        if addition and not role.resources.num_cpus and self._session.free_cpus < cpus:
            cpus = 0  # its share was of what others have reserved by now; it takes turns with them
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": placement.num_gpus}
        if role.concurrency > 1:
            options["max_concurrency"] = role.concurrency
        if role.runtime_env:
            options["runtime_env"] = dict(role.runtime_env)
        actor = ray.remote(role.factory).options(**options)
        handle = actor.remote(role.config, name=role.worker_name(index))
        ready = handle.__ray_ready__.remote()
        if role is self._plan.sampler and self._snapshot is not None:
            ready = handle.load_weights.remote(self._snapshot)  # it serves with the weights only
        return Worker(role, index, handle, ready, addition)

    def _dismiss(self, worker: Worker) -> None:
        ray.kill(worker.handle)
        if worker.state is State.DRAINING:
            self._say(f"{worker.name} has left")

    def _end(self) -> None:
        for worker in self._all():
            ray.kill(worker.handle)
        self._steward.end()

    def _all(self) -> list[Worker]:
        pooled = (worker for pool in self.pools for worker in pool.workers)
        return [*self._learners, self._moments, *pooled]

    def _submit(self, requests: Sequence[SampleRequest], *, scored: bool) -> Ticket:
        self._tickets += 1
        ticket = Ticket(self._tickets)
        answers = self._answers[ticket] = Answers([None] * len(requests))
        for position, request in enumerate(requests):
            judges = tuple(role.name for role in self._plan.judges(request.panel)) if scored else ()
            self._samplers.add(GroupOnTheWay(answers, position, request, judges))
        self._dispatch()
        return ticket

    def _collect(self, ticket: Ticket) -> list[Any]:
        answers = self._answers[ticket]
        progress = time.monotonic()
        while answers.missing:
            if self._should_stop():
                raise StopRequestedError("stopped while sampling")
            self._steward.tend(self.restarts)
            self._dispatch()
            if self._wait():
                progress = time.monotonic()
            elif time.monotonic() - progress > self._plan.timeout_s:
                busy = ", ".join(sorted({call.worker.name for call in self._calls.values()}))
                raise FleetError(
                    f"no answer for {self._plan.timeout_s:g} s from {busy or 'any worker'}: look "
                    "at their logs, or raise --timeout-s if a group may take that long"
                )
        return self._answers.pop(ticket).results

    def _wait(self) -> bool:
        """Take the next thing that happens; False if nothing did."""
        starting = {worker.ready: (pool, worker) for pool, worker in self._starting()}
        refs = [*self._calls, *starting, *self._steward.refs()]
        ready, _ = ray.wait(refs, num_returns=1, timeout=POLL_S) if refs else ([], [])
        if not refs:
            time.sleep(POLL_S)
        for ref in ready:
            if ref in self._calls:
                self._advance(ref)
            elif ref in starting:
                self._started(*starting[ref])
            else:
                self._steward.heard(ref)
                return False
        self._give_up_on_late_additions()
        return bool(ready)

    def _dispatch(self) -> None:
        """Hand waiting work to the least busy worker of the role that it needs."""
        for pool in self.pools:
            while picked := pool.next():
                self._send(pool, *picked)

    def _send(self, pool: WorkerPool, waiting: Waiting, worker: Worker) -> None:
        group: GroupOnTheWay = waiting.task
        worker.busy += 1
        if pool is self._samplers:
            call = worker.handle.sample.options(num_returns=2)
            ref, group.images = call.remote(group.request)
        else:
            ref = worker.handle.score.remote(group.request, group.images)
        waited_s = time.monotonic() - waiting.since
        self._calls[ref] = Call(group, pool, worker, waited_s)

    def _advance(self, ref: ray.ObjectRef) -> None:
        """Take one finished call: pass its group on, or ask again where its worker was lost."""
        call = self._calls.pop(ref)
        group, pool, worker = call.group, call.pool, call.worker
        worker.busy -= 1
        try:
            value = answer(ref, worker.name, self._plan.timeout_s)
            if pool is self._samplers and not group.judges:
                images = answer(group.images, f"{worker.name} images", self._plan.timeout_s)
        except RayActorError:
            self._lost(pool, worker)
            pool.add(group, front=True)
            return
        self._measure(call, getattr(value, "spans", ()))
        if pool is not self._samplers:
            group.put_scores(pool.role.name, value)
        elif group.judges:
            group.rollouts = value
            for name in group.judges:
                self._servers[name].add(group)
        else:
            group.answers.put(group.position, images)
        pool.dismiss()

    def _measure(self, call: Call, spans: Sequence[Span]) -> None:
        meter = call.pool.meter
        queued = sum(span.seconds for span in spans if span.phase == "queue")
        meter.waited(call.waited_s + queued)
        meter.worked(sum(span.seconds for span in spans if span.phase in WORK))

    def _starting(self) -> Iterator[tuple[WorkerPool, Worker]]:
        for pool in self.pools:
            for worker in pool.of(State.STARTING):
                yield pool, worker

    def _started(self, pool: WorkerPool, worker: Worker) -> None:
        """A worker says that it is ready, or why it will never be."""
        try:
            answer(worker.ready, worker.name, self._plan.timeout_s)
        except RayActorError:
            self._lost(pool, worker)
            return
        except FleetError as error:
            if not (worker.addition and pool.of(State.SERVING)):
                raise
            pool.drop(worker)
            self._say(f"going on without {worker.name}: {error}")
            return
        worker.state = State.SERVING
        if worker.addition:
            self._say(f"{worker.name} serves")

    def _give_up_on_late_additions(self) -> None:
        for pool, worker in list(self._starting()):
            late = time.monotonic() - worker.since > self._plan.timeout_s
            if late and worker.addition and pool.of(State.SERVING):
                pool.drop(worker)
                self._say(
                    f"going on without {worker.name}: it did not start within "
                    f"{self._plan.timeout_s:g} s; is the cluster short of CPUs or GPUs?"
                )

    def _lost(self, pool: WorkerPool, worker: Worker) -> None:
        """Start another worker in the place of a lost one; a sampler gets the weights first."""
        if worker not in pool.workers or worker.state is State.DRAINING:
            pool.replace(worker)
            return
        if self.restarts >= self._plan.max_restarts:
            raise FleetError(
                f"{worker.name} was lost, and {self._plan.max_restarts} lost workers were already "
                "replaced: look at its log for the reason (out of memory?), or raise --max-restarts"
            )
        self.restarts += 1
        pool.replace(worker)
        self._say(
            f"{worker.name} was lost; its work is asked for again, and another takes its place "
            f"({self.restarts} of at most {self._plan.max_restarts})"
        )

    def _await_worker(self, pool: WorkerPool) -> Worker:
        """One that serves, once there is one."""
        deadline = time.monotonic() + self._plan.timeout_s
        while not pool.of(State.SERVING):
            starting = pool.of(State.STARTING)
            left = deadline - time.monotonic()
            ready, _ = ray.wait([w.ready for w in starting], num_returns=1, timeout=max(left, 0))
            if not ready:
                raise FleetError(
                    f"no {pool.role.name} was ready within {self._plan.timeout_s:g} s: is the "
                    "cluster short of CPUs or GPUs? (--timeout-s sets the bound)"
                )
            self._started(pool, next(w for w in starting if w.ready == ready[0]))
        return pool.of(State.SERVING)[0]

    def _ask_server(self, panel: str, method: str, *args: Any) -> Any:
        """Ask any server that has a panel's feature network; another one, if it is lost."""
        pool = self._servers[self._plan.feature_server(panel).name]
        while True:
            worker = self._await_worker(pool)
            remote = RemoteRole(worker.handle, worker.name, self._plan.timeout_s)
            try:
                return getattr(remote, method)(*args)
            except RayActorError:
                self._lost(pool, worker)
