"""Simulated processes of workers: calls wait for their arguments, then for a thread, then work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, Protocol

from ray.exceptions import RayActorError, RayTaskError

from cluster.errors import TesseraError
from cluster.roles import Role
from cluster.simulation.engine import Engine
from cluster.simulation.machines import Machine, Seat
from cluster.simulation.processors import Job, Processor
from cluster.simulation.references import ObjectStore, Reference

READY, INSIDE = "__ray_ready__", "__ray_call__"  # Ray's calls of any actor


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a call takes, and its answer."""

    answer: Callable[[float, float], Sequence[tuple[Any, float]]]
    """(begin, end), seconds since the epoch -> value and bytes of each reference it returns."""
    seconds: float = 0.0
    """Alone on its processor."""
    demand: float = 1.0
    """Cores that it uses; 1 of a GPU."""


def instant(value: Any = None, size: float = 0.0) -> Work:
    """A call that takes no time."""
    return Work(answer=lambda begin, end: [(value, size)])


class Behaviour(Protocol):
    """What a simulated worker does."""

    role: Role

    def thread(self, method: str, group: str) -> str:
        """Name of the thread that runs a call; calls of one thread run one after another."""
        ...

    def work(self, method: str, arguments: Sequence[Any], named: Mapping[str, Any]) -> Work:
        """What a call takes. Called when it begins.

        Raises:
            TesseraError: as the real role does.
        """
        ...


class State(Enum):
    WAITING = "for room on a host"
    STARTING = "its process starts"
    ALIVE = "it answers"
    HANGING = "it does not answer any more"
    ENDED = "its process is gone"


@dataclass(eq=False)
class Call:
    """A call of an actor."""

    method: str
    """Or the name of the function, of a call `inside`, that runs in the worker's process."""
    inside: bool
    group: str
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    refs: tuple[Reference, ...]
    """What it returns."""
    size: float
    """Bytes that are sent with it."""
    missing: int = 0
    """Arguments that are being copied."""
    job: Job | None = None

    @property
    def needed(self) -> list[Reference]:
        return [each for each in self.arguments if isinstance(each, Reference)]


@dataclass
class _Thread:
    queue: deque[Call] = field(default_factory=deque)
    call: Call | None = None
    """The one that runs."""


