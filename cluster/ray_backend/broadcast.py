"""How weights reach the samplers: published once, loaded by each sampler between its groups.

`publisher.py` has how a snapshot travels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError

from cluster.errors import InputLostError, LearnerLostError
from cluster.ray_backend.publisher import Publisher
from cluster.ray_session.calls import answer, why_lost
from cluster.roles import FleetPlan
from cluster.scheduling.pool import State, Worker, WorkerPool
from cluster.scheduling.weight_versions import NO_WEIGHTS, OWN_WEIGHTS, WeightVersions


class Broadcaster:
    """Sends each version of the weights to the samplers.

    Args:
        assigned: weight versions of the groups that are assigned to samplers.
        lost: called with a sampler that was lost, and how.
    """

    def __init__(
        self,
        plan: FleetPlan,
        publisher: Publisher,
        assigned: Callable[[], Iterator[int]],
        lost: Callable[[Worker, str], None],
    ) -> None:
        self._plan, self._publisher = plan, publisher
        self._assigned, self._lost = assigned, lost
        self._weight_versions = WeightVersions()
        if plan.own_weights:
            self._weight_versions.publish(OWN_WEIGHTS, None)
        self.under_way: dict[ray.ObjectRef, Worker] = {}
        """Pending answers of `load_weights`, for `updated`."""

    @property
    def newest(self) -> int:
        """Policy version that new requests are drawn with; `NO_WEIGHTS` before the first."""
        return self._weight_versions.newest

    def broadcast(self, version: int, learners: Sequence[Worker], samplers: WorkerPool) -> None:
        """Publish the learner's weights for all requests from now on, without waiting. Each sampler
        loads them when it has no older requests."""
        serving = [worker.handle for worker in samplers.of(State.SERVING)]
        published = self._publisher.publish([worker.handle for worker in learners], serving)
        self._weight_versions.publish(version, published)
        self.catch_up(samplers)

    def begin(self, worker: Worker, samplers: WorkerPool) -> None:
        """Load a new sampler's first weights: the oldest that a request needs, since a sampler
        never returns to older ones."""
        worker.ready = self._load(worker, self._weight_versions.oldest(self._needed(samplers)))

    def update(self, worker: Worker, weight_version: int) -> None:
        """Have a sampler load a weight version, if its own is older."""
        if worker.weight_version < weight_version:
            self.under_way[self._load(worker, weight_version)] = worker

    def catch_up(self, samplers: WorkerPool) -> None:
        """Send the newest weights to samplers, if no older request waits."""
        self._publisher.look()
        if samplers.waiting:
            return
        for worker in samplers.workers:
            serving = worker.state is State.SERVING
            if worker.weight_version == self.newest or not (
                serving or worker.state is State.STARTING
            ):
                continue
            loaded = self._load(worker, self.newest)
            if serving:
                self.under_way[loaded] = worker
            else:
                worker.ready = loaded
        self._weight_versions.oldest(self._needed(samplers))

    def updated(self, ref: ray.ObjectRef) -> None:
        """Take a sampler's answer to `load_weights`.

        Raises:
            LearnerLostError: the learner was lost while it packed them.
            TesseraError: raised by the sampler.
        """
        worker = self.under_way.pop(ref)
        try:
            answer(ref, f"{worker.name}.load_weights", self._plan.timeout_s)
        except RayActorError as error:
            self._lost(worker, why_lost(error))
        except InputLostError as error:
            raise LearnerLostError(f"{self._plan.learner.name} was lost") from error

    def forget(self, samplers: WorkerPool, replace: Callable[[Worker], Any]) -> None:
        """Drop all versions: the learner was replaced, and its weights are older."""
        self._weight_versions = WeightVersions()
        self.under_way.clear()
        self._publisher.forget()
        for worker in list(samplers.workers):
            worker.weight_version = NO_WEIGHTS
            if worker.state is State.STARTING:  # perhaps waiting for weights that are lost
                replace(worker)
            elif worker.state is not State.LOST:
                worker.handle.forget_weights.remote()

    def _load(self, worker: Worker, weight_version: int) -> ray.ObjectRef:
        worker.weight_version = weight_version
        return self._publisher.load(worker.handle, self._weight_versions[weight_version])

    def _needed(self, samplers: WorkerPool) -> Iterator[int]:
        """Weight versions of the groups that wait for a sampler, and of those assigned to one."""
        yield from (waiting.weight_version for waiting in samplers.waiting)
        yield from self._assigned()
