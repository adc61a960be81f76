"""The lock on remote checkpoints, as `cluster.io.locks` is on a directory.

Not every object store can create a file exclusively. Of two processes that start at the same
moment, the first notices before its next upload that it lost the lock.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from typing import Self

from cluster.errors import LockHeldError, LockLostError, TesseraError
from cluster.io.locks import LockState, describe_owner
from cluster.io.processes import Holder
from learner.checkpoints.remote import RemoteCheckpoints

logger = logging.getLogger(__name__)

BEAT_S = 20.0  # between two renewals, each a small upload
STALE_S = 120.0
POLL_S = 2.0


class RemoteOwner:
    """A lock on a URL, renewed by a thread until `release`."""

    def __init__(self, remote: RemoteCheckpoints, holder: Holder) -> None:
        self._remote, self._holder = remote, holder
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="remote owner", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, remote: RemoteCheckpoints, run: str) -> Self:
        """Lock the URL; waits until an old lock is known to be stale.

        Args:
            run: name of the run, for messages.

        Raises:
            LockHeldError: another process holds it.
            CheckpointError: the URL does not answer.
        """
        mine = Holder.this_process(run)
        before = _wait_for_stale_owner(remote)
        remote.write_owner(mine.to_bytes())
        if _token(remote.owner()) != mine.token:
            raise _held_error(remote, remote.owner() or b"")
        if before:
            logger.warning(f"note: took over {remote.url} from {before}, which is gone")
        return cls(remote, mine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """Called before every write.

        Raises:
            LockLostError: another process has the lock.
            CheckpointError: the URL does not answer.
        """
        found = self._remote.owner()
        if _token(found) == self._holder.token:
            return
        who = _describe(found) if found else "a process that removed the lock"
        raise LockLostError(
            f"{self._remote.url} does not belong to this process (pid {self._holder.pid}) any more,"
            f" but to {who}: it stops, and writes nothing more there"
        )

    def release(self) -> None:
        """Remove the lock, unless another process has it."""
        self._ended.set()
        self._thread.join(BEAT_S)
        try:
            if _token(self._remote.owner()) == self._holder.token:
                self._remote.remove_owner()
        except TesseraError as error:
            logger.warning(f"note: {error}")

    def _renew(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                if _token(self._remote.owner()) != self._holder.token:
                    return  # lost; `check` reports it
                self._holder = replace(self._holder, renewed=self._holder.renewed + 1)
                self._remote.write_owner(self._holder.to_bytes())
            except TesseraError as error:  # the next renewal may succeed
                logger.debug(f"the lock at {self._remote.url} could not be renewed ({error})")


def _wait_for_stale_owner(remote: RemoteCheckpoints) -> str:
    """Wait until the owner is known to have ended; returns who it was, or empty.

    Raises:
        LockHeldError: it is running.
    """
    first, start = remote.owner(), time.monotonic()
    if first is None:
        return ""
    holder = Holder.from_bytes(first)
    if holder is not None and holder.here:
        if holder.lives:
            raise _held_error(remote, first)
        return _describe(first)
    logger.info(
        f"{remote.url} was last written by {_describe(first)}: watching for {STALE_S:g} s whether "
        "that process lives"
    )
    while time.monotonic() - start < STALE_S:
        time.sleep(POLL_S)
        now = remote.owner()
        if now is None:
            return ""
        if now != first:
            raise _held_error(remote, now)
    return _describe(first)


def _held_error(remote: RemoteCheckpoints, data: bytes) -> LockHeldError:
    holder = Holder.from_bytes(data)
    how = f"Stop it (`kill {holder.pid}` on {holder.host}), or name" if holder else "Name"
    return LockHeldError(
        f"output.checkpoint_url {remote.url} is in use by {_describe(data)}. {how} another URL"
    )


def _describe(data: bytes) -> str:
    return describe_owner(LockState("", 0, Holder.from_bytes(data)))


def _token(data: bytes | None) -> str:
    holder = Holder.from_bytes(data) if data else None
    return holder.token if holder else ""
