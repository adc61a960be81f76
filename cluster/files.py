"""Files that appear whole or not at all, and errors of storage that a user can act on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import StorageError

MIB = 1 << 20


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
def writing(path: Path, *, kept: str = "") -> Iterator[None]:
    """While the block writes `path`: what the operating system refuses becomes a `StorageError`.

    Args:
        kept: what is whole all the same, a sentence for the message.
    """
    try:
        yield
    except OSError as error:
        raise storage_error(path, error.strerror or str(error), kept) from error


def storage_error(path: Path, reason: str, kept: str = "") -> StorageError:
    """What could not be written, why, how much is free there, and what to do."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        free = f"{shutil.disk_usage(place).free / MIB:,.0f} MiB are free there"
    except OSError as error:
        free = f"the storage does not say how much is free ({error.strerror})"
    whole = f" {kept}." if kept else ""
    return StorageError(
        f"{path} could not be written: {reason}; {free}.{whole} Make room (or lift the limit), "
        "then go on with --resume"
    )
