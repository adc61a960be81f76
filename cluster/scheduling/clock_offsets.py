"""How far the clocks of workers' hosts differ from this process's, by when their answers came.

A call runs between its request and its answer, so its span bounds the difference of the two clocks
from both sides; all calls of a worker bound it closely. Spans are moved to this process's clock by
it. Nothing else depends on the clock of another host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster import clock
from cluster.spans import Span

DRIFT = 2e-4
"""Seconds a second by which two clocks may diverge meanwhile: far above that of quartz."""


@dataclass(frozen=True)
class Bounds:
    """What is known of a clock that is ahead of this process's by an unknown number of seconds."""

    low: float = -math.inf
    high: float = math.inf
    at: float = 0.0
    """When, by this process's clock."""

    def narrowed(self, low: float, high: float, at: float) -> Bounds:
        """With another call; of that call alone, if they exclude each other: the clock was set, or
        the worker was replaced by one on another host."""
        drift = DRIFT * max(at - self.at, 0.0) if math.isfinite(self.low) else 0.0
        both = Bounds(max(self.low - drift, low), min(self.high + drift, high), at)
        return both if both.low <= both.high else Bounds(low, high, at)

    @property
    def offset(self) -> float:
        """Seconds that the clock is ahead; 0 as long as it may be equal."""
        return 0.0 if self.low <= 0 <= self.high else (self.low + self.high) / 2


class ClockOffsets:
    """The clock of each worker, by name."""

    def __init__(self) -> None:
        self._bounds: dict[str, Bounds] = {}

    def aligned(self, answer: Any, sent: float, received: float) -> Any:
        """The answer of a call with its spans by this process's clock.

        Args:
            answer: a span, something with `spans`, or a list or dictionary of these. The span of a
                worker that ends last is that of the call; others may be of its work before.
            sent, received: seconds since the epoch by this process's clock.
        """
        last = {span.worker: span for span in sorted(spans_of(answer), key=lambda span: span.end)}
        for worker, span in last.items():
            low, high = span.end - received, span.start - sent
            if low <= high:  # else it is not of this call: a repeated answer
                known = self._bounds.get(worker, Bounds())
                self._bounds[worker] = known.narrowed(low, high, received)
        offsets = {worker: self._bounds.get(worker, Bounds()).offset for worker in last}
        return _moved(answer, offsets) if any(offsets.values()) else answer


class OnThisClock:
    """A role whose answers have spans by this process's clock."""

    def __init__(self, role: Any, offsets: ClockOffsets) -> None:
        self._role, self._offsets = role, offsets

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent = clock.epoch()
            answer = getattr(self._role, method)(*args, **kwargs)
            return self._offsets.aligned(answer, sent, clock.epoch())

        return call


def spans_of(answer: Any) -> tuple[Span, ...]:
    """All spans in an answer."""
    if isinstance(answer, Span):
        return (answer,)
    if isinstance(answer, list | dict):
        parts = answer.values() if isinstance(answer, dict) else answer
        return tuple(span for part in parts for span in spans_of(part))
    return tuple(getattr(answer, "spans", ()))


def _moved(answer: Any, offsets: Mapping[str, float]) -> Any:
    if isinstance(answer, Span):
        offset = offsets[answer.worker]
        return answer._replace(start=answer.start - offset, end=answer.end - offset)
    if isinstance(answer, list):
        return [_moved(part, offsets) for part in answer]
    if isinstance(answer, dict):
        return {name: _moved(part, offsets) for name, part in answer.items()}
    spans: Sequence[Span] = answer.spans
    return replace(answer, spans=tuple(_moved(span, offsets) for span in spans))
