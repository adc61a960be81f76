"""Calls that pooled workers have in hand, and what comes of each: the way of a group from tokens to
scores."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray

from cluster.errors import InputLostError
from cluster.ray_backend.broadcast import Broadcaster
from cluster.ray_backend.supervisor import Supervisor
from cluster.ray_backend.worker_calls import Call, Stage, ask_for_images, spans_of
from cluster.ray_session.calls import LOST, answer, why_lost
from cluster.roles import FleetPlan
from cluster.scheduling.in_flight import PendingGroup
from cluster.scheduling.listening import Listening
from cluster.scheduling.pool import Worker, WorkerPool
from cluster.scheduling.restarts import RestartBudget
from cluster.scheduling.validation import ScoreChecks, check_rollouts
from cluster.scheduling.work_queue import Waiting


class InFlight:
    """Sends groups to workers and takes their answers, one call after another.

    Args:
        servers: pools of reward servers by name.
        budget: told of workers that have answered.
        listening: pauses of this process are no waiting of the work.
    """

    def __init__(
        self,
        plan: FleetPlan,
        samplers: WorkerPool,
        servers: Mapping[str, WorkerPool],
        delivery: Broadcaster,
        supervisor: Supervisor,
        budget: RestartBudget,
        listening: Listening,
    ) -> None:
        self._plan, self._samplers, self._servers = plan, samplers, servers
        self._broadcaster, self._supervisor, self._budget = delivery, supervisor, budget
        self._listening, self._check = listening, ScoreChecks()
        self.calls: dict[ray.ObjectRef, Call] = {}
        """PendingBatch that are waited for, to be brought to `advance`."""

    @property
    def weight_versions(self) -> Iterator[int]:
        """Weights of the groups that are with samplers."""
        return (call.weight_version for call in self.calls.values() if call.pool is self._samplers)

    def send(self, pool: WorkerPool, picked: Sequence[Waiting], worker: Worker) -> None:
        """Give a worker of a pool the work that was picked for it."""
        groups: tuple[PendingGroup, ...] = tuple(waiting.task for waiting in picked)
        first, now = groups[0], time.monotonic()
        if pool is self._samplers:
            self._broadcaster.bring(worker, first.weight_version)
            requests = [group.request for group in groups]
            stage, ref = Stage.SAMPLE, worker.handle.sample.remote(requests)
        else:
            stage, ref = Stage.SCORE, worker.handle.score.remote(first.request, first.images)
        waited_s = tuple(now - w.since - self._listening.paused(w.since) for w in picked)
        self._follow(ref, Call(groups, pool, worker, stage, waited_s))

    def _follow(self, ref: ray.ObjectRef, call: Call) -> None:
        call.began()
        self.calls[ref] = call

    def advance(self, ref: ray.ObjectRef) -> None:
        """Take one finished call: pass its groups on, or ask again where its worker was lost."""
        call, images = self.calls.pop(ref), None
        group, pool, worker = call.groups[0], call.pool, call.worker
        call.ended()
        try:
            value = answer(ref, worker.name, self._plan.timeout_s)
            if call.stage is Stage.IMAGES and not group.servers:
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
        elif group.servers:
            group.put_images(value)
            for name in group.servers:
                self._servers[name].add(group)
        else:
            group.batch.put(group.position, images)

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
                if group.servers:
                    check_rollouts(drawn, group.request, name)
