"""What a group goes through: calls of samplers and reward servers, and what comes of each answer.

    queue of samplers --> sample (tokens) --> images --> queues of its reward pools --> score

`images` is called when the tokens are there, on the sampler that drew them, since the tokens are
part of the answer anyway. It runs in a thread beside the next group's `sample`; all other calls are
answered in order, so that weights change between the groups that they were sent between. (Called at
once, with a reference to the tokens, it would block the calls after it: Ray sends an actor's calls
in order, each when its arguments are there.)

One call may hold several groups (`Role.max_groups`): tokens that are decoded as one batch, then
their images, and scores that a server may batch. If a worker is lost, its groups are queued again;
if images are lost with their node, the group is sampled again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from operator import is_
from typing import Any

import ray

from cluster import clock
from cluster.errors import InputLostError
from cluster.messages import RolloutGroup
from cluster.ray_backend.broadcast import Broadcaster
from cluster.ray_backend.supervisor import Supervisor
from cluster.ray_session.calls import LOST, answer, why_lost
from cluster.ray_session.private import call_inside
from cluster.roles import FleetPlan
from cluster.scheduling.clock_offsets import ClockOffsets, spans_of
from cluster.scheduling.in_flight import PendingGroup
from cluster.scheduling.joint_calls import images_of, scores_of
from cluster.scheduling.listening import Listening
from cluster.scheduling.pool import Worker, WorkerPool
from cluster.scheduling.restarts import RestartBudget
from cluster.scheduling.validation import ScoreChecks, check_rollouts
from cluster.scheduling.work_queue import Waiting
from cluster.spans import QUEUE, Span

IMAGES = "images"
SAMPLER_THREADS = {IMAGES: 1}
"""Ray concurrency groups of a sampler, beside the thread that answers in order."""
WORK = ("load", "sample", "decode", "score")  # phases in which a worker works


class Stage(Enum):
    """What a call asks for."""

    SAMPLE = "the tokens"
    IMAGES = "the images"
    SCORE = "the scores"


@dataclass(frozen=True)
class Call:
    """A worker's pending answer."""

    groups: tuple[PendingGroup, ...]
    """Of one weight version."""
    pool: WorkerPool
    worker: Worker
    stage: Stage
    waited_s: tuple[float, ...] = ()
    """Queue wait of each group."""
    sent: float = field(default_factory=clock.epoch)
    """Seconds since the epoch."""
    attempts: tuple[int, ...] = field(init=False)
    """Of each group, when the call was made."""

    def __post_init__(self) -> None:
        attempts = tuple(group.attempt for group in self.groups)
        object.__setattr__(self, "attempts", attempts)

    def __str__(self) -> str:
        stream, iteration, group = self.groups[0].request.key
        more = f" and {len(self.groups) - 1} more" if len(self.groups) > 1 else ""
        return f"{self.stage.value} of group {group} of {stream} {iteration}{more}"

    @property
    def live(self) -> list[PendingGroup]:
        """Groups whose answers are still wanted."""
        return [
            group
            for group, attempt in zip(self.groups, self.attempts)
            if attempt == group.attempt and not group.batch.abandoned
        ]

    @property
    def weight_version(self) -> int:
        return self.groups[0].weight_version

    def parts(self, value: Any) -> Sequence[Any]:
        """An answer of images or scores, by group."""
        return [value] if len(self.groups) == 1 else value

    def began(self) -> None:
        """Count the call as the worker's."""
        self.worker.calls[id(self)] = self, clock.monotonic()
        if self.worker.idle:
            self.worker.last_response = clock.monotonic()
        if self.stage is Stage.IMAGES:
            self.worker.decoding += len(self.groups)
        else:
            self.worker.take(len(self.groups))

    def ended(self) -> None:
        """The worker answered, or was lost."""
        self.worker.calls.pop(id(self), None)
        self.worker.last_response = clock.monotonic()
        if self.stage is Stage.IMAGES:
            self.worker.decoding -= len(self.groups)
        else:
            self.worker.give(len(self.groups))

    def retry(self, limit: int, why: str) -> None:
        """The worker was lost: queue its groups again.

        Args:
            limit: workers that may be lost with one group, less one.
            why: as `why_lost` says it.

        Raises:
            FleetError: too many workers were lost with a group.
        """
        for group in reversed(self.live):
            group.count_loss(limit, self.worker.name, why)
            if self.stage is Stage.SCORE:
                self.pool.add(group, front=True)
            else:
                queue_for_tokens(self.pool, group, front=True)

    def sample_again(self, samplers: WorkerPool, servers: Iterable[WorkerPool], limit: int) -> None:
        """The images were lost: restart the groups from the tokens.

        Raises:
            FleetError: as in `retry`.
        """
        for group in reversed(self.live):
            group.count_loss(limit, self.worker.name, "lost the images")
            group.restart()
            for server in servers:
                server.waiting.remove(partial(is_, group))
            queue_for_tokens(samplers, group, front=True)

    def measure(self, spans: Sequence[Span]) -> None:
        """Record queue waits and working time in the pool's meter and the worker's pace."""
        meter, tasks = self.pool.meter, len(self.groups)
        if self.stage is Stage.IMAGES:  # they are not queued, and complete no task
            tasks = 0
        queued = sum(span.seconds for span in spans if span.phase == QUEUE)
        for waited_s in self.waited_s:
            meter.waited(waited_s + queued / len(self.groups))
        worked = sorted((s for s in spans if s.phase in WORK), key=lambda span: span.start)
        work = [(self.worker.count_work(span), span) for span in worked]
        meter.worked(sum(seconds for seconds, _ in work))
        self.worker.pace.add(sum(seconds for seconds, s in work if s.phase != "load"), tasks)


