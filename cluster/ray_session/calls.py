"""Calls of Ray actors with timeouts; errors name the worker that failed."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from cluster import clock
from cluster.errors import FleetError, InputLostError, StuckError, TesseraError
from cluster.program.logs import FILE_ONLY
from cluster.ray_session import backend
from cluster.ray_session.object_store import MemoryFullError, memory_full, store_full
from cluster.scheduling.listening import Listening

logger = logging.getLogger(__name__)

LONGEST_GET_S = 5.0
GONE = (RayActorError, ObjectLostError, OwnerDiedError)
LOST = (RayActorError, MemoryFullError, StuckError)
"""Errors after which a worker will not answer."""


class RemoteRole:
    """Calls the methods of an actor as if it were the object inside.

    Args:
        wait: how to wait for an answer: (reference, name of the call, timeout) -> value; None:
            `answer`, which blocks.
    """

    def __init__(
        self,
        handle: Any,
        name: str,
        timeout_s: float,
        wait: Callable[[Any, str, float], Any] | None = None,
    ) -> None:
        self._handle, self._name, self._timeout_s = handle, name, timeout_s
        self._wait = wait or answer

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                ref = getattr(self._handle, method).remote(*args, **kwargs)
            except (ObjectStoreFullError, OutOfDiskError) as error:
                raise store_full(f"what is sent to {self._name}.{method}", error) from None
            return self._wait(ref, f"{self._name}.{method}", self._timeout_s)

        return call


def put(value: Any, what: str) -> ray.ObjectRef:
    """Put a value into the object store, once for all who will read it.

    Raises:
        StoreFullError: there is no room for it; `what` says what it is.
    """
    try:
        return backend.put(value)
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise store_full(what, error) from None


def why_lost(error: Exception) -> str:
    """Why a worker will not answer, for messages."""
    if isinstance(error, StuckError):
        return f"does not get on: {error}"
    if isinstance(error, MemoryFullError):
        return "ran out of memory"
    return f"was lost ({how_ended(error)})" if isinstance(error, RayActorError) else "was lost"


def how_ended(error: RayActorError) -> str:
    """How a worker's process ended, as far as Ray reports it."""
    text = str(error)
    if found := re.search(r"exit code (-?\d+)", text):
        return f"its process ended with exit status {found[1]}"
    if "connection error code" in text:
        return (
            "its process ended without a word: a crash as by SIGSEGV, os._exit, a kill, or too "
            "little memory"
        )
    if "node has died" in text or "node was" in text:
        return f"its machine{f' {place}' if (place := place_of(error)) else ''} is gone"
    return " ".join(text.split("\n")[0].split())


def place_of(error: Exception) -> str:
    """The address of the host where a worker ran, by Ray's message; empty: this one, or unknown."""
    found = ADDRESS.search(str(error))
    place = found[1] or found[2] if found else ""
    return "" if place == ray.util.get_node_ip_address() else place


ADDRESS = re.compile(r"\(pid=\d+, ip=([^\s,)]+)|^\s*ip: (\S+)$", re.MULTILINE)


def _located(error: TesseraError, place: str) -> TesseraError:
    """A worker's own error, which says where it ran if that is another host."""
    if place and error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]} (on {place})", *error.args[1:])
    return error


def last_words(text: str) -> str:
    """The error at the end of a worker's traceback: for a TesseraError its message, for others
    type, message and place."""
    lines = text.splitlines()
    frames = [place for place, line in enumerate(lines) if FRAME.match(line)]
    start = frames[-1] + 1 if frames else 0
    while start < len(lines) - 1 and lines[start].startswith("    "):  # code, and marks below it
        start += 1
    words = "\n".join(lines[start:]).strip()
    kind, _, message = words.partition(": ")
    module, _, name = kind.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if isinstance(found, type) and issubclass(found, TesseraError):
        return message
    place = FRAME.match(lines[frames[-1]]) if frames else None
    return f"{words} ({Path(place['file']).name}, line {place['line']})" if place else words


FRAME = re.compile(r'  File "(?P<file>[^"]+)", line (?P<line>\d+), in ')


def _failed(what: str, error: RayError) -> FleetError:
    """The last error of a traceback."""
    logger.error(f"{what}:\n{error}", extra=FILE_ONLY)
    place = place_of(error)
    return FleetError(f"{what}{f' on {place}' if place else ''}: {last_words(str(error))}")


def too_late(what: str, timeout_s: float) -> FleetError:
    return FleetError(
        f"{what} did not answer within {timeout_s:g} s: is the cluster short of CPUs or GPUs, "
        "or the worker stuck? (--timeout-s sets the bound)"
    )


def _within(ref: ray.ObjectRef, timeout_s: float) -> Any:
    """`ray.get` with a timeout that does not count time in which this process was stopped (SIGSTOP,
    a debugger).

    Raises:
        GetTimeoutError: no answer in time.
    """
    slice_s = min(LONGEST_GET_S, timeout_s / 4)
    listening, began = Listening(2 * slice_s), clock.monotonic()
    while True:
        try:
            return backend.get(ref, slice_s)
        except GetTimeoutError:
            listening.look()
            if listening.silence(began) >= timeout_s:
                raise


def answer(ref: ray.ObjectRef, what: str, timeout_s: float) -> Any:
    """The value of a reference, with a timeout and errors that name the worker.

    Raises:
        RayActorError: the worker is gone (the caller may replace it).
        InputLostError: an argument, or the answer itself, was lost with another worker or machine.
        TesseraError: what the worker itself raised.
        StoreFullError, MemoryFullError: no room for the answer, or for the worker.
        FleetError: no answer in time, or an error of the worker's that is no `TesseraError`.
    """
    try:
        return _within(ref, timeout_s)
    except GetTimeoutError:
        raise too_late(what, timeout_s) from None
    except (ObjectStoreFullError, OutOfDiskError) as error:  # also as a RayTaskError's cause
        raise store_full(what, error) from None
    except OutOfMemoryError as error:
        raise memory_full(what, error) from None
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, TesseraError):
            raise _located(cause, place_of(error)) from None
        if isinstance(cause, GONE):
            raise InputLostError(f"{what}: an argument was lost ({cause})") from None
        raise _failed(f"{what} failed", error) from error
    except RayActorError as error:
        if getattr(error, "actor_init_failed", False):
            raise _failed(f"{what} could not start", error) from error
        raise
    except RuntimeEnvSetupError as error:
        failure = f"{what} could not start, since its runtime_env cannot be made"
        logger.error(f"{failure}:\n{error}", extra=FILE_ONLY)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        faults = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        raise FleetError(f"{failure}: {' '.join(faults)}") from error
    except (ObjectLostError, OwnerDiedError) as error:
        raise InputLostError(f"{what}: the answer was lost ({error})") from None
    except RayError as error:
        raise FleetError(f"{what}: {type(error).__name__}: {error}") from error


def ready_of(refs: Sequence[ray.ObjectRef], timeout_s: float) -> list[ray.ObjectRef]:
    """Wait for the first of some references; returns all that are ready, or none."""
    if not refs:
        clock.sleep(timeout_s)
        return []
    if not backend.ready(refs, 1, timeout_s=timeout_s)[0]:
        return []
    return backend.ready(refs)[0]
