"""Groups on their way from request to scores, and what a caller waits for. No Ray."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NewType

from cluster.errors import FleetError, LostWhileStoppingError, StopRequestedError
from cluster.messages import GroupScores, RolloutGroup, SampleRequest, ScoredGroup, merge_scores
from cluster.roles import FleetPlan
from cluster.scheduling.listening import Listening
from cluster.spans import Span

Ticket = NewType("Ticket", int)
STOPPED = "stopped while sampling"


@dataclass(eq=False)
class PendingGroup:
    """One request, and what there is of its answer."""

    answers: PendingBatch
    position: int
    """Its place among the requests of the call."""
    request: SampleRequest
    judges: tuple[str, ...]
    """Pools that score it, in the order of the merge; none for galleries, which want images."""
    weight_version: int = 0
    """Weights that it is drawn with: those that were published last when it was asked for."""
    rollouts: RolloutGroup | None = None
    images: Any = None
    """Reference to the images; they stay in the object store."""
    losses: list[str] = field(default_factory=list)
    """Workers that were lost with it in hand, and how."""
    attempt: int = 0
    """How often it was asked for anew; what comes of an earlier attempt is not wanted any more."""
    parts: dict[str, GroupScores] = field(default_factory=dict)
    """Pool -> what it said."""

    def count_loss(self, most: int, who: str, why: str) -> None:
        """A worker was lost with it in hand.

        Raises:
            FleetError: more than `most` + 1 were.
        """
        self.losses.append(f"{who} {why}")
        if len(self.losses) > most + 1:
            stream, iteration, group = self.request.key
            raise FleetError(
                f"{len(self.losses)} workers were lost with group {group} of {stream} {iteration} "
                f"in hand ({'; '.join(self.losses)}): look at their logs for the reason, or raise "
                "--max-restarts"
            )

    def draw_again(self) -> None:
        """Begin anew: its rollouts or images are gone."""
        self.attempt += 1
        self.rollouts = self.images = None
        self.parts.clear()

    def put_images(self, span: Span) -> None:
        """The images are there: `images` refers to them."""
        assert self.rollouts is not None
        self.rollouts = self.rollouts.with_span(span)

    def put_scores(self, pool: str, scores: GroupScores) -> None:
        """Take one pool's scores; the last one completes the group."""
        self.parts[pool] = scores
        if len(self.parts) < len(self.judges):
            return
        assert self.rollouts is not None
        merged = merge_scores([self.parts[judge] for judge in self.judges])
        self.images = None  # the object store may drop them
        self.answers.put(self.position, ScoredGroup(rollouts=self.rollouts, scores=merged))


@dataclass
class PendingBatch:
    """Results of one call, in the order of its requests."""

    results: list[Any]
    missing: int = field(init=False)
    abandoned: bool = False
    """Nobody waits for it any more."""

    def __post_init__(self) -> None:
        self.missing = len(self.results)

    def put(self, position: int, result: Any) -> None:
        self.results[position] = result
        self.missing -= 1


class PendingBatches:
    """What was asked for, and the waits for it.

    Args:
        listening: when this process did: a wait is too long only by that time.
        turn: hands out work and takes what happens; False if nothing did.
        who_is_there: for the error of a wait that is too long.
    """

    def __init__(
        self,
        plan: FleetPlan,
        listening: Listening,
        turn: Callable[[], bool],
        should_stop: Callable[[], bool],
        who_is_there: Callable[[], str],
        lacking: Callable[[], str] = lambda: "",
    ) -> None:
        self._plan, self._listening, self._turn = plan, listening, turn
        self._should_stop, self._who_is_there = should_stop, who_is_there
        self._lacking = lacking
        self.answers: dict[Ticket, PendingBatch] = {}
        """Of what somebody waits for."""
        self._issued = 0

    @property
    def missing(self) -> int:
        """Groups on their way."""
        return sum(answers.missing for answers in self.answers.values())

    def issue(self, groups: int) -> tuple[Ticket, PendingBatch]:
        """A ticket for so many groups, and the place for their answers."""
        self._issued += 1
        ticket = Ticket(self._issued)
        answers = self.answers[ticket] = PendingBatch([None] * groups)
        return ticket, answers

    def collect(self, ticket: Ticket, *, finish: bool = False) -> list[Any]:
        """Wait for the answers of a ticket, in order. See `_wait`."""
        answers = self.answers[ticket]
        self._wait(lambda: not answers.missing, finish=finish)
        return self.answers.pop(ticket).results

    def stream(self, submits: Iterable[Callable[[], Ticket]]) -> Iterator[Any]:
        """Answers of single groups, in order, each requested when there is a slot for it. Groups of
        any ticket take slots until they are there, and these until they are given out."""
        left, ahead, slots = iter(submits), deque[Ticket](), self._plan.slots
        asked_all = False

        def there() -> bool:
            """Ask for more where there is room; whether the next answer is there, or none is left
            to come."""
            nonlocal asked_all
            free = min(slots - self.missing, slots - len(ahead))
            while free > 0 and not asked_all:
                submit = next(left, None)
                if submit is None:
                    asked_all = True
                else:
                    ahead.append(submit())
                    free -= 1
            return not self.answers[ahead[0]].missing if ahead else asked_all

        try:
            while True:
                self._wait(there)
                if not ahead:
                    return
                yield self.answers.pop(ahead.popleft()).results[0]
        finally:
            self.abandon(ahead)

    def abandon(self, tickets: Iterable[Ticket]) -> None:
        """Nobody waits for some tickets any more."""
        for ticket in tickets:
            if answers := self.answers.pop(ticket, None):
                answers.abandoned = True

    def stop_if_asked(self) -> None:
        if self._should_stop():
            raise StopRequestedError(STOPPED)

    def _wait(self, there: Callable[[], bool], *, finish: bool = False) -> None:
        """Until what somebody waits for is there.

        Raises:
            StopRequestedError: a stop is asked for, and it is not to `finish` all the same.
            LostWhileStoppingError: it is, but nobody is left who could.
            FleetError: nothing happens for too long.
        """
        progress, limit = time.monotonic(), self._plan.timeout_s
        while not there():
            if not finish:
                self.stop_if_asked()
            elif self._should_stop() and (role := self._lacking()):
                raise LostWhileStoppingError(f"no {role} is left")
            if self._turn():
                progress = time.monotonic()
            elif self._listening.silence(progress) > limit:
                raise FleetError(
                    f"nothing happened for {limit:g} s ({self._who_is_there()}): is the cluster "
                    "short of CPUs or GPUs? (--timeout-s sets the bound)"
                )
