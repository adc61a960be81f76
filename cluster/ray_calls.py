"""Calls of Ray actors: every wait is bounded, and every error says who failed."""

from __future__ import annotations

from collections.abc import Callable
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
)

from cluster.errors import FleetError, InputLostError, StuckError, TesseraError
from cluster.object_store import MemoryFullError, memory_full, store_full

GONE = (RayActorError, ObjectLostError, OwnerDiedError)
LOST = (RayActorError, MemoryFullError, StuckError)
"""A worker that was at something will not answer any more."""


class RemoteRole:
    """A single actor that is called like the object it holds.

    Args:
        wait: how an answer is waited for: (reference, what it is of, longest wait) -> value; None
            is `answer`, during which the caller does nothing else.
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


def why_lost(error: Exception) -> str:
    """Of a worker that will not answer."""
    if isinstance(error, StuckError):
        return f"does not get on: {error}"
    return "ran out of memory" if isinstance(error, MemoryFullError) else "was lost"


def too_late(what: str, timeout_s: float) -> FleetError:
    return FleetError(
        f"{what} did not answer within {timeout_s:g} s: is the cluster short of CPUs or GPUs, "
        "or the worker stuck? (--timeout-s sets the bound)"
    )


def answer(ref: ray.ObjectRef, what: str, timeout_s: float) -> Any:
    """The value of a reference, within bounded time, with errors that name who failed.

    Raises:
        RayActorError: the worker is gone (the caller may replace it).
        InputLostError: an argument, or the answer itself, was lost with another worker or machine.
        TesseraError: what the worker itself raised.
        StoreFullError, MemoryFullError: no room for the answer, or for the worker.
        FleetError: no answer in time, or an error of the worker's that is no `TesseraError`.
    """
    try:
        return ray.get(ref, timeout=timeout_s)
    except GetTimeoutError:
        raise too_late(what, timeout_s) from None
    except (ObjectStoreFullError, OutOfDiskError) as error:  # also as a RayTaskError's cause
        raise store_full(what, error) from None
    except OutOfMemoryError as error:
        raise memory_full(what, error) from None
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, TesseraError):
            raise cause from None
        if isinstance(cause, GONE):
            raise InputLostError(f"{what}: an argument was lost ({cause})") from None
        raise FleetError(f"{what} failed:\n{error}") from None
    except RayActorError as error:
        if getattr(error, "actor_init_failed", False):
            raise FleetError(f"{what} could not start:\n{error}") from None
        raise
    except (ObjectLostError, OwnerDiedError) as error:
        raise InputLostError(f"{what}: the answer was lost ({error})") from None
    except RayError as error:
        raise FleetError(f"{what}: {type(error).__name__}: {error}") from error
