"""Files that appear whole or not at all, errors of storage to act on, lines of text."""

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
    """A file to write beside `path`; it takes its place if the block ends well, else it is gone.

    Args:
        durable: on the disk before it takes its place, and its name after: it then survives a
            power cut, and not only the end of this process.
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
    """Have a file's content, or a directory's names, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(path: Path, *, kept: str = "", then: str = RESUME) -> Iterator[None]:
    """While the block writes `path`: what the operating system refuses becomes a `StorageError`.

    Args:
        kept: what is whole all the same, a sentence for the message.
        then: what to do once the cause is mended.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise storage_error(path, why, error.errno, kept=kept, then=then) from error


def storage_error(
    path: Path, reason: str, number: int | None, *, kept: str = "", then: str = RESUME
) -> StorageError:
    """What could not be written, why, how much is free there, and what to do.

    Args:
        number: the operating system's for the reason; None: not known.
    """
    free = f"; {_free(path)}" if number is None or number in NO_ROOM else ""
    whole = f" {kept}." if kept else ""
    return StorageError(
        f"{path} could not be written: {reason}{free}.{whole} {advice(number)}, then {then}"
    )


def _free(path: Path) -> str:
    """How much room there is where a path lies, for a message."""
    place = path
    while not os.path.exists(place) and place != place.parent:
        place = place.parent
    try:
        return f"{shutil.disk_usage(place).free / MIB:,.0f} MiB are free there"
    except OSError as error:
        return f"the storage does not say how much is free ({error.strerror})"


def split_lines(text: str) -> list[str]:
    r"""Lines end at \n, \r\n and \r alone, as in files that are opened as text: U+2028, U+0085,
    form feeds and separators of information are characters like others."""
    return _LINE_END.split(text)


def advice(number: int | None) -> str:
    """What to do about an error of the operating system, by its number; without a full stop."""
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
