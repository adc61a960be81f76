"""Links between hosts, shared by what travels on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from cluster.simulation.engine import Engine
from cluster.simulation.processors import Job, Processor


class Flow:
    """Bytes that travel from one host to another."""

    __slots__ = ("done", "ends", "receiver", "sender")

    def __init__(self, sender: int, receiver: int, done: Callable[[], None]) -> None:
        self.sender, self.receiver, self.done = sender, receiver, done
        self.ends: list[tuple[Processor, Job]] = []
        """Directions of links that it still occupies."""


class Links:
    """One link of each host to a switch that is never the bottleneck, in both directions. Flows
    share a direction of a link equally; one has arrived when both of its ends are through. That is
    exact where one end is the bottleneck, and costs an event an end.

    Args:
        bytes_per_s: of each direction.
        latency_s: before the first byte.
    """

    def __init__(self, engine: Engine, hosts: int, bytes_per_s: float, latency_s: float) -> None:
        self._engine, self._speed, self.latency_s = engine, bytes_per_s, latency_s
        self._out = [Processor(engine, 1.0) for _ in range(hosts)]
        self._in = [Processor(engine, 1.0) for _ in range(hosts)]
        self._flows: list[dict[Flow, None]] = [{} for _ in range(hosts)]
        self._sending = [0] * hosts
        self.sent = [0.0] * hosts
        """Bytes that each host sent to others."""
        self.received = [0.0] * hosts

    def load(self, host: int) -> int:
        """Flows that a host sends now."""
        return self._sending[host]

    def send(self, sender: int, receiver: int, size: float, done: Callable[[], None]) -> None:
        """Send bytes; `done` is called when all have arrived. Within a host they are there."""
        if sender == receiver or size <= 0:
            self._engine.after(0.0 if sender == receiver else self.latency_s, done)
            return
        self.sent[sender] += size
        self.received[receiver] += size
        flow = Flow(sender, receiver, done)
        self._flows[sender][flow] = self._flows[receiver][flow] = None
        self._sending[sender] += 1
        self._engine.after(self.latency_s, lambda: self._begin(flow, size / self._speed))

    def cut(self, host: int) -> None:
        """Drop all flows of a host."""
        for flow in [*self._flows[host]]:
            for end, job in flow.ends:
                end.cancel(job)
            self._remove(flow)

    def _begin(self, flow: Flow, seconds: float) -> None:
        if flow not in self._flows[flow.sender]:
            return  # cut off before its first byte
        for end in (self._out[flow.sender], self._in[flow.receiver]):
            flow.ends.append((end, end.start(seconds, 1.0, partial(self._through, flow, end))))

    def _through(self, flow: Flow, end: Processor) -> None:
        flow.ends = [each for each in flow.ends if each[0] is not end]
        if not flow.ends:
            self._remove(flow)
            flow.done()

    def _remove(self, flow: Flow) -> None:
        del self._flows[flow.sender][flow], self._flows[flow.receiver][flow]
        self._sending[flow.sender] -= 1
