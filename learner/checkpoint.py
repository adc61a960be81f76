"""Checkpoints: complete or not there, checked before they are used, nothing unpickled.

A checkpoint is a directory `step_000050` (after 50 iterations). It is written under another name,
the manifest with every file's size and SHA-256 last, and then renamed into place.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgpack

from cluster.errors import CheckpointError
from cluster.fleet import Fleet
from learner.pipeline import Pipeline
from rewards.combine import Combiner

FORMAT = 2
MANIFEST = "manifest.msgpack"
MOMENTS = "moments.msgpack"
REWARDS = "rewards.msgpack"
GROUPS = "groups.msgpack"
PREFIX = "step_"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    """Iterations done; training goes on with this one."""


def save_checkpoint(
    root: Path, step: int, fleet: Fleet, combiner: Combiner, keep: int, groups: bytes = b""
) -> Checkpoint:
    """Write one checkpoint, and remove the oldest beyond `keep`.

    Args:
        groups: that were drawn with older weights (`Pipeline.state`); a resumed run could not draw
            them again.

    Raises:
        CheckpointError: the learner's files did not arrive here.
    """
    final = root / f"{PREFIX}{step:06d}"
    partial = root / f".{final.name}.partial"
    for leftover in (partial, final):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    fleet.learner.save(partial)
    if not any(partial.iterdir()):
        raise CheckpointError(
            f"the learner wrote a checkpoint, but nothing arrived in {partial}: run_dir must lie "
            "on storage that all nodes share"
        )
    (partial / MOMENTS).write_bytes(fleet.moments.state())
    (partial / REWARDS).write_bytes(combiner.state())
    if groups:
        (partial / GROUPS).write_bytes(groups)
    files = {file.name: _describe(file) for file in sorted(partial.iterdir())}
    manifest = {"format": FORMAT, "step": step, "files": files}
    (partial / MANIFEST).write_bytes(msgpack.packb(manifest))
    _sync(partial)
    os.replace(partial, final)
    for old in _steps(root)[:-keep]:
        shutil.rmtree(old)
    return Checkpoint(final, step)


def newest_checkpoint(root: Path, say: Callable[[str], None]) -> Checkpoint:
    """The newest complete checkpoint; damaged ones are skipped, and `say` is told.

    Raises:
        CheckpointError: there is no complete one.
    """
    for path in reversed(_steps(root)):
        try:
            return verify(path)
        except CheckpointError as error:
            say(f"skipping {error}")
    raise CheckpointError(f"no complete checkpoint under {root}")


def verify(path: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: names the first file that is missing or differs.
    """
    try:
        manifest = msgpack.unpackb((path / MANIFEST).read_bytes())
        found, step, files = manifest["format"], int(manifest["step"]), manifest["files"]
    except (OSError, ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise CheckpointError(f"checkpoint {path.name}: no readable manifest ({error})") from error
    if found != FORMAT:
        raise CheckpointError(f"checkpoint {path.name} has format {found}, expected {FORMAT}")
    for name, expected in files.items():
        file = path / name
        if not file.is_file() or _describe(file) != expected:
            raise CheckpointError(f"checkpoint {path.name}: {name} is missing or damaged")
    return Checkpoint(path, step)


def restore(
    checkpoint: Checkpoint, fleet: Fleet, combiner: Combiner, pipeline: Pipeline | None = None
) -> None:
    """Bring learner, moments server, the rewards' anchors and the groups on their way to the
    checkpoint's state."""
    fleet.learner.restore(checkpoint.path)
    fleet.moments.restore((checkpoint.path / MOMENTS).read_bytes())
    combiner.restore((checkpoint.path / REWARDS).read_bytes())
    if pipeline is not None and (checkpoint.path / GROUPS).is_file():
        pipeline.restore((checkpoint.path / GROUPS).read_bytes())


def _steps(root: Path) -> list[Path]:
    return sorted(path for path in root.glob(f"{PREFIX}*") if path.is_dir())


def _describe(file: Path) -> dict[str, object]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"size": file.stat().st_size, "sha256": digest}


def _sync(directory: Path) -> None:
    """Have the files on the disk before the name that vouches for them."""
    for file in directory.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
