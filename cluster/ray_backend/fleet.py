"""The fleet on Ray: starts the workers, dispatches requests, polls for answers.

Images go from samplers to reward servers through the object store; the driver holds references. A
lost worker is replaced and its requests are retried: seeds are part of a request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import ray
from ray.exceptions import RayActorError

from cluster import clock
from cluster.control.control_actor import Progress
from cluster.errors import FleetError, LearnerLostError, TesseraError
from cluster.fleet import Result
from cluster.io.background import Background
from cluster.messages import MAIN_SPACE, GroupScores, SampleRequest, ScoredGroup
from cluster.ray_backend.autoscaler import Autoscaler
from cluster.ray_backend.broadcast import Broadcaster
from cluster.ray_backend.feature_calls import FeatureCalls
from cluster.ray_backend.group_calls import SAMPLER_THREADS, GroupCalls, queue_for_tokens
from cluster.ray_backend.heartbeat import Heartbeat
from cluster.ray_backend.launcher import Launcher, actor_class
from cluster.ray_backend.publisher import publisher_of
from cluster.ray_backend.stateful_roles import StatefulRoles
from cluster.ray_backend.supervisor import Supervisor
from cluster.ray_session import backend
from cluster.ray_session.backend import Nodes
from cluster.ray_session.calls import answer, how_ended, put, ready_of, too_late
from cluster.roles import FleetPlan, LearnerRole, MomentsRole, Pictures, Role
from cluster.scheduling.in_flight import PendingBatch, PendingBatches, PendingGroup
from cluster.scheduling.listening import LOOK_S, Listening
from cluster.scheduling.placement import Placement
from cluster.scheduling.pool import State, Worker, WorkerPool
from cluster.scheduling.restarts import RestartBudget
from cluster.scheduling.validation import check_images
from cluster.scheduling.weight_versions import NO_WEIGHTS, OWN_WEIGHTS

logger = logging.getLogger(__name__)

JUDGE_S = 0.25  # how often somebody's silence is judged
ATTEND_S = 0.05  # how often the fleet is attended to while something else is computed


class RayFleet:
    """See `cluster.fleet.Fleet`.

    Args:
        run: name under which other processes find the fleet (`python -m cluster.scale`); empty
            hides it.
        ask_to_stop: called when another process wants the run to end (see `Autoscaler`).
    """

    def __init__(
        self,
        plan: FleetPlan,
        session: Nodes,
        should_stop: Callable[[], bool] = lambda: False,
        *,
        run: str = "",
        ask_to_stop: Callable[[bool], None] = lambda checkpoint: None,
    ) -> None:
        self._plan, self._should_stop = plan, should_stop
        self._listening, self._judged = Listening(), 0.0
        self._launcher = Launcher(plan, session)
        self._weights = publisher_of(plan)
        self._broadcaster = Broadcaster(
            plan,
            self._weights,
            lambda: self._group_calls.weight_versions,
            self._sampler_lost,
        )
        self._budget = RestartBudget(plan.max_restarts, stopping=should_stop)
        self._heartbeat = Heartbeat(plan.heartbeat_s, self._listening)
        self._stateful = StatefulRoles(
            plan, self._launch_stateful, self._answer, self._attend, self._budget, self._listening
        )
        self._samplers = WorkerPool(plan.sampler, self._launch, self._dismiss)
        self._servers = {r.name: WorkerPool(r, self._launch, self._dismiss) for r in plan.servers}
        self._supervisor = Supervisor(plan, self.pools, self._budget, self._listening, self._kill)
        others, quota = (lambda: self._stateful.workers), self._launcher.quota
        self._autoscaler = Autoscaler(self.pools, run, quota, others=others, stop=ask_to_stop)
        self._group_calls = GroupCalls(
            plan,
            self._samplers,
            self._servers,
            self._broadcaster,
            self._supervisor,
            self._budget,
            self._listening,
        )
        self._calls = self._group_calls.calls
        self._batches = PendingBatches(
            plan,
            self._listening,
            self._poll,
            lambda: self._should_stop(),
            self._describe_workers,
            lambda: next((pool.role.name for pool in self.pools if not pool.workers), ""),
        )
        self._networks = FeatureCalls(
            plan,
            self._servers,
            self._supervisor,
            self._listening,
            self._answer,
            self._poll,
            self._batches.stop_if_requested,
        )

    def __enter__(self) -> Self:
        who = "the fleet's control actor"
        try:
            self._autoscaler.start()
            for worker in self._all():
                who = worker.name
                self._stateful.started(worker)
            who = "a learner"
            self._stateful.meet()
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
        return [pool for pool in (self._samplers, *self._servers.values()) if pool.role.count]

    @property
    def restarts(self) -> int:
        return self._budget.spent

    @property
    def placements(self) -> list[Placement]:
        return list(self._launcher.placements.values())

    @property
    def learner(self) -> LearnerRole:
        return self._stateful.learner

    @property
    def moments(self) -> MomentsRole:
        return self._stateful.moments

    def recover_learner(self, error: LearnerLostError) -> None:
        self._batches.abandon_all()
        for pool in self.pools:
            pool.waiting.clear()
        self._broadcaster.forget(self._samplers, self._replace)
        self._stateful.replace_learners(str(error))

    def _sampler_lost(self, worker: Worker, why: str) -> None:
        self._supervisor.lost(self._samplers, worker, why)

    def _replace(self, worker: Worker) -> None:
        self._kill(worker)
        self._samplers.replace(worker)

    def report_progress(self, progress: Progress) -> None:
        self._autoscaler.progress = progress

    def submit(self, requests: Sequence[SampleRequest]) -> PendingBatch:
        return self._submit(requests, scored=True)

    def collect(self, batch: PendingBatch, *, finish: bool = False) -> list[ScoredGroup]:
        return self._collect(batch, finish=finish)

    def stream(self, requests: Iterable[SampleRequest]) -> Iterator[ScoredGroup]:
        return self._stream(partial(self._queue, [request], scored=True) for request in requests)

    def sample_images(self, requests: Iterable[SampleRequest]) -> list[np.ndarray]:
        submits = (partial(self._queue, [request], scored=False) for request in requests)
        return [*self._stream(submits)]

    def score_images(
        self, batches: Iterable[tuple[SampleRequest, Pictures]]
    ) -> Iterator[GroupScores]:
        return self._stream(partial(self._queue_images, *batch) for batch in batches)

    def features(self, batches: Iterable[Pictures], panel: str) -> dict[str, np.ndarray]:
        return self._networks.features(batches, panel)

    def fingerprint(self, panel: str, space: str = MAIN_SPACE) -> str:
        return self._networks.ask(panel, "fingerprint", panel, space)

    def feature_dim(self, panel: str, space: str = MAIN_SPACE) -> int:
        return self._networks.ask(panel, "feature_dim", panel, space)

    def refresh_moments(self) -> None:
        self._stateful.refresh_moments()

    def serve_while(self, work: Callable[[], Result]) -> Result:
        found: list[Result] = []
        task = Background("computing", lambda: found.append(work()))
        try:
            while not task.done(ATTEND_S):
                self._poll(timeout_s=0.0, waited_for=False)
        except TesseraError:  # of a worker: the caller must not continue while the work runs
            task.end()
            raise
        return found[0]

    def broadcast(self, version: int) -> None:
        self._plan.need(self._plan.learner)
        self._broadcaster.broadcast(version, self._stateful.learners, self._samplers)
        self._stateful.broadcast_made()

    def _launch(self, role: Role, index: int, addition: bool, late: bool) -> Worker:
        sampler = role is self._plan.sampler
        wrap = self._weights.actor_class if sampler else actor_class
        threads = SAMPLER_THREADS if sampler else {}
        worker = self._launcher(role, index, wrap, threads, addition=addition, late=late)
        if sampler and self._plan.own_weights:
            worker.weight_version = OWN_WEIGHTS
        elif sampler and self._broadcaster.newest > NO_WEIGHTS:
            self._broadcaster.begin(worker, self._samplers)
        return worker

    def _launch_stateful(self, role: Role, index: int, late: bool) -> Worker:
        return self._launcher(role, index, actor_class, {}, late=late)

    def _dismiss(self, worker: Worker) -> None:
        self._kill(worker)
        if worker.state is State.DRAINING:
            logger.info("%s has left", worker.name)

    def _kill(self, worker: Worker) -> None:
        backend.kill(worker.handle)  # one that stands still, too: its node sees to it

    def _end(self) -> None:
        for worker in self._all():
            self._kill(worker)
        self._autoscaler.end()
        self._launcher.end()

    def _all(self) -> list[Worker]:
        pooled = (worker for pool in self.pools for worker in pool.workers)
        return [*self._stateful.workers, *pooled]

    def _submit(self, requests: Sequence[SampleRequest], *, scored: bool) -> PendingBatch:
        batch = self._queue(requests, scored=scored)
        self._dispatch()
        return batch

    def _queue(self, requests: Sequence[SampleRequest], *, scored: bool) -> PendingBatch:
        self._plan.need(self._plan.sampler)
        batch, version = self._batches.add(len(requests)), self._broadcaster.newest
        for position, request in enumerate(requests):
            pools = self._plan.scoring_pools(request.panel) if scored else ()
            servers = tuple(role.name for role in pools)
            group = PendingGroup(batch, position, request, servers, version)
            queue_for_tokens(self._samplers, group)
        return batch

    def _queue_images(self, request: SampleRequest, images: Pictures) -> PendingBatch:
        check_images(images, request)
        servers = tuple(role.name for role in self._plan.scoring_pools(request.panel))
        stored, batch = put(images, "images to be scored"), self._batches.add(1)
        group = PendingGroup(batch, 0, request, servers, images=stored, given=True)
        for name in servers:
            self._servers[name].add(group)
        return batch

    def _stream(self, submits: Iterable[Callable[[], PendingBatch]]) -> Iterator[Any]:
        # queued, and handed out by the next turn with all that are asked for by then
        try:
            yield from self._batches.stream(submits)
        finally:
            for pool in self.pools:
                pool.waiting.remove(lambda group: group.batch.abandoned)

    def _collect(self, batch: PendingBatch, *, finish: bool = False) -> list[Any]:
        return self._batches.collect(batch, finish=finish)

    def _attend(self, refs: Sequence[ray.ObjectRef], timeout_s: float) -> list[ray.ObjectRef]:
        """Serve the fleet until one of some references is ready; returns it, or nothing after
        `timeout_s` of listening."""
        began = clock.monotonic()
        while (left := timeout_s - self._listening.silence(began)) > 0:
            self._poll(refs, left)
            ready, _ = backend.ready(refs, 1)
            if ready:
                return ready
        return []

    def _answer(self, ref: ray.ObjectRef, what: str, timeout_s: float) -> Any:
        """`ray_calls.answer`, while groups move on."""
        if not self._attend([ref], timeout_s):
            raise too_late(what, timeout_s)
        return answer(ref, what, timeout_s)

    def _poll(
        self,
        others: Sequence[ray.ObjectRef] = (),
        timeout_s: float = LOOK_S,
        *,
        waited_for: bool = True,
    ) -> bool:
        """Poll once: dispatch work, wait for an answer, take all that are ready, then replace
        silent workers; False if no work moved on.

        Args:
            others: references that end the wait, left to the caller.
            waited_for: whether the caller can do nothing without groups.
        """
        # while the learner learns and nothing is on its way, idle workers are no surplus
        decide = bool(self._calls) or (waited_for and not others)
        self._autoscaler.tick(self.restarts, self._broadcaster.newest, decide=decide)
        self._supervisor.tick()
        self._dispatch()
        starting = {worker.ready: (pool, worker) for pool, worker in self._supervisor.starting()}
        refs = [
            *others,
            *self._calls,
            *self._broadcaster.under_way,
            *starting,
            *self._autoscaler.refs(),
        ]
        took = [self._take(ref, starting) for ref in ready_of(refs, min(timeout_s, LOOK_S))]
        if self._listening.look():
            self._autoscaler.restart()  # what waited for this process did not wait for workers
        return self._judge() or any(took)

    def _judge(self) -> bool:
        """Replace silent workers, every `JUDGE_S`; whether there were any."""
        now = clock.monotonic()
        if now - self._judged < JUDGE_S:
            return False
        self._judged = now
        self._launcher.keep({worker.name for worker in self._all()})
        overdue, missed = self._supervisor.overdue(), self._replace_unresponsive()
        return overdue or missed

    def _take(
        self, ref: ray.ObjectRef, starting: Mapping[ray.ObjectRef, tuple[WorkerPool, Worker]]
    ) -> bool:
        """Take an answer that is there; whether it moves work on."""
        if ref in self._calls:
            self._group_calls.advance(ref)
        elif ref in self._broadcaster.under_way:
            self._broadcaster.updated(ref)
        elif ref in starting:
            pool, worker = starting[ref]
            if worker in pool.workers:  # not one that was dropped meanwhile
                self._supervisor.started(pool, worker)
        else:
            if ref in self._autoscaler.refs():
                self._autoscaler.receive(ref)
            return False
        return True

    def _replace_unresponsive(self) -> bool:
        """Replace those that are gone or silent; says whether there were any."""
        here = [worker for worker in self._all() if worker.state in (State.SERVING, State.DRAINING)]
        missed = self._heartbeat.unresponsive(here)
        for worker, why in missed:
            pool = next((pool for pool in self.pools if worker in pool.workers), None)
            if pool is None:  # of a learner or moments server, its next answer will tell
                self._kill(worker)
            else:
                self._supervisor.lost(pool, worker, why)
        return bool(missed)

    def _describe_workers(self) -> str:
        found = [
            f"{pool.role.name}: {len(pool.of(State.SERVING))} of {pool.target} serve"
            for pool in self.pools
        ]
        held = ((worker.name, worker.at(clock.monotonic())) for worker in self._all())
        had = [f"{name} has had {at}" for name, at in held if at]
        return ", ".join([*found, *had[:3]])

    def _dispatch(self) -> None:
        """Send waiting work to the worker of its role that would finish it first."""
        for pool in self.pools:
            while picked := pool.next():
                self._group_calls.send(pool, *picked)
        self._samplers.recycle()
        self._broadcaster.catch_up(self._samplers)
