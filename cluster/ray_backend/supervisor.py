"""Who starts, who was lost, who takes a lost one's place: the life of a Ray fleet's workers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence

from ray.exceptions import RayActorError

from cluster.errors import FleetError, InputLostError, LearnerLostError
from cluster.ray_session.calls import answer
from cluster.roles import FleetPlan
from cluster.scheduling.listening import Listening
from cluster.scheduling.pool import State, Worker, WorkerPool
from cluster.scheduling.restarts import RestartBudget

logger = logging.getLogger(__name__)


class Supervisor:
    """Lets workers serve once they are ready, and replaces lost ones, within a budget.

    Args:
        listening: when this process did: only then is anybody silent.
        stop: ends a worker's process, whatever state it is in.
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
        self._late: set[Worker] = set()  # said to be waiting for room

    def starting(self) -> Iterator[tuple[WorkerPool, Worker]]:
        for pool in self._pools:
            for worker in pool.of(State.STARTING):
                yield pool, worker

    def started(self, pool: WorkerPool, worker: Worker) -> None:
        """A worker says that it is ready, or why it will never be.

        Raises:
            FleetError: it cannot start, and no other serves.
            LearnerLostError: the weights that it was to begin with went with the learner.
        """
        try:
            answer(worker.ready, worker.name, self._plan.timeout_s)
        except RayActorError:
            self.lost(pool, worker)
            return
        except InputLostError as error:  # the weights that it was to begin with
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
        """Replace lost ones when their time has come."""
        now = time.monotonic()
        for worker, (due, pool) in list(self._due.items()):
            if now >= due:
                del self._due[worker]
                pool.replace(worker)

    def overdue(self) -> bool:
        """Replace workers that have work in hand and have not answered within the longest wait, and
        go on without those that do not start; says whether any was replaced. To be asked when all
        answers that lie ready have been taken."""
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
                    had = worker.at(time.monotonic())
                    within = f"within {limit:g} s (--timeout-s)"
                    self.lost(pool, worker, f"did not answer {within}: it has had {had}")
                    found = True
        return found

    def lost(self, pool: WorkerPool, worker: Worker, why: str = "was lost") -> None:
        """Start another worker in the place of a lost one, now or a little later.

        Raises:
            FleetError: it was replaced too often.
        """
        if worker.state is State.LOST:
            return
        if worker not in pool.workers or worker.state is State.DRAINING:
            self._stop(worker)
            pool.replace(worker)
            return
        if self._budget.stopping():  # with those that are left, or without
            pool.drop(worker)
            logger.warning("%s %s while the run stops: nobody takes its place", worker.name, why)
            return
        delay = self._budget.spend(worker.name, why, time.monotonic())
        self._stop(worker)
        later = f" in {delay:g} s" if delay else ""
        logger.warning(
            "%s %s; its work is asked for again, and another takes its place%s",
            worker.name,
            why,
            later,
        )
        if delay:
            worker.state = State.LOST
            self._due[worker] = time.monotonic() + delay, pool
        else:
            pool.replace(worker)

    def _go_on_without(self, pool: WorkerPool, worker: Worker) -> None:
        """A worker does not start while others serve: no reason to stop. One that the run began
        with keeps waiting for room, since its machine may come back."""
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
