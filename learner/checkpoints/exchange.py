"""A checkpoint's files between the driver and a learner that does not see the run directory.

They go through calls, in parts: slower than storage that both share, but nothing else is needed.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from pathlib import Path

from cluster.io.files import sync, writing
from cluster.roles import LearnerRole

PART = 32 << 20  # bytes of one call
MARK = ".seen"


def shares(learner: LearnerRole, directory: Path) -> bool:
    """Whether the learner, or each of several, sees a directory of this process."""
    mark, content = directory / f"{MARK}-{secrets.token_hex(4)}", secrets.token_bytes(16)
    with writing(mark):
        mark.write_bytes(content)
    try:
        return learner.sees(mark, content)
    finally:
        mark.unlink(missing_ok=True)


def fetch(learner: LearnerRole, directory: Path) -> None:
    """Copy the files that the learner has saved to itself into a directory here.

    Raises:
        StorageError: no space left here.
    """
    for name, size in learner.sizes().items():
        with writing(directory / name), (directory / name).open("wb") as file:
            for start in range(0, size, PART):
                file.write(learner.send_part(name, start, PART))
        with writing(directory / name):
            sync(directory / name)
    learner.drop_files()


def send(learner: LearnerRole, files: Iterable[Path]) -> None:
    """Copy files to the learner, or to each of several, for its `restore`.

    Raises:
        StorageError: no space left there.
    """
    learner.drop_files()  # of an exchange that was interrupted
    for path in files:
        with path.open("rb") as file:
            learner.receive_part(path.name, file.read(PART))  # of an empty file, too
            while data := file.read(PART):
                learner.receive_part(path.name, data)
