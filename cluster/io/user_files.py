"""Per-user state: directories of runs, and a Ray token where ~/.ray is not writable."""

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

MAX_RECORDS = 200  # directories of runs
RUNS = "runs"

logger = logging.getLogger(__name__)


def user_directories() -> Iterator[Path]:
    """Candidate directories for the user's state, best first; the last needs no home directory."""
    if os.environ.get("XDG_STATE_HOME"):
        yield Path(os.environ["XDG_STATE_HOME"]) / "tessera"
    else:
        with suppress(RuntimeError):
            yield Path.home() / ".local" / "state" / "tessera"
    yield Path(tempfile.gettempdir()) / f"tessera-{os.getuid()}"


def is_private_directory(directory: Path) -> bool:
    """Whether only this user can write a directory; in /tmp anybody may have made it."""
    found = directory.lstat()
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.getuid()
        and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )


def record_run(directory: Path) -> None:
    """Record a run directory, so that commands find the run by name from any working directory.
    Failure is a warning."""
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
    """Existing directories of this user's runs, the most recently started first."""
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
    """Keep the newest records, also of directories that only other machines see."""
    notes = sorted(_records(directory), key=lambda note: note.stat().st_mtime)
    for note in notes[:-MAX_RECORDS]:
        note.unlink(missing_ok=True)
