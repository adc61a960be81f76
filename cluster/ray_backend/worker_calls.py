"""Calls of pooled workers that the Ray fleet waits for, and what a worker does beside them.

A group goes through three of them:

    sample (tokens) --> images --> score, by each of its pools

`images` is asked for when the tokens are there, of the sampler that drew them. It runs in a thread
of its own, so that the sampler draws the next group meanwhile; all else is answered in order, as
weights must be taken up between the groups that they were sent between. (Asked for at once, with
the tokens' reference, it would hold up what is sent after it: Ray sends an actor's calls in order,
and each when its arguments are there.)

A sampler may be asked for the tokens of several groups in one call, which decodes them as one
batch; each group goes its own way after that.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from operator import is_
from typing import Any

import ray

from cluster.messages import GroupScores, RolloutGroup
from cluster.scheduling.in_flight import PendingGroup
from cluster.scheduling.pool import Worker, WorkerPool
from cluster.spans import Span

IMAGES = "images"
SAMPLER_THREADS = {IMAGES: 1}
"""Ray concurrency groups of a sampler, beside the one thread that answers in order."""
WORK = ("load", "sample", "decode", "score")  # phases in which a worker works


class Stage(Enum):
    SAMPLE = "sample"
    IMAGES = "images"
    SCORE = "score"


ASKED = {Stage.SAMPLE: "the tokens", Stage.IMAGES: "the images", Stage.SCORE: "the scores"}


@dataclass(frozen=True)
class Call:
    """A worker's answer that is being waited for."""

    groups: tuple[PendingGroup, ...]
    """Of one weight_version; several only of samplers' tokens."""
    pool: WorkerPool
    worker: Worker
    stage: Stage
    waited_s: tuple[float, ...] = ()
    """Of each group."""
    attempts: tuple[int, ...] = field(init=False)
    """Of each group, when it was asked for."""

    def __post_init__(self) -> None:
        attempts = tuple(group.attempt for group in self.groups)
        object.__setattr__(self, "attempts", attempts)

    def __str__(self) -> str:
        stream, iteration, group = self.groups[0].request.key
        more = f" and {len(self.groups) - 1} more" if len(self.groups) > 1 else ""
        return f"{ASKED[self.stage]} of group {group} of {stream} {iteration}{more}"

    @property
    def live(self) -> list[PendingGroup]:
        """Those whose answers somebody still waits for."""
        return [
            group
            for group, attempt in zip(self.groups, self.attempts)
            if attempt == group.attempt and not group.batch.abandoned
        ]

    @property
    def weight_version(self) -> int:
        return self.groups[0].weight_version

    def began(self) -> None:
        """The worker has it in hand."""
        self.worker.calls[id(self)] = self, time.monotonic()
        if self.worker.idle:
            self.worker.last_response = time.monotonic()
        if self.stage is Stage.IMAGES:
            self.worker.decoding += 1
        else:
            self.worker.take(len(self.groups))

    def ended(self) -> None:
        """The worker has it in hand no more."""
        self.worker.calls.pop(id(self), None)
        self.worker.last_response = time.monotonic()
        if self.stage is Stage.IMAGES:
            self.worker.decoding -= 1
        else:
            self.worker.give(len(self.groups))

    def ask_again(self, most: int, why: str) -> None:
        """The worker was lost: queue the groups as they were before it had them.

        Args:
            most: workers that may be lost with one group in hand, less one.
            why: what became of it, as `why_lost` says it.

        Raises:
            FleetError: whoever gets a group is lost.
        """
        for group in reversed(self.live):
            group.count_loss(most, self.worker.name, why)
            if self.stage is Stage.SCORE:
                self.pool.add(group, front=True)
            else:
                queue_for_tokens(self.pool, group, front=True)

    def ask_anew(self, samplers: WorkerPool, servers: Iterable[WorkerPool], most: int) -> None:
        """What a worker was to work on was lost: the groups begin anew.

        Raises:
            FleetError: as above.
        """
        for group in reversed(self.live):
            group.count_loss(most, self.worker.name, "lost the images")
            group.restart()
            for server in servers:
                server.waiting.remove(partial(is_, group))
            queue_for_tokens(samplers, group, front=True)

    def measure(self, spans: Iterable[Span]) -> None:
        """Tell the pool how long the work waited and took, and how fast the worker is."""
        spans, meter = tuple(spans), self.pool.meter
        tasks = len(self.groups)
        if self.stage is Stage.IMAGES:  # they wait behind nobody else's work
            tasks = 0
        queued = sum(span.seconds for span in spans if span.phase == "queue")
        for waited_s in self.waited_s:
            meter.waited(waited_s + queued)
        worked = sorted((s for s in spans if s.phase in WORK), key=lambda span: span.start)
        work = [(self.worker.count_work(span), span) for span in worked]
        meter.worked(sum(seconds for seconds, _ in work))
        self.worker.pace.add(sum(seconds for seconds, s in work if s.phase != "load"), tasks)


def queue_for_tokens(samplers: WorkerPool, group: PendingGroup, *, front: bool = False) -> None:
    """Have a group drawn, by whichever sampler, perhaps together with others of its iteration."""
    samplers.add(group, front=front, weight_version=group.weight_version, kind=group.request.batch)


def ask_for_images(
    call: Call, rollouts: Sequence[RolloutGroup]
) -> Iterator[tuple[ray.ObjectRef, Call]]:
    """Have the sampler that drew some groups decode their images, each group on its own.

    Args:
        call: that brought the rollouts.

    Yields:
        Reference to the time it took (the images' own is kept with the group, and stays a
        reference), and the call.
    """
    worker: Any = call.worker
    ask = worker.handle.images.options(num_returns=2, concurrency_group=IMAGES)
    for group, drawn in zip(call.groups, rollouts, strict=True):
        if group.batch.abandoned:
            continue
        group.rollouts = drawn
        group.images, span = ask.remote(drawn)
        yield span, Call((group,), call.pool, worker, Stage.IMAGES)


def spans_of(value: list[RolloutGroup] | GroupScores | Span) -> tuple[Span, ...]:
    """What the answer of a call tells of the worker's time."""
    if isinstance(value, Span):
        return (value,)
    answers = value if isinstance(value, list) else [value]
    return tuple(span for answer in answers for span in answer.spans)
