"""Groups on their way from request to scores, and what a caller waits for. No Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.errors import FleetError
from cluster.messages import (
    GroupScores,
    RolloutGroup,
    SampleRequest,
    ScoredGroup,
    Span,
    merge_scores,
)


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
    losses: list[str] = field(default_factory=list)
    """Workers that were lost with it in hand, and how."""
    drawing: int = 0
    """How often it was asked for anew; what comes of an earlier drawing is not wanted any more."""
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
        self.drawing += 1
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
class Answers:
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
