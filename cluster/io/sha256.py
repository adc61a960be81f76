"""SHA-256 sums of files that were fetched, kept beside them as `sha256sum` writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from cluster.errors import CheckpointError

_CHUNK = 1 << 22  # bytes read at a time


def sum_file(file: Path) -> Path:
    """Where the SHA-256 of a fetched file stands, as `sha256sum` writes it."""
    return file.with_name(file.name + ".sha256")


def sha256_of(file: Path, advance: Callable[[int], None] = lambda size: None) -> str:
    """SHA-256 of a file, in hexadecimal; `advance` is told the size of each piece read."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


def write_sum(file: Path, digest: str) -> None:
    """Note the SHA-256 of a file beside it."""
    line = f"{digest}  {file.name}\n"
    sum_file(file).write_text(line, encoding="utf-8", errors="surrogateescape")


def verify_sum(file: Path, advance: Callable[[int], None] = lambda size: None) -> bool:
    """Compare a file with the sum beside it; False if there is none.

    Raises:
        CheckpointError: they differ.
    """
    note = sum_file(file)
    if not note.is_file():
        return False
    expected = note.read_text(encoding="utf-8", errors="surrogateescape").split()[:1]
    found = sha256_of(file, advance)
    if expected != [found]:
        raise CheckpointError(
            f"{file}: SHA-256 is {found}, but {note.name} says "
            f"{expected[0] if expected else 'nothing'}: the file was damaged or replaced; fetch it "
            f"again, or remove {note.name} if you replaced it on purpose"
        )
    return True
