"""The fleet on Ray: supervised actors, each group followed from request to scores.

The driver holds object references only: images go from sampler to reward servers through the object
store. A lost sampler or reward server is replaced, and what it was working on is asked for again;
since randomness belongs to the request, the answer is the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import ray
from ray.exceptions import RayActorError

from cluster.calls import (
    SAMPLER_THREADS,
    Call,
    Stage,
    ask_for_images,
    queue_for_tokens,
    spans_of,
)
from cluster.checks import ScoreChecks, check_rollouts
from cluster.control import Progress
from cluster.delivery import Delivery
from cluster.errors import FleetError, InputLostError, LearnerLostError
from cluster.fleet import StopRequestedError, Ticket
from cluster.keepers import Keepers
from cluster.launcher import Launcher, actor_class
from cluster.messages import SampleRequest, ScoredGroup
from cluster.placement import Placement
from cluster.pool import State, Waiting, Worker, WorkerPool
from cluster.publisher import publisher_of
from cluster.pulse import Pulse
from cluster.ray_calls import LOST, RemoteRole, answer, how_ended, too_late, why_lost
from cluster.restarts import RestartBudget
from cluster.roles import FleetPlan, LearnerRole, MomentsRole, Role
from cluster.runtime import RaySession
from cluster.steward import Steward
from cluster.supervisor import Supervisor
from cluster.tickets import Answers, GroupOnTheWay

logger = logging.getLogger(__name__)

POLL_S = 0.5  # how often a wait looks for a request to stop


class RayFleet:
    """See `cluster.fleet.Fleet`.

    Args:
        run: name under which other processes find the fleet (`python -m cluster.scale`); empty
            hides it.
        ask_to_stop: called when another process wants the run to end (see `Steward`).
    """

    def __init__(
        self,
        plan: FleetPlan,
        session: RaySession,
        should_stop: Callable[[], bool] = lambda: False,
        *,
        run: str = "",
        ask_to_stop: Callable[[bool], None] = lambda checkpoint: None,
    ) -> None:
        self._plan, self._should_stop = plan, should_stop
        self._calls: dict[ray.ObjectRef, Call] = {}
        self._launcher = Launcher(plan, session)
        self._weights = publisher_of(plan, session)
        self._delivery = Delivery(
            plan,
            self._weights,
            self._editions_with_samplers,
            self._sampler_lost,
        )
        self._budget, self._pulse = RestartBudget(plan.max_restarts), Pulse(plan.heartbeat_s)
        self._keepers = Keepers(plan, self._launch_keeper, self._answer, self._attend, self._budget)
        self._samplers = WorkerPool(plan.sampler, self._launch, self._dismiss)
        self._servers = {r.name: WorkerPool(r, self._launch, self._dismiss) for r in plan.servers}
        self._supervisor = Supervisor(plan, self.pools, self._budget, self._kill)
        self._steward = Steward(
            self.pools, run, others=lambda: self._keepers.workers, stop=ask_to_stop
        )
        self._check = ScoreChecks()
        self._answers: dict[Ticket, Answers] = {}
        self._tickets = 0

    def __enter__(self) -> Self:
        who = "the fleet's control actor"
        try:
            self._steward.start()
            for worker in self._all():
                who = worker.name
                self._keepers.started(worker)
            who = "a learner"
            self._keepers.meet()
        except RayActorError as error:
            self._end()
            raise FleetError(
                f"{who} was lost while it started: {how_ended(error)}; its log says more"
            ) from None
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
        return self._budget.spent

    @property
    def placements(self) -> list[Placement]:
        return list(self._launcher.placements.values())

    @property
    def learner(self) -> LearnerRole:
        return self._keepers.learner

    @property
    def moments(self) -> MomentsRole:
        return self._keepers.moments

    def recover_learner(self, error: LearnerLostError) -> None:
        for answers in self._answers.values():
            answers.abandoned = True
        self._answers.clear()
        for pool in self.pools:
            pool.waiting.clear()
        self._delivery.forget(self._samplers, self._replace)
        self._keepers.replace_learners(str(error))

    def _editions_with_samplers(self) -> Iterator[int]:
        yield from (c.edition for c in self._calls.values() if c.pool is self._samplers)

    def _sampler_lost(self, worker: Worker) -> None:
        self._supervisor.lost(self._samplers, worker)

    def _replace(self, worker: Worker) -> None:
        self._kill(worker)
        self._samplers.replace(worker)

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
        self._keepers.refresh_moments()

    def broadcast(self) -> None:
        self._delivery.broadcast(self._keepers.learners, self._samplers)
        self._keepers.broadcast_made()

    def _launch(self, role: Role, index: int, addition: bool, late: bool) -> Worker:
        sampler = role is self._plan.sampler
        wrap = self._weights.actor_class if sampler else actor_class
        threads = SAMPLER_THREADS if sampler else {}
        worker = self._launcher(role, index, wrap, threads, addition=addition, late=late)
        if sampler and self._delivery.newest:
            self._delivery.begin(worker, self._samplers)
        return worker

    def _launch_keeper(self, role: Role, index: int, late: bool) -> Worker:
        wrap = self._weights.actor_class if role is self._plan.learner else actor_class
        return self._launcher(role, index, wrap, {}, late=late)

    def _dismiss(self, worker: Worker) -> None:
        self._kill(worker)
        if worker.state is State.DRAINING:
            logger.info("%s has left", worker.name)

    def _kill(self, worker: Worker) -> None:
        ray.kill(worker.handle)  # one that stands still, too: its node sees to it within seconds

    def _end(self) -> None:
        for worker in self._all():
            self._kill(worker)
        self._steward.end()

    def _all(self) -> list[Worker]:
        pooled = (worker for pool in self.pools for worker in pool.workers)
        return [*self._keepers.workers, *pooled]

    def _submit(self, requests: Sequence[SampleRequest], *, scored: bool) -> Ticket:
        self._tickets += 1
        ticket = Ticket(self._tickets)
        answers = self._answers[ticket] = Answers([None] * len(requests))
        for position, request in enumerate(requests):
            judges = tuple(role.name for role in self._plan.judges(request.panel)) if scored else ()
            edition = self._delivery.newest
            group = GroupOnTheWay(answers, position, request, judges, edition)
            queue_for_tokens(self._samplers, group)
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
                raise FleetError(
                    f"nothing happened for {self._plan.timeout_s:g} s ({self._who_is_there()}): is "
                    "the cluster short of CPUs or GPUs? (--timeout-s sets the bound)"
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
        self._steward.tend(self.restarts, self._delivery.newest, decide=decide)
        self._supervisor.tend()
        moved = self._supervisor.overdue() or self._missed()
        self._dispatch()
        starting = {worker.ready: (pool, worker) for pool, worker in self._supervisor.starting()}
        refs = [*others, *self._calls, *self._delivery.under_way, *starting, *self._steward.refs()]
        timeout_s = min(timeout_s, POLL_S)
        ready, _ = ray.wait(refs, num_returns=1, timeout=timeout_s) if refs else ([], [])
        if not refs:
            time.sleep(timeout_s)
        for ref in ready:
            if ref in self._calls:
                self._advance(ref)
            elif ref in self._delivery.under_way:
                self._delivery.taken_up(ref)
            elif ref in starting:
                self._supervisor.started(*starting[ref])
            elif ref in self._steward.refs():
                self._steward.heard(ref)
                continue
            else:
                continue
            moved = True
        return moved

    def _missed(self) -> bool:
        """Replace those that are gone or silent; says whether there were any."""
        here = [worker for worker in self._all() if worker.state in (State.SERVING, State.DRAINING)]
        missed = self._pulse.missed(here)
        for worker, why in missed:
            pool = next((pool for pool in self.pools if worker in pool.workers), None)
            if pool is None:  # of a learner or moments server, its next answer will tell
                self._kill(worker)
            else:
                self._supervisor.lost(pool, worker, why)
        return bool(missed)

    def _who_is_there(self) -> str:
        counts = (
            f"{pool.role.name}: {len(pool.of(State.SERVING))} of {pool.target} serve"
            for pool in self.pools
        )
        return ", ".join(counts)

    def _dispatch(self) -> None:
        """Hand waiting work to whoever of the role that it needs would finish it first."""
        for pool in self.pools:
            while picked := pool.next():
                self._send(pool, *picked)
        self._samplers.turn_back()
        self._delivery.catch_up(self._samplers)

    def _send(self, pool: WorkerPool, picked: Sequence[Waiting], worker: Worker) -> None:
        groups: tuple[GroupOnTheWay, ...] = tuple(waiting.task for waiting in picked)
        first, now = groups[0], time.monotonic()
        if pool is self._samplers:
            self._delivery.bring(worker, first.edition)
            requests = [group.request for group in groups]
            stage, ref = Stage.SAMPLE, worker.handle.sample.remote(requests)
        else:
            stage, ref = Stage.SCORE, worker.handle.score.remote(first.request, first.images)
        waited_s = tuple(now - waiting.since for waiting in picked)
        self._follow(ref, Call(groups, pool, worker, stage, waited_s))

    def _follow(self, ref: ray.ObjectRef, call: Call) -> None:
        call.began()
        self._calls[ref] = call

    def _advance(self, ref: ray.ObjectRef) -> None:
        """Take one finished call: pass its groups on, or ask again where its worker was lost."""
        call, images = self._calls.pop(ref), None
        group, pool, worker = call.groups[0], call.pool, call.worker
        call.ended()
        try:
            value = answer(ref, worker.name, self._plan.timeout_s)
            if call.stage is Stage.IMAGES and not group.judges:
                images = answer(group.images, f"{worker.name}.images", self._plan.timeout_s)
        except LOST as error:
            call.ask_again(self._plan.max_restarts, why_lost(error))
            self._supervisor.lost(pool, worker, why_lost(error))
            return
        except InputLostError:  # the images went with their node
            call.ask_anew(self._samplers, self._servers.values(), self._plan.max_restarts)
            return
        self._budget.worked(worker.name)
        call.measure(spans_of(value))
        pool.dismiss()
        if not call.live:
            return
        self._examine(call, value)
        if call.stage is Stage.SAMPLE:
            for span, images_call in ask_for_images(call, value):
                self._follow(span, images_call)
        elif call.stage is Stage.SCORE:
            group.put_scores(pool.role.name, value)
        elif group.judges:
            group.put_images(value)
            for name in group.judges:
                self._servers[name].add(group)
        else:
            group.answers.put(group.position, images)

    def _examine(self, call: Call, value: Any) -> None:
        """Check an answer against what was asked.

        Raises:
            FleetError: it is not what it should be.
        """
        role, name = call.pool.role, call.worker.name
        if call.stage is Stage.SCORE:
            request = call.groups[0].request
            scorers = role.scorers.get(request.panel)
            self._check(value, request, pool=role.name, worker=name, scorers=scorers)
        elif call.stage is Stage.SAMPLE:
            for group, drawn in zip(call.groups, value, strict=True):
                if group.judges:
                    check_rollouts(drawn, group.request, name)

    def _ask_server(self, panel: str, method: str, *args: Any) -> Any:
        """Ask any server that has a panel's feature network; another one, if it is lost."""
        pool = self._servers[self._plan.feature_server(panel).name]
        while True:
            worker = self._someone(pool)
            remote = RemoteRole(worker.handle, worker.name, self._plan.timeout_s, self._answer)
            try:
                return getattr(remote, method)(*args)
            except RayActorError:
                self._supervisor.lost(pool, worker)

    def _someone(self, pool: WorkerPool) -> Worker:
        """One that serves, once there is one."""
        deadline = time.monotonic() + self._plan.timeout_s
        while not pool.of(State.SERVING):
            if time.monotonic() > deadline:
                raise FleetError(
                    f"no {pool.role.name} was ready within {self._plan.timeout_s:g} s: is the "
                    "cluster short of CPUs or GPUs? (--timeout-s sets the bound)"
                )
            self._turn()
        return pool.of(State.SERVING)[0]
