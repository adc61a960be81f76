"""Atomic writing of files, messages for storage errors, lines of text."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import StorageError

MIB = 1 << 20
RESUME = "go on with --resume"
AGAIN = "start again"  # where there is nothing to go on with
_LINE_END = re.compile(r"\r\n|\n|\r")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary file beside `path`, which replaces it if the block succeeds.

    Args:
        durable: synced to disk, to survive a power cut.
    """
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        if durable:
            sync(partial)
        os.replace(partial, path)
        if durable:
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """fsync of a file or directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(path: Path, *, kept: str = "", then: str = RESUME) -> Iterator[None]:
    """Turn an OSError in the block, which writes `path`, into a `StorageError`.

    Args:
        kept: what is intact, a sentence for the message.
        then: what to do after fixing the cause.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise storage_error(path, why, error.errno, kept=kept, then=then) from error


def storage_error(
    path: Path, reason: str, number: int | None, *, kept: str = "", then: str = RESUME
) -> StorageError:
    """Says what could not be written, why, how much space is free, and what to do.

    Args:
        number: errno of the reason; None: not known.
    """
    free = f"; {_free(path)}" if number is None or number in NO_ROOM else ""
    whole = f" {kept}." if kept else ""
    return StorageError(
        f"{path} could not be written: {reason}{free}.{whole} {advice(number)}, then {then}"
    )


def _free(path: Path) -> str:
    """Free space on the disk of a path, for a message."""
    place = path
    while not os.path.exists(place) and place != place.parent:
        place = place.parent
    try:
        return f"{shutil.disk_usage(place).free / MIB:,.0f} MiB are free there"
    except OSError as error:
        return f"the storage does not say how much is free ({error.strerror})"


def split_lines(text: str) -> list[str]:
    r"""Split at \n, \r\n and \r alone, as files opened as text do; not at U+2028 or form feeds."""
    return _LINE_END.split(text)


def advice(number: int | None) -> str:
    """What to do about an OSError, by its errno; without a full stop."""
    if number in NO_ROOM:
        return "Make room (or lift the limit)"
    if number in (errno.EACCES, errno.EPERM):
        return "Have it made writable for this user"
    if number == errno.EROFS:
        return "Choose a place that is not read-only"
    if number in (errno.EMFILE, errno.ENFILE):
        return "Lift the limit on open files (`ulimit -n`)"
    if number in (errno.ENOMEM, errno.EAGAIN):
        return "Free memory or processes (or lift the limit)"
    if number in (errno.ESTALE, errno.EIO, errno.ENODEV, errno.ENOTCONN, errno.ETIMEDOUT):
        return "See that the storage is there, and whole"
    return "See to that"
