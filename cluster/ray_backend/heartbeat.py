"""Detects workers that are gone or unresponsive, by heartbeats beside their work.

Ray notices a process that ended, but not one that hangs (stopped, swapping, stuck in a driver). A
separate thread of the worker answers, so that a long decode is no silence.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ray.exceptions import RayActorError

from cluster import clock
from cluster.ray_session import backend
from cluster.ray_session.calls import why_lost
from cluster.ray_session.private import call_inside
from cluster.scheduling.listening import Listening
from cluster.scheduling.pool import Worker

GROUP = "heartbeat"
BEATS = 6  # heartbeats within the longest silence
LONGEST_PAUSE_S = 5.0


def _alive(role: Any) -> bool:
    return True


class Heartbeat:
    """Sends heartbeat calls to workers.

    Args:
        silence_s: longest silence; 0 turns heartbeats off.
        listening: silence counts only while this process listened.
    """

    def __init__(self, silence_s: float, listening: Listening) -> None:
        self._silence_s, self._listening = silence_s, listening
        self._pause_s = min(silence_s / BEATS, LONGEST_PAUSE_S)
        self._asked: dict[Worker, tuple[Any, float]] = {}
        self._last_response: dict[Worker, float] = {}
        self._looked = 0.0

    def unresponsive(self, workers: Iterable[Worker]) -> list[tuple[Worker, str]]:
        """Those of some started workers that are gone or silent for too long, each with the reason;
        sends the next heartbeats."""
        now = clock.monotonic()
        if not self._silence_s or now - self._looked < self._pause_s / 2:
            return []
        self._looked = now
        known = dict.fromkeys(workers)
        self._asked = {worker: asked for worker, asked in self._asked.items() if worker in known}
        self._last_response = {
            worker: heard for worker, heard in self._last_response.items() if worker in known
        }
        gone = self._listen(now)
        for worker in known:  # in order, so that a simulation repeats
            last = self._last_response.get(worker, -self._pause_s)
            if worker not in self._asked and now - last >= self._pause_s:
                self._asked[worker] = (call_inside(worker.handle, _alive, group=GROUP), now)
        silence = self._listening.silence
        silent = [w for w, (_, since) in self._asked.items() if silence(since) > self._silence_s]
        why = f"did not answer heartbeats for {self._silence_s:g} s"
        return [*gone, *((worker, why) for worker in silent)]

    def _listen(self, now: float) -> list[tuple[Worker, str]]:
        """Take the ready answers; returns workers whose process ended, and how."""
        refs = {asked: worker for worker, (asked, _) in self._asked.items()}
        ready, _ = backend.ready(list(refs))
        gone = []
        for ref in ready:
            worker = refs[ref]
            del self._asked[worker]
            self._last_response[worker] = now
            try:
                backend.get(ref)
            except RayActorError as error:
                gone.append((worker, why_lost(error)))
        return gone
