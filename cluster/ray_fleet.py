"""The fleet on Ray: supervised actors, each group followed from request to scores.

The driver holds object references only: images go from sampler to reward servers through the object
store. A lost sampler or reward server is replaced, and what it was working on is asked for again;
since randomness belongs to the request, the answer is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
import ray
from ray.exceptions import RayActorError

from cluster.checks import ScoreChecks, check_rollouts
from cluster.control import Progress
from cluster.editions import Editions
from cluster.errors import FleetError, TesseraError
from cluster.fleet import StopRequestedError, Ticket
from cluster.learner_group import LearnerGroup
from cluster.messages import SampleRequest, ScoredGroup, Span
from cluster.placement import Placement, place
from cluster.pool import State, Waiting, Worker, WorkerPool
from cluster.publisher import Published, publisher_of
from cluster.ray_calls import RemoteRole, answer, too_late
from cluster.roles import FleetPlan, LearnerRole, MomentsRole, Role
from cluster.runtime import RaySession
from cluster.secrets import equipped, secret_variables
from cluster.steward import Steward
from cluster.supervisor import Supervisor
from cluster.tickets import Answers, Call, GroupOnTheWay

POLL_S = 0.5  # how often a wait looks for a request to stop
WORK = ("sample", "decode", "score")  # phases in which a worker works


class RayFleet:
    """See `cluster.fleet.Fleet`.

    Args:
        run: name under which other processes find the fleet (`python -m cluster.scale`); empty
            hides it.
        say: told of what happens to workers, a line each.
        ask_to_stop: called when another process wants the run to end (see `Steward`).
    """

    def __init__(
        self,
        plan: FleetPlan,
        session: RaySession,
        should_stop: Callable[[], bool] = lambda: False,
        *,
        run: str = "",
        say: Callable[[str], None] = lambda line: None,
        ask_to_stop: Callable[[bool], None] = lambda checkpoint: None,
    ) -> None:
        self._plan, self._session, self._should_stop, self._say = plan, session, should_stop, say
        self._refresh: Any = None  # the moments server's work of the iteration before
        self._editions = Editions()
        self._loads: dict[ray.ObjectRef, Worker] = {}
        self._calls: dict[ray.ObjectRef, Call] = {}
        self._placements = {p.role: p for p in place(plan, session.cpus, session.gpus)}
        self._weights = publisher_of(plan, session, say)
        self._learners = [self._launch(plan.learner, i) for i in range(plan.learner.count)]
        self._learner, self._moments = self._learners[0], self._launch(plan.moments_server)
        self._samplers = WorkerPool(plan.sampler, self._launch, self._dismiss)
        self._servers = {r.name: WorkerPool(r, self._launch, self._dismiss) for r in plan.servers}
        self._supervisor = Supervisor(plan, self.pools, say)
        self._steward = Steward(self.pools, run, say, others=self._singles, stop=ask_to_stop)
        self._check = ScoreChecks()
        self._answers: dict[Ticket, Answers] = {}
        self._tickets = 0

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
    def restarts(self) -> int:
        return self._supervisor.restarts

    @property
    def placements(self) -> list[Placement]:
        return list(self._placements.values())

    @property
    def learner(self) -> LearnerRole:
        if len(self._learners) > 1:
            return self._group()
        worker = self._learner
        return cast(LearnerRole, self._remote(worker))

    def _remote(self, worker: Worker) -> RemoteRole:
        return RemoteRole(worker.handle, worker.name, self._plan.timeout_s, self._answer)

    def _group(self) -> LearnerGroup:
        return LearnerGroup(
            [worker.handle for worker in self._learners],
            [worker.name for worker in self._learners],
            self._answer,
            self._plan.timeout_s,
            self._attend,
        )

    @property
    def moments(self) -> MomentsRole:
        worker = self._moments
        return cast(MomentsRole, self._remote(worker))

    def tell(self, progress: Progress) -> None:
        self._steward.progress = progress

    def submit(self, requests: Sequence[SampleRequest]) -> Ticket:
        return self._submit(requests, scored=True)

    def collect(self, ticket: Ticket, *, finish: bool = False) -> list[ScoredGroup]:
        return self._collect(ticket, finish=finish)

    def sample_images(self, requests: Sequence[SampleRequest]) -> list[np.ndarray]:
        return self._collect(self._submit(requests, scored=False))

    def features(self, images: np.ndarray, panel: str) -> dict[str, np.ndarray]:
        return self._ask_server(panel, "features", images, panel)

    def fingerprint(self, panel: str) -> str:
        return self._ask_server(panel, "fingerprint", panel)

    def refresh_moments(self) -> None:
        if self._refresh is not None:  # long done: a commit came after it
            self._answer(self._refresh, f"{self._moments.name}.refresh", self._plan.timeout_s)
        self._refresh = self._moments.handle.refresh.remote()

    def broadcast(self) -> None:
        """Publish the learner's weights once. What is submitted from now on is drawn with them;
        each sampler takes them up when it has no older work to begin. Nobody is waited for, but by
        transports between GPUs, which move the weights while learner and samplers hold still."""
        self._editions.publish(self._publish())
        if self._weights.on_device:
            self._hand_over()
        self._catch_up()

    def _publish(self) -> Published:
        learners = [worker.handle for worker in self._learners]
        samplers = [worker.handle for worker in self._samplers.workers]
        return self._weights.publish(learners, samplers)

    def _hand_over(self) -> None:
        """Have every serving sampler take up the newest weights now; by the object store after all,
        if the transport fails."""
        newest = self._editions.newest
        loading = {self._load(w, newest): w for w in self._samplers.of(State.SERVING)}
        for ref, worker in loading.items():
            try:
                answer(ref, f"{worker.name}.load_weights", self._plan.timeout_s)
            except RayActorError:
                self._supervisor.lost(self._samplers, worker)
            except TesseraError as error:
                if not self._weights.fall_back(error):
                    raise
                self._editions.amend(self._publish())
                for each in loading.values():
                    each.edition = 0  # and so takes them up again
                return

    def _launch(self, role: Role, index: int = 0, addition: bool = False) -> Worker:
        placement = self._placements[role.name]
        cpus = placement.num_cpus
        if addition and not role.resources.num_cpus and self._session.free_cpus < cpus:
            cpus = 0  # its share was of what others have reserved by now; it takes turns with them
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": placement.num_gpus}
        if role.concurrency > 1:
            options["max_concurrency"] = role.concurrency
        environment, secrets = secret_variables(role.runtime_env or {})
        if environment:
            options["runtime_env"] = environment
        concerned = role.name in (self._plan.learner.name, self._plan.sampler.name)
        wrap = self._weights.actor_class if concerned else ray.remote
        actor = wrap(equipped(role.factory, secrets)).options(**options)
        handle = actor.remote(role.config, name=role.worker_name(index))
        worker = Worker(role, index, handle, handle.__ray_ready__.remote(), addition)
        if role is self._plan.sampler and self._editions.newest:
            # it serves with weights only: the oldest that somebody waits for, as it never goes back
            worker.ready = self._load(worker, self._editions.oldest(self._needed()))
        return worker

    def _load(self, worker: Worker, edition: int) -> ray.ObjectRef:
        worker.edition = edition
        return self._weights.load(worker.handle, self._editions[edition])

    def _needed(self) -> Iterator[int]:
        """Editions of the groups that wait for a sampler, or are with one."""
        yield from (waiting.edition for waiting in self._samplers.waiting)
        yield from (c.group.edition for c in self._calls.values() if c.pool is self._samplers)

    def _catch_up(self) -> None:
        """Send the newest weights to samplers that have nothing older to begin."""
        if self._samplers.waiting:
            return
        for worker in self._samplers.workers:
            if worker.edition == self._editions.newest or worker.state is State.DRAINING:
                continue
            loaded = self._load(worker, self._editions.newest)
            if worker.state is State.STARTING:
                worker.ready = loaded
            else:
                self._loads[loaded] = worker
        self._editions.oldest(self._needed())

    def _dismiss(self, worker: Worker) -> None:
        ray.kill(worker.handle)
        if worker.state is State.DRAINING:
            self._say(f"{worker.name} has left")

    def _end(self) -> None:
        for worker in self._all():
            ray.kill(worker.handle)
        self._steward.end()

    def _singles(self) -> list[Worker]:
        return [*self._learners, self._moments]

    def _all(self) -> list[Worker]:
        return [*self._singles(), *(worker for pool in self.pools for worker in pool.workers)]

    def _submit(self, requests: Sequence[SampleRequest], *, scored: bool) -> Ticket:
        self._tickets += 1
        ticket = Ticket(self._tickets)
        answers = self._answers[ticket] = Answers([None] * len(requests))
        for position, request in enumerate(requests):
            judges = tuple(role.name for role in self._plan.judges(request.panel)) if scored else ()
            edition = self._editions.newest
            group = GroupOnTheWay(answers, position, request, judges, edition)
            self._samplers.add(group, edition=edition)
        self._dispatch()
        return ticket

    def _collect(self, ticket: Ticket, *, finish: bool = False) -> list[Any]:
        answers = self._answers[ticket]
        progress = time.monotonic()
        while answers.missing:
            if self._should_stop() and not finish:
                raise StopRequestedError("stopped while sampling")
            if self._turn():
                progress = time.monotonic()
            elif time.monotonic() - progress > self._plan.timeout_s:
                busy = ", ".join(sorted({call.worker.name for call in self._calls.values()}))
                raise FleetError(
                    f"no answer for {self._plan.timeout_s:g} s from {busy or 'any worker'}: look "
                    "at their logs, or raise --timeout-s if a group may take that long"
                )
        return self._answers.pop(ticket).results

    def _attend(self, refs: Sequence[ray.ObjectRef], timeout_s: float) -> list[ray.ObjectRef]:
        """Wait until one of some answers is there, and keep groups moving meanwhile; returns it,
        or nothing if the time is over."""
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            self._turn(refs, left)
            ready, _ = ray.wait(list(refs), num_returns=1, timeout=0)
            if ready:
                return ready
        return []

    def _answer(self, ref: ray.ObjectRef, what: str, timeout_s: float) -> Any:
        """`ray_calls.answer`, while groups move on."""
        if not self._attend([ref], timeout_s):
            raise too_late(what, timeout_s)
        return answer(ref, what, timeout_s)

    def _turn(self, others: Sequence[ray.ObjectRef] = (), timeout_s: float = POLL_S) -> bool:
        """Hand out what there is to do, and take the next thing that happens; False if none of the
        fleet's own did. `others` end the wait, and are left to the caller."""
        # while the learner learns and nothing is on its way, idle workers are no surplus
        decide = bool(self._calls) or not others
        self._steward.tend(self.restarts, self._editions.newest, decide=decide)
        self._dispatch()
        starting = {worker.ready: (pool, worker) for pool, worker in self._supervisor.starting()}
        refs = [*others, *self._calls, *self._loads, *starting, *self._steward.refs()]
        timeout_s = min(timeout_s, POLL_S)
        ready, _ = ray.wait(refs, num_returns=1, timeout=timeout_s) if refs else ([], [])
        if not refs:
            time.sleep(timeout_s)
        moved = False
        for ref in ready:
            if ref in self._calls:
                self._advance(ref)
            elif ref in self._loads:
                self._loaded(ref)
            elif ref in starting:
                self._supervisor.started(*starting[ref])
            elif ref in self._steward.refs():
                self._steward.heard(ref)
                continue
            else:
                continue
            moved = True
        self._supervisor.give_up_on_late_additions()
        return moved

    def _dispatch(self) -> None:
        """Hand waiting work to the least busy worker of the role that it needs."""
        for pool in self.pools:
            while picked := pool.next():
                self._send(pool, *picked)
        self._samplers.turn_back()
        self._catch_up()

    def _send(self, pool: WorkerPool, waiting: Waiting, worker: Worker) -> None:
        group: GroupOnTheWay = waiting.task
        worker.busy += 1
        if pool is self._samplers:
            if worker.edition < group.edition:
                self._loads[self._load(worker, group.edition)] = worker
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
            again = group.edition if pool is self._samplers else 0
            pool.add(group, front=True, edition=again)
            self._supervisor.lost(pool, worker)
            return
        self._measure(call, getattr(value, "spans", ()))
        if pool is not self._samplers:
            scorers, role = pool.role.scorers.get(group.request.panel), pool.role.name
            self._check(value, group.request, pool=role, worker=worker.name, scorers=scorers)
            group.put_scores(role, value)
        elif group.judges:
            check_rollouts(value, group.request, worker.name)
            group.rollouts = value
            for name in group.judges:
                self._servers[name].add(group)
        else:
            group.answers.put(group.position, images)
        pool.dismiss()

    def _loaded(self, ref: ray.ObjectRef) -> None:
        """A sampler took up weights, or says why not."""
        worker = self._loads.pop(ref)
        try:
            answer(ref, f"{worker.name}.load_weights", self._plan.timeout_s)
        except RayActorError:
            self._supervisor.lost(self._samplers, worker)

    def _measure(self, call: Call, spans: Sequence[Span]) -> None:
        meter = call.pool.meter
        queued = sum(span.seconds for span in spans if span.phase == "queue")
        meter.waited(call.waited_s + queued)
        meter.worked(sum(span.seconds for span in spans if span.phase in WORK))

    def _ask_server(self, panel: str, method: str, *args: Any) -> Any:
        """Ask any server that has a panel's feature network; another one, if it is lost."""
        pool = self._servers[self._plan.feature_server(panel).name]
        while True:
            worker = self._supervisor.await_worker(pool)
            remote = RemoteRole(worker.handle, worker.name, self._plan.timeout_s)
            try:
                return getattr(remote, method)(*args)
            except RayActorError:
                self._supervisor.lost(pool, worker)
