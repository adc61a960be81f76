"""Calls of pooled workers that the Ray fleet waits for, and what a worker does beside them.

A group goes through three of them:

    sample (tokens) --> images --> score, by each of its judges

`images` is asked for when the tokens are there, of the sampler that drew them. It runs in a thread
of its own, so that the sampler draws the next group meanwhile; all else is answered in order, as
weights must be taken up between the groups that they were sent between. (Asked for at once, with
the tokens' reference, it would hold up what is sent after it: Ray sends an actor's calls in order,
and each when its arguments are there.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import ray

from cluster.messages import Span
from cluster.pool import Worker, WorkerPool
from cluster.tickets import GroupOnTheWay

IMAGES = "images"
SAMPLER_THREADS = {IMAGES: 1}
"""Ray concurrency groups of a sampler, beside the one thread that answers in order."""
WORK = ("load", "sample", "decode", "score")  # phases in which a worker works


class Stage(Enum):
    SAMPLE = "sample"
    IMAGES = "images"
    SCORE = "score"


@dataclass(frozen=True)
class Call:
    """A worker's answer that is being waited for."""

    group: GroupOnTheWay
    pool: WorkerPool
    worker: Worker
    stage: Stage
    waited_s: float = 0.0

    def ended(self) -> None:
        """The worker has it in hand no more."""
        if self.stage is Stage.IMAGES:
            self.worker.decoding -= 1
        else:
            self.worker.busy -= 1

    def measure(self, spans: Iterable[Span]) -> None:
        """Tell the pool how long the work waited and took."""
        spans, meter = tuple(spans), self.pool.meter
        if self.stage is not Stage.IMAGES:  # those wait behind nobody else's work
            queued = sum(span.seconds for span in spans if span.phase == "queue")
            meter.waited(self.waited_s + queued)
        meter.worked(sum(self.worker.count_work(span) for span in spans if span.phase in WORK))


def ask_for_images(call: Call, rollouts: ray.ObjectRef) -> tuple[ray.ObjectRef, Call]:
    """Have the sampler that drew a group decode its images.

    Args:
        call: that brought the rollouts.
        rollouts: their reference, resolved: they travel from store to store.

    Returns:
        Reference to the time it took (the images' own is kept with the group, and stays a
        reference), and the call.
    """
    worker: Any = call.worker
    ask = worker.handle.images.options(num_returns=2, concurrency_group=IMAGES)
    call.group.images, span = ask.remote(rollouts)
    worker.decoding += 1
    return span, Call(call.group, call.pool, worker, Stage.IMAGES)
