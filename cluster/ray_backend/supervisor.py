"""Replaces lost workers, here and nowhere else: crashed, silent, or stuck in a request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

from ray.exceptions import RayActorError

from cluster import clock
from cluster.errors import FleetError, InputLostError, LearnerLostError
from cluster.ray_session.calls import answer, why_lost
from cluster.roles import FleetPlan
from cluster.scheduling.listening import Listening
from cluster.scheduling.pool import State, Worker, WorkerPool
from cluster.scheduling.restarts import RestartBudget

logger = logging.getLogger(__name__)


class Supervisor:
    """Lets workers serve once they are ready; replaces lost ones, within a budget.

    Args:
        listening: silence counts only while this process listened.
        stop: kills a worker's process.
    """

    def __init__(
        self,
        plan: FleetPlan,
        pools: Sequence[WorkerPool],
        budget: RestartBudget,
        listening: Listening,
        stop: Callable[[Worker], None],
    ) -> None:
        self._plan, self._pools, self._budget = plan, pools, budget
        self._listening, self._stop = listening, stop
        self._due: dict[Worker, tuple[float, WorkerPool]] = {}  # lost ones, to be replaced when
        self._late: set[Worker] = set()  # logged as waiting for room

    def starting(self) -> Iterator[tuple[WorkerPool, Worker]]:
        for pool in self._pools:
            for worker in pool.of(State.STARTING):
                yield pool, worker

    def started(self, pool: WorkerPool, worker: Worker) -> None:
        """Take a worker's answer that it is ready, or failed to start.

        Raises:
            FleetError: it cannot start, and no other serves.
            LearnerLostError: its first weights were lost with the learner.
        """
        try:
            answer(worker.ready, worker.name, self._plan.timeout_s)
        except RayActorError as error:
            self.lost(pool, worker, why_lost(error))
            return
        except InputLostError as error:  # its first weights
            raise LearnerLostError(f"{self._plan.learner.name} was lost") from error
        except FleetError as error:
            if not (worker.addition and pool.of(State.SERVING)):
                raise
            pool.drop(worker)
            logger.warning("going on without %s: %s", worker.name, error)
            return
        worker.state = State.SERVING
        if worker.addition or worker in self._late:
            logger.info("%s serves", worker.name)
        self._late.discard(worker)

    def tick(self) -> None:
        """Replace lost workers whose delay is over."""
        now = clock.monotonic()
        for worker, (due, pool) in list(self._due.items()):
            if now >= due:
                del self._due[worker]
                pool.replace(worker)

    def overdue(self) -> bool:
        """Replace workers that did not answer a request within `timeout_s`, and continue without
        those that do not start. Call it after all ready answers are taken.

        Returns:
            Whether any was replaced.
        """
        found, limit = False, self._plan.timeout_s
        for pool in self._pools:
            for worker in list(pool.workers):
                if worker.state is State.STARTING:
                    late = self._listening.silence(worker.since) > limit
                    if late and pool.of(State.SERVING):
                        self._go_on_without(pool, worker)
                elif worker.state is State.LOST or worker.idle:
                    continue
                elif self._listening.silence(worker.last_response) > limit:
                    had = worker.at(clock.monotonic())
                    within = f"within {limit:g} s (--timeout-s)"
                    self.lost(pool, worker, f"did not answer {within}: it has had {had}")
                    found = True
        return found

    def lost(self, pool: WorkerPool, worker: Worker, why: str) -> None:
        """Kill and replace a lost worker, now or after a delay. Its requests are queued again by
        `GroupCalls`, whose calls fail.

        Raises:
            FleetError: it was replaced too often.
        """
        if worker.state is State.LOST:
            return
        if worker not in pool.workers or worker.state is State.DRAINING:
            self._stop(worker)
            pool.replace(worker)
            return
        if self._budget.stopping():  # the remaining workers finish
            pool.drop(worker)
            logger.warning("%s %s while the run stops: it is not replaced", worker.name, why)
            return
        delay = self._budget.spend(worker.name, why, clock.monotonic())
        self._stop(worker)
        later = f" in {delay:g} s" if delay else ""
        logger.warning(
            "%s %s; its requests are retried, and a replacement starts%s",
            worker.name,
            why,
            later,
        )
        if delay:
            worker.state = State.LOST
            self._due[worker] = clock.monotonic() + delay, pool
        else:
            pool.replace(worker)

    def _go_on_without(self, pool: WorkerPool, worker: Worker) -> None:
        """Continue without a worker that does not start while others serve. One that the run
        started with keeps waiting for room, since its machine may return."""
        if worker in self._late:
            return
        why = (
            f"it did not start within {self._plan.timeout_s:g} s; is the cluster short of CPUs or "
            "GPUs?"
        )
        if worker.addition:
            pool.drop(worker)
            logger.warning("going on without %s: %s", worker.name, why)
        else:
            self._late.add(worker)
            logger.warning("going on without %s until there is room: %s", worker.name, why)
