"""Who starts, who was lost, who takes a lost one's place: the life of a Ray fleet's workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import ray
from ray.exceptions import RayActorError

from cluster.errors import FleetError
from cluster.pool import State, Worker, WorkerPool
from cluster.ray_calls import answer
from cluster.roles import FleetPlan


class Supervisor:
    """Lets workers serve once they are ready, and replaces lost ones, up to a number.

    Args:
        say: told of what happens, a line each.
    """

    def __init__(
        self, plan: FleetPlan, pools: Sequence[WorkerPool], say: Callable[[str], None]
    ) -> None:
        self._plan, self._pools, self._say = plan, pools, say
        self.restarts = 0
        """How many lost workers were replaced so far."""

    def starting(self) -> Iterator[tuple[WorkerPool, Worker]]:
        for pool in self._pools:
            for worker in pool.of(State.STARTING):
                yield pool, worker

    def started(self, pool: WorkerPool, worker: Worker) -> None:
        """A worker says that it is ready, or why it will never be."""
        try:
            answer(worker.ready, worker.name, self._plan.timeout_s)
        except RayActorError:
            self.lost(pool, worker)
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

    def give_up_on_late_additions(self) -> None:
        for pool, worker in list(self.starting()):
            late = time.monotonic() - worker.since > self._plan.timeout_s
            if late and worker.addition and pool.of(State.SERVING):
                pool.drop(worker)
                self._say(
                    f"going on without {worker.name}: it did not start within "
                    f"{self._plan.timeout_s:g} s; is the cluster short of CPUs or GPUs?"
                )

    def lost(self, pool: WorkerPool, worker: Worker) -> None:
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

    def await_worker(self, pool: WorkerPool) -> Worker:
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
            self.started(pool, next(w for w in starting if w.ready == ready[0]))
        return pool.of(State.SERVING)[0]
