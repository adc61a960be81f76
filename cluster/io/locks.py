"""A lock file: one owner at a time of a run directory, or of what a command writes.

It works on NFS and parallel filesystems, unlike `flock`: the file is created exclusively, and its
owner renews its modification time, by the storage's clock. A lock of a dead owner is taken over: at
once if its process ran on this machine, else when this process has seen no change of the
modification time for `STALE_S`, or for a shorter time if it is very old. Taking over needs a second
lock, named after the first one's token, so that exactly one process succeeds.
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
"""Age after which a lock of another machine is abandoned: well above the delays by slow storage or
a library that holds the interpreter."""
WATCH_S = 3 * BEAT_S
"""Minimum observation before a takeover."""
SKEW_S = 600.0
"""Most by which the clocks of two hosts may differ. Some filesystems (Lustre, GPFS) write a host's
own time, so an age counts only beyond this."""
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
    """None: the content is partial or damaged."""


def lock_verdict(state: LockState, age_s: float, watched_s: float) -> Verdict:
    """Whether a lock is held.

    Args:
        age_s: seconds since its renewal, by the storage's clock or the two hosts' clocks.
        watched_s: seconds in which this process saw no renewal.
    """
    holder = state.holder
    if holder is not None and holder.here:
        return "held" if holder.lives else "stale"
    stood_s = max(age_s - SKEW_S, watched_s)
    return "stale" if watched_s >= WATCH_S and stood_s >= STALE_S else "watch"


class Lock:
    """A lock that this process holds; a thread renews it until `release`."""

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
        """Check that this process still holds the lock; call it before writing.

        Raises:
            LockLostError: another process took over, or the file was removed.
        """
        state = read_lock(self.path)
        if state is not None and state.token == self.holder.token:
            return
        who = f"{describe_owner(state)} has taken over" if state else "its lock is gone"
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
                    state = read_lock(self.path)
                    if state is not None and state.token == self.holder.token:
                        self.path.unlink()
                finally:
                    guard.unlink(missing_ok=True)
        except OSError as error:
            logger.warning(f"note: {self.path} could not be removed ({error})")

    def _renew(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                state = read_lock(self.path)
                if state is None or state.token != self.holder.token:
                    return  # lost: `check` raises
                os.utime(self.path)  # no times given: the storage's own clock
            except OSError as error:  # the next renewal may succeed
                logger.debug(f"{self.path} could not be renewed ({error})")


def acquire(path: Path, what: str, stop: str = "", run: str = "") -> Lock:
    """Take a lock; nothing else is written.

    Args:
        what: the locked thing, for messages.
        stop: command that stops the owner, for messages.
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
    """Lock a directory while the block runs; creates it if necessary.

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
    """The previous owner; empty: it was free."""


@contextmanager
def locked_file(file: Path, what: str) -> Iterator[Lock]:
    """Lock an output file while the block runs.

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
    verdict, state = _watched(path, first, what)
    if state is None:
        return None
    if verdict == "held":
        raise _held_error(path, state, what, stop)
    return _Acquired(describe_owner(state)) if _take_over(path, state, mine, what) else None


def _watched(path: Path, state: LockState, what: str) -> tuple[Verdict, LockState | None]:
    """Judge a lock, after watching it for as long as that takes; None once it is gone."""
    start, age_s, reported = time.monotonic(), _age_s(path, state), False
    while True:
        verdict = lock_verdict(state, age_s, time.monotonic() - start)
        if verdict != "watch":
            return verdict, state
        if not reported:
            reported = True
            logger.info(
                f"{what} is locked by {describe_owner(state)}, last renewed {age_s:.0f} s ago: "
                f"watching for {WATCH_S if age_s >= STALE_S + SKEW_S else STALE_S:.0f} s whether "
                "it lives"
            )
        time.sleep(POLL_S)
        now = read_lock(path)
        if now is None or (now.token, now.renewed_ns) != (state.token, state.renewed_ns):
            return "held", now


def _take_over(path: Path, state: LockState, mine: Holder, what: str) -> bool:
    """Replace an abandoned lock by ours; False if another process did."""
    guard, partial = _guard(path, state.token), _guard(path, mine.token)
    try:
        if _attempt(guard, mine, what, "") is None:
            return False
    except LockHeldError:
        return False
    try:
        now = read_lock(path)
        if now is None or now.token != state.token:
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
    """The lock file; None if there is none. (Stat of an open file makes NFS ask the server.)"""
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


def _age_s(path: Path, state: LockState) -> float:
    """Seconds since the renewal of a lock, by the clock with which the storage writes this
    process's files: its own, or this machine's."""
    probe = _guard(path, secrets.token_hex(8))
    handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        os.write(handle, b" ")
        return max(0.0, (os.fstat(handle).st_mtime_ns - state.renewed_ns) / 1e9)
    finally:
        os.close(handle)
        probe.unlink(missing_ok=True)


def describe_owner(state: LockState) -> str:
    """The holder of a lock, for messages."""
    holder = state.holder
    if holder is None:
        return "a process that its lock does not name"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.since))
    run = f" (run {holder.run})" if holder.run else ""
    return f"process {holder.pid} on {holder.host}{run}, since {since}"


def owner_of(directory: Path) -> str:
    """The owner of a directory, for messages; empty if there is none, or it is dead or stale.
    (`acquire` observes a stale lock before it decides.)"""
    path = directory / OWNER
    try:
        state = read_lock(path)
        if state is None:
            return ""
        if state.holder is not None and state.holder.here:
            return describe_owner(state) if state.holder.lives else ""
        age_s = _age_s(path, state)
        if age_s > STALE_S and not (age_s < STALE_S + SKEW_S and _renewed(path, state)):
            return ""
        return describe_owner(state)
    except OSError as error:
        return f"a process that cannot be known ({error})"


def _renewed(path: Path, state: LockState) -> bool:
    """Whether a lock is renewed within `WATCH_S`: its age may be that of another host's clock."""
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        now = read_lock(path)
        if now is None or (now.token, now.renewed_ns) != (state.token, state.renewed_ns):
            return now is not None
    return False


def _held_error(path: Path, state: LockState, what: str, stop: str) -> LockHeldError:
    age_s, holder = _age_s(path, state), state.holder
    ways = [f"`{stop}`"] if stop else []
    if holder is not None:
        ways.append(f"`kill {holder.pid}`" + ("" if holder.here else f" on {holder.host}"))
    copied = f"is it suspended? In a copy of its directory, remove {path}"
    quiet = f" (it is not renewed: {copied})" if age_s > STALE_S else ""
    how = f"Stop it with {' or '.join(ways)}" if ways else "Wait until it has ended"
    return LockHeldError(
        f"{what} is in use by {describe_owner(state)}, last heartbeat {age_s:.0f} s ago{quiet}. "
        f"{how}, or name another directory"
    )
