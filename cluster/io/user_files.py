"""Small files that this program keeps for its user between runs, wherever he may write: his token,
if Ray's own place cannot have it, and where his runs are.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cluster.io.files import replacing

MAX_RECORDS = 200  # directories of runs that are remembered
RUNS = "runs"

logger = logging.getLogger(__name__)


def user_directories() -> Iterator[Path]:
    """Where this program may keep files of the user's, best place first; a user without a home
    directory, or with one that cannot be written, has the last."""
    if os.environ.get("XDG_STATE_HOME"):
        yield Path(os.environ["XDG_STATE_HOME"]) / "tessera"
    else:
        with suppress(RuntimeError):
            yield Path.home() / ".local" / "state" / "tessera"
    yield Path(tempfile.gettempdir()) / f"tessera-{os.getuid()}"


def is_private_directory(directory: Path) -> bool:
    """Whether a directory is this user's, and nobody else writes it: anybody may have made one
    under /tmp."""
    found = directory.lstat()
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.getuid()
        and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )


def record_run(directory: Path) -> None:
    """Note where a run is, so that other commands of this user find it by its name, from any
    working directory. What cannot be noted ends nothing."""
    path = os.fsencode(directory.absolute())
    problem: OSError | None = None
    for place in user_directories():
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not is_private_directory(place):
                continue
            with replacing(place / RUNS / hashlib.sha256(path).hexdigest()[:16]) as partial:
                partial.write_bytes(path)
            _prune(place / RUNS)
            return
        except OSError as error:
            problem = error
    logger.warning(f"note: this run is found by its directory, but not by its name ({problem})")


def recorded_runs() -> list[Path]:
    """Directories of this user's runs that are still there, those that were started last first."""
    notes: list[tuple[float, bytes]] = []
    for place in user_directories():
        with suppress(OSError):
            if is_private_directory(place):
                notes += [
                    (note.stat().st_mtime, note.read_bytes()) for note in _records(place / RUNS)
                ]
    paths = [Path(os.fsdecode(path)) for _, path in sorted(notes, reverse=True)]
    return [path for path in paths if path.is_absolute() and os.path.isdir(path)]


def _records(directory: Path) -> list[Path]:
    return [note for note in directory.glob("*") if not note.name.startswith(".")]


def _prune(directory: Path) -> None:
    """Keep the newest. (Not those whose directory is there: another machine may see it.)"""
    notes = sorted(_records(directory), key=lambda note: note.stat().st_mtime)
    for note in notes[:-MAX_RECORDS]:
        note.unlink(missing_ok=True)
