"""Brings the learner's weights to the samplers: published once, taken up by each when it can."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError

from cluster.errors import InputLostError, LearnerLostError, TesseraError
from cluster.ray_backend.publisher import Publisher
from cluster.ray_session.calls import answer
from cluster.roles import FleetPlan
from cluster.scheduling.pool import State, Worker, WorkerPool
from cluster.scheduling.weight_versions import NO_WEIGHTS, WeightVersions


class Broadcaster:
    """See the module.

    Args:
        needed: weight_versions of the groups that are with samplers.
        lost: told of a sampler that was lost.
    """

    def __init__(
        self,
        plan: FleetPlan,
        publisher: Publisher,
        needed: Callable[[], Iterator[int]],
        lost: Callable[[Worker], None],
    ) -> None:
        self._plan, self._publisher = plan, publisher
        self._with_samplers, self._lost = needed, lost
        self._weight_versions = WeightVersions()
        self.under_way: dict[ray.ObjectRef, Worker] = {}
        """Samplers' answers that they have taken weights up; for `updated`."""

    @property
    def newest(self) -> int:
        """Policy version that new requests are drawn with; `NO_WEIGHTS` before the first."""
        return self._weight_versions.newest

    def broadcast(self, version: int, learners: Sequence[Worker], samplers: WorkerPool) -> None:
        """Publish the learner's weights once. What is submitted from now on is drawn with them;
        each sampler takes them up when it has no older work to begin. Nobody is waited for, but by
        transports between GPUs, which move the weights while learner and samplers hold still."""
        self._weight_versions.publish(version, self._publish(learners, samplers))
        if self._publisher.on_device:
            self._hand_over(learners, samplers)
        self.catch_up(samplers)

    def begin(self, worker: Worker, samplers: WorkerPool) -> None:
        """Have a new sampler serve with weights only: the oldest that somebody waits for, as it
        never goes back."""
        worker.ready = self._load(worker, self._weight_versions.oldest(self._needed(samplers)))

    def bring(self, worker: Worker, weight_version: int) -> None:
        """Have a sampler go on to an weight_version, if it is behind."""
        if worker.weight_version < weight_version:
            self.under_way[self._load(worker, weight_version)] = worker

    def catch_up(self, samplers: WorkerPool) -> None:
        """Send the newest weights to samplers that have nothing older to begin."""
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
        """A sampler took up weights, or says why not.

        Raises:
            LearnerLostError: the learner died while it packed them.
            TesseraError: what the sampler says.
        """
        worker = self.under_way.pop(ref)
        try:
            answer(ref, f"{worker.name}.load_weights", self._plan.timeout_s)
        except RayActorError:
            self._lost(worker)
        except InputLostError as error:
            raise LearnerLostError(f"{self._plan.learner.name} was lost") from error

    def forget(self, samplers: WorkerPool, replace: Callable[[Worker], Any]) -> None:
        """The learner is another one, with older weights: samplers begin anew."""
        self._weight_versions = WeightVersions()
        self.under_way.clear()
        self._publisher.forget()
        for worker in list(samplers.workers):
            worker.weight_version = NO_WEIGHTS
            if worker.state is State.STARTING:  # perhaps with weights that will never come
                replace(worker)
            elif worker.state is not State.LOST:
                worker.handle.forget_weights.remote()

    def _publish(self, learners: Sequence[Worker], samplers: WorkerPool) -> Any:
        handles = [worker.handle for worker in samplers.workers]
        return self._publisher.publish([worker.handle for worker in learners], handles)

    def _hand_over(self, learners: Sequence[Worker], samplers: WorkerPool) -> None:
        """Have every serving sampler take up the newest weights now; by the object store after all,
        if the transport fails."""
        loading = {self._load(w, self.newest): w for w in samplers.of(State.SERVING)}
        for ref, worker in loading.items():
            try:
                answer(ref, f"{worker.name}.load_weights", self._plan.timeout_s)
            except RayActorError:
                self._lost(worker)
            except TesseraError as error:
                if not self._publisher.fall_back(error):
                    raise
                self._weight_versions.amend(self._publish(learners, samplers))
                for each in loading.values():
                    each.weight_version = NO_WEIGHTS  # and so takes them up again
                return

    def _load(self, worker: Worker, weight_version: int) -> ray.ObjectRef:
        worker.weight_version = weight_version
        return self._publisher.load(worker.handle, self._weight_versions[weight_version])

    def _needed(self, samplers: WorkerPool) -> Iterator[int]:
        """WeightVersions of the groups that wait for a sampler, or are with one."""
        yield from (waiting.weight_version for waiting in samplers.waiting)
        yield from self._with_samplers()
