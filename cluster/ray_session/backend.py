"""What a fleet asks of Ray: actors, references and their values. A simulation replaces it, and the
fleet's own code runs unchanged.

Handles of actors and references are the backend's own. Both backends raise Ray's exceptions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import ray

from cluster.placement.nodes import Node
from cluster.ray_session.private import actor_id, living_actors


class Backend(Protocol):
    """The calls of Ray that a fleet makes, with Ray's meaning."""

    def actor_class(self, factory: Callable[..., Any], options: dict[str, Any]) -> Any:
        """`ray.remote`: its result has `options(...).remote(...)`, which starts an actor."""
        ...

    def get(self, ref: Any, timeout_s: float | None = None) -> Any:
        """The value of a reference; raises what its call raised, or GetTimeoutError."""
        ...

    def wait(
        self, refs: list[Any], count: int, timeout_s: float | None, fetch_local: bool
    ) -> tuple[list[Any], list[Any]]:
        """Up to `count` references that are ready, and the others."""
        ...

    def put(self, value: Any) -> Any:
        """A reference to a value, which is stored once."""
        ...

    def kill(self, handle: Any) -> None:
        """End an actor's process."""
        ...

    def nodes_of(self, handles: Sequence[Any]) -> list[str]:
        """The node of each actor, any name of it; empty: it is not known."""
        ...


class Nodes(Protocol):
    """What a fleet asks of the cluster that it starts on: `RaySession`."""

    joined: bool
    """Whether others started it."""

    @property
    def nodes(self) -> list[Node]: ...

    @property
    def free_cpus(self) -> float: ...


class RayBackend:
    """Ray itself."""

    def actor_class(self, factory: Callable[..., Any], options: dict[str, Any]) -> Any:
        return ray.remote(**options)(factory)

    def get(self, ref: Any, timeout_s: float | None = None) -> Any:
        return ray.get(ref, timeout=timeout_s)

    def wait(
        self, refs: list[Any], count: int, timeout_s: float | None, fetch_local: bool
    ) -> tuple[list[Any], list[Any]]:
        return ray.wait(refs, num_returns=count, timeout=timeout_s, fetch_local=fetch_local)

    def put(self, value: Any) -> Any:
        return ray.put(value)

    def kill(self, handle: Any) -> None:
        ray.kill(handle)

    def nodes_of(self, handles: Sequence[Any]) -> list[str]:
        found = living_actors()
        ids = (actor_id(handle) for handle in handles)
        return [str(found[each]["node"]) if each in found else "" for each in ids]


_backend: Backend = RayBackend()


def actor_class(factory: Callable[..., Any], options: dict[str, Any]) -> Any:
    """An actor class of a role.

    Args:
        options: of `ray.remote`.
    """
    return _backend.actor_class(factory, options)


def get(ref: Any, timeout_s: float | None = None) -> Any:
    """The value of a reference.

    Raises:
        GetTimeoutError: it is not there in time.
        RayError: its call failed, or its worker is gone.
    """
    return _backend.get(ref, timeout_s)


def ready(
    refs: Sequence[Any],
    count: int | None = None,
    *,
    timeout_s: float | None = 0.0,
    fetch_local: bool = True,
) -> tuple[list[Any], list[Any]]:
    """The references that are ready, and the others.

    Args:
        count: the wait ends with so many, and no more are returned; None: all of them.
        timeout_s: longest wait; 0 does not wait.
        fetch_local: bring the values to this node.
    """
    refs = list(refs)
    if not refs:
        return [], []
    return _backend.wait(refs, len(refs) if count is None else count, timeout_s, fetch_local)


def put(value: Any) -> Any:
    """A reference to a value in the object store, once for all who will read it."""
    return _backend.put(value)


def kill(handle: Any) -> None:
    """End an actor's process."""
    _backend.kill(handle)


def nodes_of(handles: Sequence[Any]) -> list[str]:
    """The node of each actor, any name of it; empty: it is not known."""
    return _backend.nodes_of(handles)


@contextmanager
def using(backend: Backend) -> Iterator[None]:
    """Have the fleets of this process talk to another backend until the end of the block."""
    global _backend
    before, _backend = _backend, backend
    try:
        yield
    finally:
        _backend = before
