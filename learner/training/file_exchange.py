"""A learner's files of a checkpoint, in parts: for a learner on a node that does not see the run
directory. `learner.checkpoints.exchange` is the other end."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from cluster.io.files import RESUME, writing
from cluster.io.processes import process_lives, this_machine

PREFIX = "tessera-checkpoint-"


class FileExchange:
    """The learner's end: a folder on its own disk, with one set of files at a time."""

    _folder: Path | None = None

    def sees(self, file: Path, content: bytes) -> bool:
        """Whether a file is here, with this content; another one of the same path is not it."""
        try:
            return file.read_bytes() == content
        except OSError:
            return False

    def exchange_folder(self) -> Path:
        """The folder; made when it is needed. Those of learners that were killed go.

        Raises:
            StorageError: it cannot be made.
        """
        if self._folder is None:
            place = Path(tempfile.gettempdir())
            machine = hashlib.sha256(this_machine().encode()).hexdigest()[:8]
            for left in place.glob(f"{PREFIX}{machine}-*"):
                pid = left.name.split("-")[-2]
                if pid.isdigit() and not process_lives(int(pid)):
                    shutil.rmtree(left, ignore_errors=True)
            with writing(place, then=RESUME):
                made = tempfile.mkdtemp(prefix=f"{PREFIX}{machine}-{os.getpid()}-", dir=place)
            self._folder = Path(made)
        return self._folder

    def sizes(self) -> dict[str, int]:
        """Bytes of each file in it."""
        return {file.name: file.stat().st_size for file in sorted(self.exchange_folder().iterdir())}

    def send_part(self, name: str, start: int, size: int) -> bytes:
        """At most `size` bytes of a file."""
        with (self.exchange_folder() / name).open("rb") as file:
            file.seek(start)
            return file.read(size)

    def receive_part(self, name: str, data: bytes) -> None:
        """Append to a file.

        Raises:
            StorageError: no space left here.
        """
        file = self.exchange_folder() / name
        with writing(file, then=RESUME), file.open("ab") as opened:
            opened.write(data)

    def drop_files(self) -> None:
        """Remove the folder."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
