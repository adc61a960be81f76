"""Checkpoints: complete or not there, checked before they are used, nothing unpickled.

A checkpoint is a directory `step_000050` (after 50 iterations). It is written under another name,
the manifest with every file's size and SHA-256 last, and then renamed into place.
`learner.checkpoints.store` decides when one is made and which are kept; here is what one is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.errors import CheckpointError
from cluster.fleet import Fleet
from cluster.io.files import replacing, sync, writing
from cluster.io.run_layout import CONFIG, MANIFEST, step_name, step_of
from learner.checkpoints.manifest import FileDigest, Manifest
from learner.checkpoints.resume import check_resume
from learner.config import RunConfig, parse_yaml
from learner.rollouts.prefetch import Pipeline
from learner.runs.config_file import verify_checksum
from learner.training.state_files import OPTIMIZER_FILE, STATE_FILE
from rewards.combine import Combiner

MOMENTS = "moments.msgpack"
REWARDS = "rewards.msgpack"
GROUPS = "groups.msgpack"
REQUIRED = (OPTIMIZER_FILE, STATE_FILE, MOMENTS, REWARDS)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Iterations done; training goes on with this one."""
        return self.manifest.step

    def read(self, name: str) -> bytes | None:
        """The content of one of its files; None if that one is not part of it."""
        return (self.path / name).read_bytes() if name in self.manifest.files else None


def capture(fleet: Fleet, combiner: Combiner, groups: bytes, config: str) -> dict[str, bytes]:
    """What the driver puts into a checkpoint beside the learner's files, by file name.

    Args:
        groups: that were drawn with older weights (`Pipeline.state`); a resumed run could not draw
            them again.
        config: the run's configuration file.
    """
    found = {
        MOMENTS: fleet.moments.state(),
        REWARDS: combiner.state(),
        CONFIG: config.encode(),
    }
    return {**found, GROUPS: groups} if groups else found


def complete(
    partial: Path,
    final: Path,
    content: Mapping[str, bytes],
    run: str,
    figures: Mapping[str, float],
    records: Mapping[str, str],
    check_owned: Callable[[], None] = lambda: None,
) -> Checkpoint:
    """Add the driver's files to what the learner wrote into `partial`, and make it `final`.

    Args:
        run, figures, records: for the manifest.
        check_owned: asked right before; what it raises leaves `final` as it is.

    Raises:
        CheckpointError: the learner's files did not arrive here.
        StorageError: there is no room.
    """
    if not any(partial.iterdir()):
        raise CheckpointError(
            f"the learner wrote a checkpoint, but nothing arrived in {partial}: run_dir must lie "
            "on storage that all nodes share"
        )
    with writing(final):
        for name, data in content.items():
            (partial / name).write_bytes(data)
            sync(partial / name)
        manifest = Manifest(
            step=step_of(final.name) or 0,
            files={file.name: FileDigest.of(file) for file in sorted(partial.iterdir())},
            run=run,
            config=hashlib.sha256(content[CONFIG]).hexdigest(),
            figures=figures,
            records=records,
        )
        (partial / MANIFEST).write_bytes(manifest.to_bytes())
        sync(partial / MANIFEST)
        sync(partial)
        check_owned()
        replace_directory(partial, final)
    return Checkpoint(final, manifest)


def replace_directory(partial: Path, final: Path) -> None:
    """Rename a whole directory; what was there under its name goes."""
    if final.exists():
        old = final.with_name(f".{partial.name}.replaced")
        os.replace(final, old)
        os.replace(partial, final)
        shutil.rmtree(old)
    else:
        os.replace(partial, final)
    sync(final.parent)


