"""Several learner actors behind the interface of one: every call goes to all at the same time.

They compute together (`torch.distributed` inside the role): a call to only some would block. The
first failure ends the wait.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import ray

from cluster import clock
from cluster.errors import FleetError, LearnerLostError
from cluster.ray_session.calls import put
from cluster.ray_session.private import call_inside
from cluster.scheduling.listening import LOOK_S, Listening

Answer = Callable[[Any, str, float], Any]
"""(reference, description, longest wait) -> value; `cluster.ray_session.calls.answer`."""
Attend = Callable[[Sequence[Any], float], Sequence[Any]]
"""(references, longest wait) -> one of them that is ready, if any."""


class LearnerGroup:
    """A `LearnerRole` made of several actors. The first one writes and publishes."""

    def __init__(
        self,
        handles: Sequence[Any],
        names: Sequence[str],
        answer: Answer,
        timeout_s: float,
        attend: Attend,
        listening: Listening,
    ) -> None:
        self._handles, self._names, self._attend = list(handles), list(names), attend
        self._answer, self._timeout_s, self._listening = answer, timeout_s, listening

    def meet(self) -> None:
        """Connect the learners, at an address of the first one's node.

        Raises:
            FleetError: not all joined in time.
            LearnerLostError: one of them was lost.
        """
        first, size = self._handles[0], len(self._handles)
        host = self._ask(call_inside(first, lambda _: ray.util.get_node_ip_address()), 0)
        address = self._ask(first.open_rendezvous.remote(host, size), 0)
        self._together([h.join.remote(rank, size, address) for rank, h in enumerate(self._handles)])

    def snapshot(self) -> Any:
        """The first one's, like the others below; all give it their parts of the weights."""
        return self._all("snapshot")[0]

    def base_snapshot(self) -> Any:
        return self._all("base_snapshot")[0]

    def adapter_snapshot(self) -> Any:
        return self._all("adapter_snapshot")[0]

    def start(self, base_entropy: float) -> None:
        self._all("start", base_entropy)

    def step(self, batch: Any) -> Any:
        """Each learner takes its shard of the batch, which is stored once on each node."""
        reports = self._all("step", put(batch, "the batch for the learners"))
        spans = tuple(span for report in reports for span in report.spans)
        return dataclasses.replace(reports[0], spans=spans)

    def save(self, directory: Any, background: bool = False) -> None:
        self._all("save", directory, background)

    def saved(self, wait_s: float = 0.0) -> bool:
        return all(self._all("saved", wait_s))

    def restore(self, directory: Any) -> int:
        return self._all("restore", directory)[0]

    def sees(self, file: Any, content: bytes) -> bool:
        return all(self._all("sees", file, content))

    def sizes(self) -> dict[str, int]:
        return self._first("sizes")

    def send_part(self, name: str, start: int, size: int) -> bytes:
        return self._first("send_part", name, start, size)

    def receive_part(self, name: str, data: bytes) -> None:
        self._all("receive_part", name, put(data, "a part of a checkpoint"))

    def drop_files(self) -> None:
        self._all("drop_files")

    def _first(self, method: str, *arguments: Any) -> Any:
        return self._together([getattr(self._handles[0], method).remote(*arguments)])[0]

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return self._together([getattr(h, method).remote(*arguments) for h in self._handles])

    def _together(self, refs: Sequence[ray.ObjectRef]) -> list[Any]:
        """The answers, in order; the first failure is raised at once."""
        waiting, values = {ref: rank for rank, ref in enumerate(refs)}, [None] * len(refs)
        started = clock.monotonic()
        while waiting:
            for ref in self._attend(list(waiting), LOOK_S):
                rank = waiting.pop(ref)
                values[rank] = self._ask(ref, rank)
            if waiting and self._listening.silence(started) > self._timeout_s:
                late = ", ".join(self._names[rank] for rank in waiting.values())
                raise FleetError(
                    f"no answer for {self._timeout_s:g} s from {late}: look at their logs, or "
                    "raise --timeout-s if a step may take that long"
                )
        return values

    def _ask(self, ref: ray.ObjectRef, rank: int) -> Any:
        try:
            return self._answer(ref, self._names[rank], self._timeout_s)
        except ray.exceptions.RayActorError as error:
            raise LearnerLostError(
                f"{self._names[rank]} was lost, and the other learners cannot continue without it"
            ) from error
