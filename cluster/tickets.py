"""Groups on their way from request to scores, and what a caller waits for. No Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.messages import GroupScores, RolloutGroup, SampleRequest, ScoredGroup, merge_scores
from cluster.pool import Worker, WorkerPool


@dataclass(eq=False)
class GroupOnTheWay:
    """One request, and what there is of its answer."""

    answers: Answers
    position: int
    """Its place among the requests of the call."""
    request: SampleRequest
    judges: tuple[str, ...]
    """Pools that score it, in the order of the merge; none for galleries, which want images."""
    edition: int = 0
    """Weights that it is drawn with: those that were published last when it was asked for."""
    rollouts: RolloutGroup | None = None
    images: Any = None
    """Reference to the images; they stay in the object store."""
    parts: dict[str, GroupScores] = field(default_factory=dict)
    """Pool -> what it said."""

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
class Answers:
    """Results of one call, in the order of its requests."""

    results: list[Any]
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.missing = len(self.results)

    def put(self, position: int, result: Any) -> None:
        self.results[position] = result
        self.missing -= 1


@dataclass(frozen=True)
class Call:
    """A worker's answer that is being waited for."""

    group: GroupOnTheWay
    pool: WorkerPool
    worker: Worker
    waited_s: float