class Actor:
    """A worker's process.

    Args:
        slowness: times that work takes longer, now.
    """

    def __init__(
        self, name: str, behaviour: Behaviour, engine: Engine, store: ObjectStore, seat: Seat
    ) -> None:
        self.name, self.seat, self.state = name, seat, State.WAITING
        self.slowness = 1.0
        self._behaviour, self._engine, self._store = behaviour, engine, store
        self._inbox: deque[Call] = deque()  # in order; the first may wait for its arguments
        self._arriving: deque[Call] = deque()  # its arguments are copied to the host
        self._threads: dict[str, _Thread] = {}
        self._open: dict[Call, None] = {}
        self._working, self._since = 0, 0.0
        self._busy_s = 0.0
        self._began: float | None = None
        self._ended: float | None = None

    @property
    def role(self) -> str:
        return self._behaviour.role.name

    @property
    def served_s(self) -> float:
        """Seconds in which it could work."""
        if self._began is None:
            return 0.0
        return (self._engine.now if self._ended is None else self._ended) - self._began

    @property
    def busy_s(self) -> float:
        """Seconds in which it worked."""
        return self._busy_s + (self._engine.now - self._since if self._working else 0.0)

    def begin(self) -> None:
        """Its process has started: answer calls."""
        if self.state is State.STARTING:
            self.state, self._began = State.ALIVE, self._engine.now
            self._deliver()

    def call(self, call: Call) -> None:
        """Take a call."""
        if self.state is State.ENDED:
            self._refuse(call)
            return
        self._open[call] = None
        self._inbox.append(call)
        self._deliver()

    def hang(self) -> None:
        """Answer nothing from now on."""
        if self.state is not State.ENDED:
            self.state = State.HANGING
            self._stop()

    def end(self, noticed_s: float) -> None:
        """End the process. Who waits for its answers notices it later."""
        if self.state is State.ENDED:
            return
        self.state = State.ENDED
        self._stop()
        lost, self._open = [*self._open], {}
        for call in lost:
            self._engine.after(noticed_s, partial(self._refuse, call))

    def _stop(self) -> None:
        self._ended = self._engine.now if self._ended is None else self._ended
        self._note_work(-self._working)
        for thread in self._threads.values():
            if thread.call is not None and thread.call.job is not None:
                self._processor.cancel(thread.call.job)
        self._threads.clear()
        self._inbox.clear()
        self._arriving.clear()

    def _refuse(self, call: Call) -> None:
        error = RayActorError(error_msg="The actor died: connection error code 2. End of file")
        for ref in call.refs:
            self._store.fail(ref, error)

    @property
    def _machine(self) -> Machine:
        assert self.seat.machine is not None
        return self.seat.machine

    @property
    def _processor(self) -> Processor:
        return self._machine.processor(self.seat)

    def _deliver(self) -> None:
        """Send calls, in order, each when its arguments are there."""
        while self._inbox and self.state is State.ALIVE:
            call = self._inbox[0]
            late = next((ref for ref in call.needed if ref.hosts is None), None)
            if late is not None:
                late.watchers.append(self._deliver)
                return
            self._inbox.popleft()
            self._fetch(call)

    def _fetch(self, call: Call) -> None:
        """Copy the arguments of a call to the host."""
        host, here = self._machine.number, [*call.needed]
        call.missing = len(here) + 1
        self._arriving.append(call)

        def arrived() -> None:
            call.missing -= 1
            if not call.missing:
                self._admit()

        for ref in here:
            self._store.pull(ref, host, arrived)
        self._store.send(host, call.size, arrived)

    def _admit(self) -> None:
        """Hand calls whose arguments are here to their threads, in order."""
        while self._arriving and not self._arriving[0].missing and self.state is State.ALIVE:
            call = self._arriving.popleft()
            thread = self._threads.setdefault(
                self._behaviour.thread(call.method, call.group), _Thread()
            )
            thread.queue.append(call)
            if thread.call is None:
                self._next(thread)

    def _next(self, thread: _Thread) -> None:
        while thread.queue and thread.call is None:
            call = thread.queue.popleft()
            work = self._work_of(call)
            if work is None:
                continue
            if not work.seconds:
                self._answer(call, work, self._engine.epoch())
                continue
            self._begin(thread, call, work)

    def _begin(self, thread: _Thread, call: Call, work: Work) -> None:
        began = self._engine.epoch()
        self._note_work(+1)

        def done() -> None:
            thread.call = None
            self._note_work(-1)
            self._answer(call, work, began)
            self._next(thread)

        thread.call = call
        call.job = self._processor.start(work.seconds * self.slowness, work.demand, done)

    def _work_of(self, call: Call) -> Work | None:
        """What a call takes; None if it failed."""
        lost = next((ref.error for ref in call.needed if ref.error is not None), None)
        if lost is None:
            values = [
                each.value if isinstance(each, Reference) else each for each in call.arguments
            ]
            try:
                if call.method == READY:
                    return instant(True)
                if call.inside:
                    function, *values = values
                    if not hasattr(self._behaviour, call.method):
                        return instant(function(self._behaviour, *values))
                return self._behaviour.work(call.method, values, call.named)
            except TesseraError as error:
                lost = error
        self._open.pop(call, None)
        for ref in call.refs:
            self._store.fail(ref, RayTaskError(call.method, f"{type(lost).__name__}: {lost}", lost))
        return None

    def _answer(self, call: Call, work: Work, began: float) -> None:
        self._open.pop(call, None)
        answers = work.answer(began, self._engine.epoch())
        for ref, (value, size) in zip(call.refs, answers, strict=True):
            self._store.answer(ref, value, size, self._machine.number)

    def _note_work(self, change: int) -> None:
        if self._working:
            self._busy_s += self._engine.now - self._since
        self._working, self._since = self._working + change, self._engine.now
