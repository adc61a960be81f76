"""Groups between request and scores, and the waits for them. No Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cluster import clock
from cluster.errors import FleetError, LostWhileStoppingError, StopRequestedError
from cluster.messages import GroupScores, RolloutGroup, SampleRequest, ScoredGroup, merge_scores
from cluster.roles import FleetPlan
from cluster.scheduling.listening import Listening
from cluster.spans import Span

STOPPED = "stopped while sampling"


@dataclass(eq=False)
class PendingBatch:
    """Requests that were submitted together, and their results in the same order."""

    results: list[Any]
    missing: int = field(init=False)
    abandoned: bool = False
    """No caller waits for it any more."""

    def __post_init__(self) -> None:
        self.missing = len(self.results)

    def put(self, position: int, result: Any) -> None:
        self.results[position] = result
        self.missing -= 1


@dataclass(eq=False)
class PendingGroup:
    """One request, and what is known of its answer."""

    batch: PendingBatch
    position: int
    """Place among the requests of the batch."""
    request: SampleRequest
    servers: tuple[str, ...]
    """Pools of reward servers that score it, in the order of the merge; none if only the images are
    wanted (galleries)."""
    weight_version: int = 0
    """Policy version that it is sampled with: the newest when it was requested."""
    rollouts: RolloutGroup | None = None
    images: Any = None
    """Reference to the images, which stay in the object store."""
    given: bool = False
    """The images are the caller's: there are no rollouts, and the result is the scores alone."""
    losses: list[str] = field(default_factory=list)
    """Workers that were lost while they had it, and why."""
    attempt: int = 0
    """How often it was restarted; answers of earlier attempts are dropped."""
    parts: dict[str, GroupScores] = field(default_factory=dict)
    """Scores by pool."""

    def count_loss(self, limit: int, worker: str, why: str) -> None:
        """Record that a worker was lost while it had the group.

        Raises:
            FleetError: more than `limit` + 1 were.
        """
        self.losses.append(f"{worker} {why}")
        if len(self.losses) > limit + 1:
            stream, iteration, group = self.request.key
            raise FleetError(
                f"{len(self.losses)} workers were lost with group {group} of {stream} {iteration} "
                f"in hand ({'; '.join(self.losses)}): look at their logs for the reason, or raise "
                "--max-restarts"
            )

    def restart(self) -> None:
        """Start a new attempt: the rollouts or images were lost."""
        self.attempt += 1
        self.rollouts = self.images = None
        self.parts.clear()

    def put_images(self, span: Span) -> None:
        """Record that the images behind `images` are decoded."""
        assert self.rollouts is not None
        self.rollouts = self.rollouts.with_span(span)

    def put_scores(self, pool: str, scores: GroupScores) -> None:
        """Add the scores of one pool; the last one completes the group."""
        self.parts[pool] = scores
        if len(self.parts) < len(self.servers):
            return
        merged = merge_scores([self.parts[name] for name in self.servers])
        self.images = None  # the object store may drop them
        if self.given:
            self.batch.put(self.position, merged)
            return
        assert self.rollouts is not None
        self.batch.put(self.position, ScoredGroup(rollouts=self.rollouts, scores=merged))


class PendingBatches:
    """All batches that callers wait for, and the waits.

    Args:
        listening: a wait is too long only by the time in which this process listened.
        poll: dispatches work and takes answers; False if nothing happened.
        describe_workers: for the error of a wait that is too long.
        empty_pool: role of which no worker is left; empty if there is none.
    """

    def __init__(
        self,
        plan: FleetPlan,
        listening: Listening,
        poll: Callable[[], bool],
        should_stop: Callable[[], bool],
        describe_workers: Callable[[], str],
        empty_pool: Callable[[], str] = lambda: "",
    ) -> None:
        self._plan, self._listening, self._poll = plan, listening, poll
        self._should_stop, self._describe_workers = should_stop, describe_workers
        self._empty_pool = empty_pool
        self._pending: set[PendingBatch] = set()

    @property
    def missing(self) -> int:
        """Groups in flight."""
        return sum(batch.missing for batch in self._pending)

    def add(self, groups: int) -> PendingBatch:
        """A new batch of so many groups."""
        batch = PendingBatch([None] * groups)
        self._pending.add(batch)
        return batch

    def collect(self, batch: PendingBatch, *, finish: bool = False) -> list[Any]:
        """Wait for the results of a batch, in order. See `_wait`."""
        self._wait(lambda: not batch.missing, finish=finish)
        self._pending.discard(batch)
        return batch.results

    def stream(self, submits: Iterable[Callable[[], PendingBatch]]) -> Iterator[Any]:
        """Results of single groups, in order, each submitted when there is a slot for it. Groups of
        any batch take slots until they are finished, and these until they are yielded."""
        left, ahead, slots = iter(submits), deque[PendingBatch](), self._plan.slots
        all_submitted = False

        def ready() -> bool:
            """Submit more where there is room; whether the next result is there, or none is left
            to come."""
            nonlocal all_submitted
            free = min(slots - self.missing, slots - len(ahead))
            while free > 0 and not all_submitted:
                submit = next(left, None)
                if submit is None:
                    all_submitted = True
                else:
                    ahead.append(submit())
                    free -= 1
            return not ahead[0].missing if ahead else all_submitted

        try:
            while True:
                self._wait(ready)
                if not ahead:
                    return
                batch = ahead.popleft()
                self._pending.discard(batch)
                yield batch.results[0]
        finally:
            self._abandon(ahead)

    def abandon_all(self) -> None:
        """No caller waits for any batch any more."""
        self._abandon(list(self._pending))

    def _abandon(self, batches: Iterable[PendingBatch]) -> None:
        for batch in batches:
            batch.abandoned = True
            self._pending.discard(batch)

    def stop_if_requested(self) -> None:
        if self._should_stop():
            raise StopRequestedError(STOPPED)

    def _wait(self, ready: Callable[[], bool], *, finish: bool = False) -> None:
        """Poll until `ready`.

        Args:
            finish: wait even if a stop is requested.

        Raises:
            StopRequestedError: a stop is requested, without `finish`.
            LostWhileStoppingError: a stop is requested, and a role has no worker left.
            FleetError: nothing happened for too long.
        """
        progress, limit = clock.monotonic(), self._plan.timeout_s
        while not ready():
            if not finish:
                self.stop_if_requested()
            elif self._should_stop() and (role := self._empty_pool()):
                raise LostWhileStoppingError(f"no {role} is left")
            if self._poll():
                progress = clock.monotonic()
            elif self._listening.silence(progress) > limit:
                raise FleetError(
                    f"nothing happened for {limit:g} s ({self._describe_workers()}): is the "
                    "cluster short of CPUs or GPUs? (--timeout-s sets the bound)"
                )
