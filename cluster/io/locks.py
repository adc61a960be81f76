"""A lock file: one owner at a time of a run directory, or of what a command writes.

It works where `flock` does not reach (NFS, parallel filesystems): the file is created exclusively,
and its owner renews its modification time, which the storage sets by its own clock. A lock whose
owner is gone is taken over: at once if its process ran here, else when the modification time has
stood still for `STALE_S`. Whoever takes over holds a second lock, named after the first one's
token, so that exactly one succeeds.
"""

from __future__ import annotations

import glob
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from cluster.errors import LockHeldError, LockLostError
from cluster.io.files import AGAIN, writing
from cluster.io.processes import Holder
from cluster.io.run_layout import OWNER

logger = logging.getLogger(__name__)

BEAT_S = 5.0  # between two renewals
STALE_S = 60.0
"""A lock of another machine that was not renewed for so long is abandoned: well above what a
process may be kept from renewing it by a library that holds the interpreter, or by slow storage."""
WATCH_S = 3 * BEAT_S
"""But it is watched for at least so long: clocks of machines differ by minutes, and some
filesystems write the client's."""
POLL_S = 1.0
ATTEMPTS = 100  # at a lock that others create, take over and release meanwhile
WRITTEN_S = 1.0  # longest wait for the content of one that has just been created

Verdict = Literal["held", "stale", "watch"]


@dataclass(frozen=True)
class LockState:
    """A lock file at one moment."""

    token: str
    renewed_ns: int
    """Its modification time."""
    holder: Holder | None
    """None where the content says nothing: it is being created, or damaged."""


def lock_verdict(sight: LockState, age_s: float, watched_s: float) -> Verdict:
    """Whether a lock is held.

    Args:
        age_s: since it was renewed, by the storage's clock.
        watched_s: how long this process has seen it stand still.
    """
    holder = sight.holder
    if holder is not None and holder.here:
        return "held" if holder.lives else "stale"
    stood_s = max(age_s, watched_s)
    return "stale" if watched_s >= WATCH_S and stood_s >= STALE_S else "watch"


class Lock:
    """A lock that this process holds, renewed by a thread until `release`."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self.path, self.holder = path, holder
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lock {path.name}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """Whether this process still is the owner. To be asked before anything is written.

        Raises:
            LockLostError: another process took over, or somebody removed the file: this one stood
                still for longer than `STALE_S`.
        """
        sight = read_lock(self.path)
        if sight is not None and sight.token == self.holder.token:
            return
        who = f"{describe_owner(sight)} has taken over" if sight else "its lock is gone"
        raise LockLostError(
            f"{self.path.parent} does not belong to this process (pid {self.holder.pid}) any more: "
            f"{who}, because this one stood still for over {STALE_S:g} s (was it suspended?) or "
            "the lock was removed by hand. It stops, and writes nothing more there"
        )

    def release(self) -> None:
        """Remove the lock, unless another process has taken over."""
        self._ended.set()
        self._thread.join(BEAT_S)
        guard = _guard(self.path, self.holder.token)
        try:
            if self.path.parent.is_dir() and _create(guard, self.holder):
                try:
                    sight = read_lock(self.path)
                    if sight is not None and sight.token == self.holder.token:
                        self.path.unlink()
                finally:
                    guard.unlink(missing_ok=True)
        except OSError as error:
            logger.warning(f"note: {self.path} could not be removed ({error})")

    def _renew(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                sight = read_lock(self.path)
                if sight is None or sight.token != self.holder.token:
                    return  # lost: whoever asks `check` is told
                os.utime(self.path)  # no times given: the storage's own clock
            except OSError as error:  # of a moment: the next renewal may succeed
                logger.debug(f"{self.path} could not be renewed ({error})")


def acquire(path: Path, what: str, stop: str = "", run: str = "") -> Lock:
    """Take a lock; nothing else is written.

    Args:
        what: is locked, for messages.
        stop: how its owner can be asked to end, beside ending its process.
        run: name of the run that takes it.

    Raises:
        LockHeldError: another process holds it; says which.
        StorageError: the lock cannot be written.
    """
    mine = Holder.this_process(run)
    with writing(path, then=AGAIN):
        for _ in range(ATTEMPTS):
            taken = _attempt(path, mine, what, stop)
            if taken is None:
                time.sleep(0.05)
                continue
            for leftover in path.parent.glob(f".{glob.escape(path.name.lstrip('.'))}.*"):
                leftover.unlink(missing_ok=True)
            if taken.before:
                logger.warning(f"note: took over {what} from {taken.before}, which is gone")
            return Lock(path, mine)
    raise LockHeldError(f"{what} cannot be locked: other processes create and remove {path}")


@contextmanager
def locked(directory: Path, what: str) -> Iterator[Lock]:
    """Own a directory that a command writes to, while the block runs; it is made if need be.

    Raises:
        LockHeldError, StorageError: see `acquire`.
    """
    with writing(directory, then=AGAIN):
        directory.mkdir(parents=True, exist_ok=True)
    with acquire(directory / OWNER, what) as lock:
        yield lock


@dataclass(frozen=True)
class _Acquired:
    before: str = ""
    """The owner from whom it was taken over; empty if it was free."""


@contextmanager
def locked_file(file: Path, what: str) -> Iterator[Lock]:
    """Own a file that a command writes, and what it keeps beside it, while the block runs.

    Raises:
        LockHeldError, StorageError: see `acquire`.
    """
    with writing(file.parent, then=AGAIN):
        file.parent.mkdir(parents=True, exist_ok=True)
    with acquire(file.with_name(f".{file.name}.lock"), what) as lock:
        yield lock


def is_lock(file: Path) -> bool:
    """Whether a file belongs to a directory's lock."""
    return file.name == OWNER or file.name.startswith(f".{OWNER}.")