def remove(path: Path) -> None:
    """Remove a checkpoint; whoever reads a run beside it finds it whole or not at all."""
    gone = path.with_name(f".{path.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone)


def add_figures(
    checkpoint: Checkpoint, figures: Mapping[str, float], records: Mapping[str, str]
) -> Checkpoint:
    """Add the evaluation.s figures to a checkpoint's manifest, and its row to the records."""
    manifest = replace(checkpoint.manifest, figures=figures, records=records)
    file = checkpoint.path / MANIFEST
    with writing(file), replacing(file, durable=True) as partial:
        partial.write_bytes(manifest.to_bytes())
    return Checkpoint(checkpoint.path, manifest)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint's directory; its files are not looked at.

    Raises:
        CheckpointError: missing, damaged, or of another directory than this one.
    """
    try:
        _regular(path / MANIFEST)
        data = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path.name}: no readable manifest ({error})") from error
    manifest = Manifest.from_bytes(data, path.name)
    if step_name(manifest.step) != path.name.removeprefix(".").partition(".")[0]:
        raise CheckpointError(
            f"checkpoint {path.name}: its content is that of step {manifest.step}: somebody "
            "renamed the directory"
        )
    return manifest


def verify(path: Path, root: Path | None = None) -> Checkpoint:
    """Check every file of a checkpoint against its manifest.

    Args:
        root: a directory that it must lie in; None is its own.

    Raises:
        CheckpointError: names the first file that is missing or differs.
    """
    within = (root or path.parent).resolve()
    if not path.resolve().is_relative_to(within):
        raise CheckpointError(f"checkpoint {path.name}: a link that leads out of {within}")
    manifest = read_manifest(path)
    for name, expected in manifest.files.items():
        file = path / name
        try:
            _regular(file)
            whole = file.stat().st_size == expected.size and FileDigest.of(file) == expected
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {path.name}: {name} is missing or damaged ({error})"
            ) from error
        if not whole:
            raise CheckpointError(f"checkpoint {path.name}: {name} is missing or damaged")
    return Checkpoint(path, manifest)


def check_identity(checkpoint: Checkpoint, run: str, config: RunConfig) -> None:
    """Refuse a checkpoint of another run, or of another configuration than the run's.

    Raises:
        CheckpointError: says which.
    """
    name, manifest = checkpoint.path.name, checkpoint.manifest
    if manifest.run and run and manifest.run != run:
        raise CheckpointError(
            f"checkpoint {name}: it belongs to run {manifest.run}, this one is {run}"
        )
    data = checkpoint.read(CONFIG)
    if data is None:  # of format 2
        return
    if hashlib.sha256(data).hexdigest() != manifest.config:
        raise CheckpointError(f"checkpoint {name}: its {CONFIG} is not that of its manifest")
    try:
        saved = parse_yaml(verify_checksum(data, f"checkpoint {name}, {CONFIG}")[0], name)
        check_resume(saved, config)
    except ValueError as error:  # ConfigError is one
        raise CheckpointError(f"checkpoint {name}: of another configuration: {error}") from error


def restore(
    checkpoint: Checkpoint, fleet: Fleet, combiner: Combiner, pipeline: Pipeline | None = None
) -> None:
    """Bring learner, moments server, the rewards' anchors and the groups on their way to the
    checkpoint's state.

    Raises:
        CheckpointError: a part is missing, or does not fit.
    """
    fleet.learner.restore(checkpoint.path)
    fleet.moments.restore(_part(checkpoint, MOMENTS))
    combiner.restore(_part(checkpoint, REWARDS))
    groups = checkpoint.read(GROUPS)
    if pipeline is not None and groups is not None:
        pipeline.restore(groups)


def _part(checkpoint: Checkpoint, name: str) -> bytes:
    data = checkpoint.read(name)
    if data is None:
        raise CheckpointError(f"checkpoint {checkpoint.path.name}: it has no {name}")
    return data


def _regular(file: Path) -> None:
    """Refuse what is no file of its own: a link may lead anywhere.

    Raises:
        OSError: it is none, or not there.
    """
    if not stat.S_ISREG(file.lstat().st_mode):
        raise OSError(f"{file.name} is a link or no file")
