"""Links between hosts, shared by what travels on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from cluster.simulation.engine import Engine, Event


class Flow:
    """Bytes that travel from one host to another."""

    __slots__ = ("done", "end", "left", "rate", "receiver", "seen", "sender")

    def __init__(
        self, sender: int, receiver: int, left: float, now: float, done: Callable[[], None]
    ) -> None:
        self.sender, self.receiver, self.left, self.seen = sender, receiver, left, now
        self.rate, self.done = 0.0, done
        self.end: Event | None = None


class Links:
    """One link of each host to a switch that is never the bottleneck, in both directions. Flows
    share a direction of a link equally; the slower end sets a flow's rate.

    Args:
        bytes_per_s: of each direction.
        latency_s: before the first byte.
    """

    def __init__(self, engine: Engine, hosts: int, bytes_per_s: float, latency_s: float) -> None:
        self._engine, self._speed, self._latency_s = engine, bytes_per_s, latency_s
        self._out: list[dict[Flow, None]] = [{} for _ in range(hosts)]
        self._in: list[dict[Flow, None]] = [{} for _ in range(hosts)]
        self.sent = [0.0] * hosts
        """Bytes that each host sent to others."""
        self.received = [0.0] * hosts

    @property
    def latency_s(self) -> float:
        return self._latency_s

    def load(self, host: int) -> int:
        """Flows that a host sends now."""
        return len(self._out[host])

    def send(
        self, sender: int, receiver: int, size: float, done: Callable[[], None]
    ) -> Flow | None:
        """Send bytes; `done` is called when all have arrived. Within a host they are there."""
        if sender == receiver or size <= 0:
            self._engine.after(0.0 if sender == receiver else self._latency_s, done)
            return None
        flow = Flow(sender, receiver, size + self._latency_s * self._speed, self._engine.now, done)
        self.sent[sender] += size
        self.received[receiver] += size
        self._out[sender][flow] = self._in[receiver][flow] = None
        self._share(sender, receiver)
        return flow

    def cut(self, host: int) -> None:
        """Drop all flows of a host."""
        for flow in [*self._out[host], *self._in[host]]:
            self._remove(flow)
            self._share(flow.sender, flow.receiver)

    def _share(self, sender: int, receiver: int) -> None:
        """Set the rates of all flows that share a link with the flows between two hosts."""
        now = self._engine.now
        for flow in {**self._out[sender], **self._in[receiver]}:
            rate = self._speed / max(len(self._out[flow.sender]), len(self._in[flow.receiver]))
            if rate == flow.rate:
                continue
            flow.left -= (now - flow.seen) * flow.rate
            flow.seen, flow.rate = now, rate
            if flow.end is not None:
                flow.end.cancel()
            flow.end = self._engine.after(flow.left / rate, partial(self._arrive, flow))

    def _arrive(self, flow: Flow) -> None:
        self._remove(flow)
        self._share(flow.sender, flow.receiver)
        flow.done()

    def _remove(self, flow: Flow) -> None:
        if flow.end is not None:
            flow.end.cancel()
        self._out[flow.sender].pop(flow, None)
        self._in[flow.receiver].pop(flow, None)