def _attempt(path: Path, mine: Holder, what: str, stop: str) -> _Acquired | None:
    """Try once; None: others create, take over or release it at this moment."""
    if _create(path, mine):
        return _Acquired()
    first = read_lock(path)
    if first is None:
        return None
    verdict, sight = _watched(path, first, what)
    if sight is None:
        return None
    if verdict == "held":
        raise _held_error(path, sight, what, stop)
    return _Acquired(describe_owner(sight)) if _take_over(path, sight, mine, what) else None


def _watched(path: Path, sight: LockState, what: str) -> tuple[Verdict, LockState | None]:
    """Judge a lock, after watching it for as long as that takes; None once it is gone."""
    start, age_s, told = time.monotonic(), _age_s(path, sight), False
    while True:
        verdict = lock_verdict(sight, age_s, time.monotonic() - start)
        if verdict != "watch":
            return verdict, sight
        if not told:
            told = True
            logger.info(
                f"{what} is locked by {describe_owner(sight)}, last renewed {age_s:.0f} s ago: "
                f"watching for up to {max(WATCH_S, STALE_S - age_s):.0f} s whether it lives"
            )
        time.sleep(POLL_S)
        now = read_lock(path)
        if now is None or (now.token, now.renewed_ns) != (sight.token, sight.renewed_ns):
            return "held", now


def _take_over(path: Path, sight: LockState, mine: Holder, what: str) -> bool:
    """Put our lock in the place of an abandoned one; False if somebody else did."""
    guard, partial = _guard(path, sight.token), _guard(path, mine.token)
    try:
        if _attempt(guard, mine, what, "") is None:
            return False
    except LockHeldError:
        return False
    try:
        now = read_lock(path)
        if now is None or now.token != sight.token:
            return False
        partial.write_bytes(mine.to_bytes())
        os.replace(partial, path)
        return True
    finally:
        partial.unlink(missing_ok=True)
        guard.unlink(missing_ok=True)


def _guard(path: Path, token: str) -> Path:
    return path.with_name(f".{path.name.lstrip('.')}.{token}")


def _create(path: Path, holder: Holder) -> bool:
    """Create a lock file; False if there is one."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(handle, holder.to_bytes())
        os.fsync(handle)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)
    return True


def read_lock(path: Path) -> LockState | None:
    """A lock file as it is now; None if there is none. Reading an opened file, not its name,
    has NFS ask the server."""
    deadline = time.monotonic() + WRITTEN_S
    while True:
        try:
            with path.open("rb") as file:
                data, status = file.read(), os.fstat(file.fileno())
        except (FileNotFoundError, NotADirectoryError):
            return None
        holder = Holder.from_bytes(data)
        if holder is not None or time.monotonic() > deadline:
            unnamed = f"{status.st_ino:x}x{status.st_mtime_ns:x}"
            return LockState(holder.token if holder else unnamed, status.st_mtime_ns, holder)
        time.sleep(0.02)


def _age_s(path: Path, sight: LockState) -> float:
    """Seconds since a lock was renewed, by the clock that renewed it: for a process of another
    machine that of the storage."""
    if sight.holder is not None and sight.holder.here:
        return max(0.0, time.time() - sight.renewed_ns / 1e9)
    probe = _guard(path, secrets.token_hex(8))
    handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        os.write(handle, b" ")
        return max(0.0, (os.fstat(handle).st_mtime_ns - sight.renewed_ns) / 1e9)
    finally:
        os.close(handle)
        probe.unlink(missing_ok=True)


def describe_owner(sight: LockState) -> str:
    """Who holds a lock, in words."""
    holder = sight.holder
    if holder is None:
        return "a process that its lock does not name"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.since))
    run = f" (run {holder.run})" if holder.run else ""
    return f"process {holder.pid} on {holder.host}{run}, since {since}"


def owner_of(directory: Path) -> str:
    """Who owns a directory, in words, as far as can be told at once; empty if nobody does, or a
    process that is gone or has not renewed its lock for long (`acquire` looks closer)."""
    path = directory / OWNER
    try:
        sight = read_lock(path)
        if sight is None:
            return ""
        if sight.holder is not None and sight.holder.here:
            return describe_owner(sight) if sight.holder.lives else ""
        return "" if _age_s(path, sight) > STALE_S else describe_owner(sight)
    except OSError as error:
        return f"a process that cannot be known ({error})"


def _held_error(path: Path, sight: LockState, what: str, stop: str) -> LockHeldError:
    age_s, holder = _age_s(path, sight), sight.holder
    ways = [f"`{stop}`"] if stop else []
    if holder is not None:
        ways.append(f"`kill {holder.pid}`" + ("" if holder.here else f" on {holder.host}"))
    copied = f"is it suspended? In a copy of its directory, remove {path}"
    quiet = f" (it stands still: {copied})" if age_s > STALE_S else ""
    how = f"Stop it with {' or '.join(ways)}" if ways else "Wait until it has ended"
    return LockHeldError(
        f"{what} is in use by {describe_owner(sight)}, last heartbeat {age_s:.0f} s ago{quiet}. "
        f"{how}, or name another directory"
    )
