"""One owner of the checkpoints at a URL, as `cluster.io.locks` is of a directory.

Object stores do not create a file exclusively everywhere, so two processes that start in the same
moment may both believe that they own the place; the one that wrote first finds out before its next
upload.
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

BEAT_S = 20.0  # between two renewals: each is a small upload
STALE_S = 120.0
POLL_S = 2.0


class RemoteOwner:
    """A claim on a URL, renewed by a thread until `release`."""

    def __init__(self, remote: RemoteCheckpoints, holder: Holder) -> None:
        self._remote, self._holder = remote, holder
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="remote owner", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, remote: RemoteCheckpoints, run: str) -> Self:
        """Claim the place, after waiting for as long as it takes to know whether another process
        holds it.

        Args:
            run: name of the run, for messages.

        Raises:
            LockHeldError: another process does.
            CheckpointError: the place does not answer.
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
        """To be asked before anything is written there.

        Raises:
            LockLostError: another process has claimed the place.
            CheckpointError: the place does not answer.
        """
        found = self._remote.owner()
        if _token(found) == self._holder.token:
            return
        who = _describe(found) if found else "somebody who removed its mark"
        raise LockLostError(
            f"{self._remote.url} does not belong to this process (pid {self._holder.pid}) any more,"
            f" but to {who}: it stops, and writes nothing more there"
        )

    def release(self) -> None:
        """Give the place up, unless another process has claimed it."""
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
                    return  # lost: whoever asks `check` is told
                self._holder = replace(self._holder, renewed=self._holder.renewed + 1)
                self._remote.write_owner(self._holder.to_bytes())
            except TesseraError as error:  # of a moment: the next renewal may succeed
                logger.debug(f"the mark at {self._remote.url} could not be renewed ({error})")


def _wait_for_stale_owner(remote: RemoteCheckpoints) -> str:
    """Who held the place, once it is known that it is gone; empty if nobody did.

    Raises:
        LockHeldError: it lives.
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
