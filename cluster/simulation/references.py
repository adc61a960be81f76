"""References to values, and where in the cluster they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from ray.exceptions import ObjectLostError

from cluster.simulation.links import Links

DRIVER = 0
"""Number of the driver's host."""
INLINE = 100 * 1024
"""Bytes up to which Ray sends an answer with its message, past the object store."""


class Reference:
    """Stands for a value that is there or will be."""

    __slots__ = (
        "__weakref__",
        "_store",
        "error",
        "hosts",
        "number",
        "pulls",
        "size",
        "value",
        "watchers",
    )

    def __init__(self, store: ObjectStore) -> None:
        self._store, self.number = store, store.next_number()
        self.value: Any = None
        self.error: Exception | None = None
        self.size = 0.0
        self.hosts: set[int] | None = None
        """Hosts that have it; None: not there yet."""
        self.watchers: list[Callable[[], None]] = []
        self.pulls: dict[int, _Pull] = {}

    def __del__(self) -> None:
        self._store.free(self)


class _Pull:
    """A copy on its way to a host."""

    def __init__(self, source: int) -> None:
        self.source = source
        self.done: list[Callable[[], None]] = []


class ObjectStore:
    """The values of all hosts. A value is copied once to each host that asks for it.

    Args:
        notify: called with a reference whose value came, came to a host, or was lost.
    """

    def __init__(self, links: Links, hosts: int, notify: Callable[[Reference], None]) -> None:
        self._links, self._notify, self._numbers = links, notify, 0
        self._at: list[WeakSet[Reference]] = [WeakSet() for _ in range(hosts)]
        self.held = [0.0] * hosts
        """Bytes on each host, ..."""
        self.peak = [0.0] * hosts
        """... and the most so far."""

    def next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def put(self, ref: Reference, value: Any, size: float, host: int) -> None:
        """Set the value of a reference, at a host."""
        if ref.hosts is None:
            ref.value, ref.size, ref.hosts = value, size, set()
            self._place(ref, host)
            self._there(ref)

    def answer(self, ref: Reference, value: Any, size: float, host: int) -> None:
        """Set the value that a worker answers with: a small one travels with the message."""
        if size > INLINE:
            self.put(ref, value, size, host)
        else:
            self._links.send(host, DRIVER, 0.0, lambda: self.put(ref, value, size, host))

    def send(self, host: int, size: float, done: Callable[[], None]) -> None:
        """Send a value with a call of the driver's."""
        if size:
            self._links.send(DRIVER, host, size, done)
        else:
            done()

    def fail(self, ref: Reference, error: Exception) -> None:
        """Set the error in place of a value."""
        if ref.hosts is None:
            ref.error, ref.hosts = error, set()
            self._there(ref)

    def is_at(self, ref: Reference, host: int) -> bool:
        """Whether a host can read it now, or its error."""
        if ref.hosts is None:
            return False
        return ref.error is not None or ref.size <= INLINE or host in ref.hosts

    def pull(self, ref: Reference, host: int, done: Callable[[], None]) -> None:
        """Copy a value that is there to a host; `done` is called then, or when it is lost."""
        if self.is_at(ref, host):
            done()
            return
        pull = ref.pulls.get(host)
        if pull is None:
            assert ref.hosts
            source = min(ref.hosts, key=lambda each: (self._links.load(each), each))
            pull = ref.pulls[host] = _Pull(source)
            self._links.send(source, host, ref.size, lambda: self._arrived(ref, host))
        pull.done.append(done)

    def lose(self, host: int) -> None:
        """Lose what is at a host, and what is on its way to or from there."""
        self._links.cut(host)
        for ref in sorted({ref for held in self._at for ref in held}, key=lambda ref: ref.number):
            self._lose(ref, host)
        self._at[host] = WeakSet()
        self.held[host] = 0.0

    def _lose(self, ref: Reference, host: int) -> None:
        assert ref.hosts is not None
        ref.hosts.discard(host)
        ref.pulls.pop(host, None)
        broken = {
            target: ref.pulls.pop(target)
            for target, pull in list(ref.pulls.items())
            if pull.source == host
        }
        if not ref.hosts and ref.error is None:
            ref.error = ObjectLostError(f"{ref.number:x}", None, "")
            self._notify(ref)
        for target, pull in broken.items():
            for done in pull.done:
                self.pull(ref, target, done)

    def free(self, ref: Reference) -> None:
        """No one refers to it any more."""
        for host in ref.hosts or ():
            if ref.size > INLINE:
                self.held[host] -= ref.size

    def _there(self, ref: Reference) -> None:
        watchers, ref.watchers = ref.watchers, []
        self._notify(ref)
        for watcher in watchers:
            watcher()

    def _arrived(self, ref: Reference, host: int) -> None:
        pull = ref.pulls.pop(host)
        self._place(ref, host)
        self._notify(ref)
        for done in pull.done:
            done()

    def _place(self, ref: Reference, host: int) -> None:
        assert ref.hosts is not None
        if host not in ref.hosts:
            ref.hosts.add(host)
            if ref.size > INLINE:
                self._at[host].add(ref)
                self.held[host] += ref.size
                self.peak[host] = max(self.peak[host], self.held[host])