class GroupCalls:
    """Sends groups to workers and takes their answers, one call after another.

    Args:
        servers: pools of reward servers by name.
        budget: learns which workers have answered.
        listening: pauses of this process do not count as queue wait.
    """

    def __init__(
        self,
        plan: FleetPlan,
        samplers: WorkerPool,
        servers: Mapping[str, WorkerPool],
        broadcaster: Broadcaster,
        supervisor: Supervisor,
        budget: RestartBudget,
        listening: Listening,
    ) -> None:
        self._plan, self._samplers, self._servers = plan, samplers, servers
        self._broadcaster, self._supervisor, self._budget = broadcaster, supervisor, budget
        self._listening, self._check, self._clocks = listening, ScoreChecks(), ClockOffsets()
        self.calls: dict[ray.ObjectRef, Call] = {}
        """Pending answers, for `advance`."""

    @property
    def weight_versions(self) -> Iterator[int]:
        """Of the groups that samplers have, without those abandoned with a lost learner."""
        samplers = (call for call in self.calls.values() if call.pool is self._samplers)
        return (call.weight_version for call in samplers if call.live)

    def send(self, pool: WorkerPool, picked: Sequence[Waiting], worker: Worker) -> None:
        """Give a worker the tasks that were picked for it."""
        groups: tuple[PendingGroup, ...] = tuple(waiting.task for waiting in picked)
        first, now = groups[0], clock.monotonic()
        if pool is self._samplers:
            self._broadcaster.update(worker, first.weight_version)
            requests = [group.request for group in groups]
            stage, ref = Stage.SAMPLE, worker.handle.sample.remote(requests)
        else:
            stage, ref = Stage.SCORE, _ask_scores(worker.handle, groups)
        waited_s = tuple(now - w.since - self._listening.paused(w.since) for w in picked)
        self._follow(ref, Call(groups, pool, worker, stage, waited_s))

    def _follow(self, ref: ray.ObjectRef, call: Call) -> None:
        call.began()
        self.calls[ref] = call

    def advance(self, ref: ray.ObjectRef) -> None:
        """Take one answer: pass its groups on, or retry them if the worker was lost."""
        call, images = self.calls.pop(ref), list[Any]()
        pool, worker = call.pool, call.worker
        call.ended()
        try:
            value = answer(ref, worker.name, self._plan.timeout_s)
            if call.stage is Stage.IMAGES:
                images = [self._images(group, worker) for group in call.groups]
        except LOST as error:
            call.retry(self._plan.max_restarts, why_lost(error))
            self._supervisor.lost(pool, worker, why_lost(error))
            return
        except InputLostError:  # the images were lost with their node
            if any(group.given for group in call.groups):
                raise
            call.sample_again(self._samplers, self._servers.values(), self._plan.max_restarts)
            return
        self._budget.worked(worker.name)
        call.measure(spans_of(value))
        value = self._clocks.aligned(value, call.sent, clock.epoch())
        pool.dismiss()
        if not call.live:
            return
        self._validate(call, value)
        if call.stage is Stage.SAMPLE:
            self._decode_images(call, value)
            return
        live = set(map(id, call.live))
        for place, (group, part) in enumerate(zip(call.groups, call.parts(value), strict=True)):
            if id(group) not in live:
                continue
            if call.stage is Stage.SCORE:
                group.put_scores(pool.role.name, part)
            elif group.servers:
                group.put_images(part)
                for name in group.servers:
                    self._servers[name].add(group)
            else:
                group.batch.put(group.position, images[place])

    def _images(self, group: PendingGroup, worker: Worker) -> Any:
        """Images that the caller wants; None of a group that is scored, whose images stay where
        they are."""
        if group.servers:
            return None
        return answer(group.images, f"{worker.name}.images", self._plan.timeout_s)

    def _decode_images(self, call: Call, rollouts: Sequence[RolloutGroup]) -> None:
        """Have the sampler that drew some groups decode their images. The answer is the time it
        took; the images stay references."""
        handle: Any = call.worker.handle
        found = [
            (group, drawn)
            for group, drawn in zip(call.groups, rollouts, strict=True)
            if not group.batch.abandoned
        ]
        groups, all_drawn = zip(*found)
        if len(groups) == 1:
            method = handle.images.options(num_returns=2, concurrency_group=IMAGES)
            *images, spans = method.remote(*all_drawn)
        else:
            count = len(groups) + 1
            *images, spans = call_inside(
                handle, images_of, list(all_drawn), group=IMAGES, num_returns=count
            )
        for group, drawn, ref in zip(groups, all_drawn, images, strict=True):
            group.rollouts, group.images = drawn, ref
        self._follow(spans, Call(groups, call.pool, call.worker, Stage.IMAGES))

    def _validate(self, call: Call, value: Any) -> None:
        """Check an answer against its requests.

        Raises:
            FleetError: it does not fit them.
        """
        role, name = call.pool.role, call.worker.name
        if call.stage is Stage.SCORE:
            for group, scores in zip(call.groups, call.parts(value), strict=True):
                request, panel = group.request, group.request.panel
                names = {"scorers": role.scorers.get(panel), "spaces": role.spaces.get(panel)}
                self._check(scores, request, pool=role.name, worker=name, **names)
        elif call.stage is Stage.SAMPLE:
            for group, drawn in zip(call.groups, value, strict=True):
                if group.servers:
                    check_rollouts(drawn, group.request, name)


def _ask_scores(handle: Any, groups: Sequence[PendingGroup]) -> Any:
    """Have a reward server score some groups."""
    if len(groups) == 1:
        return handle.score.remote(groups[0].request, groups[0].images)
    requests = [group.request for group in groups]
    return call_inside(handle, scores_of, requests, *(group.images for group in groups))


def queue_for_tokens(samplers: WorkerPool, group: PendingGroup, *, front: bool = False) -> None:
    """Queue a group for any sampler, perhaps in one call with others of its iteration."""
    samplers.add(
        group,
        front=front,
        weight_version=group.weight_version,
        kind=group.request.batch,
        rows=group.request.rows,
    )
