"""A checkpoint: the directory `step_000050` (after 50 iterations), complete or not there at all.

    file                   content                                               written by
    policy.safetensors     policy weights, fp32, LoRA adapters merged in         LearnerPolicy
    adapters.safetensors   the adapters alone (with LoRA)                        LearnerPolicy
    optimizer.safetensors  AdamW's state, by parameter name                      PolicyAdamW
    learner.msgpack        policy version, entropy controller, base entropy,     LearnerState
                           skipped updates
    moments.msgpack        history of the distribution reward, the older one     MomentsServer
                           that is decomposed and the batches since, key and
                           result of the last commit
    rewards.msgpack        anchors of the rewards' normalisation                 Combiner
    groups.msgpack         groups sampled with older weights, if max_staleness   Pipeline
    config.yaml            configuration with the run's identity                 RunDirectory
    manifest.msgpack       step, run, size and SHA-256 of every file above,      Manifest
                           evaluation results, digests of the run's records

It is written under another name, the manifest last, and then renamed. Nothing is unpickled.
`learner.checkpoints.store` decides when one is written and which are kept.
"""

from __future__ import annotations

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
from cluster.roles import LearnerRole
from learner.checkpoints.exchange import send
from learner.checkpoints.manifest import FileDigest, Manifest
from learner.checkpoints.resume import check_resume
from learner.config import RunConfig, parse_yaml
from learner.rollouts.prefetch import Pipeline
from learner.runs.config_file import verify_checksum
from rewards.combine import Combiner

MOMENTS = "moments.msgpack"
REWARDS = "rewards.msgpack"
GROUPS = "groups.msgpack"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Iterations done; training continues with this one."""
        return self.manifest.step

    def read(self, name: str) -> bytes | None:
        """The content of one of its files; None if the manifest does not name it."""
        return (self.path / name).read_bytes() if name in self.manifest.files else None


def capture(fleet: Fleet, combiner: Combiner, groups: bytes, config: str) -> dict[str, bytes]:
    """Content of the driver's files, by name. The learner writes its own.

    Args:
        groups: of `Pipeline.state`; sampled with older weights, they cannot be sampled again.
        config: text of config.yaml.
    """
    found = {
        MOMENTS: fleet.moments.state(),
        REWARDS: combiner.state(),
        CONFIG: config.encode(),
    }
    return {**found, GROUPS: groups} if groups else found


def restore(
    checkpoint: Checkpoint, fleet: Fleet, combiner: Combiner, pipeline: Pipeline | None = None
) -> None:
    """Load a checkpoint into learner, moments server, combiner and pipeline.

    Raises:
        CheckpointError: a part is missing, or does not fit.
    """
    _restore_learner(checkpoint, fleet.learner)
    fleet.moments.restore(_required(checkpoint, MOMENTS))
    combiner.restore(_required(checkpoint, REWARDS))
    groups = checkpoint.read(GROUPS)
    if pipeline is not None and groups is not None:
        pipeline.restore(groups)


def _restore_learner(checkpoint: Checkpoint, learner: LearnerRole) -> None:
    manifest = checkpoint.path / MANIFEST  # of no other checkpoint
    if learner.sees(manifest, manifest.read_bytes()):
        learner.restore(checkpoint.path)
        return
    ours = (MOMENTS, REWARDS, GROUPS, CONFIG)
    send(learner, [checkpoint.path / n for n in checkpoint.manifest.files if n not in ours])
    learner.restore(None)
    learner.drop_files()


def complete(
    partial: Path,
    final: Path,
    content: Mapping[str, bytes],
    run: str,
    figures: Mapping[str, float],
    records: Mapping[str, str],
    check_owned: Callable[[], None] = lambda: None,
) -> Checkpoint:
    """Add the driver's files and the manifest to the learner's files, and rename to `final`.

    Args:
        partial: directory with the learner's files.
        content: driver's files, of `capture`.
        run, figures, records: for the manifest.
        check_owned: called right before the rename; if it raises, `final` stays as it is.

    Raises:
        CheckpointError: the learner's files did not arrive here.
        StorageError: no space left.
    """
    if not any(partial.iterdir()):
        raise CheckpointError(
            f"the learner wrote a checkpoint, but nothing arrived in {partial}: does the storage "
            "show one node what another one writes?"
        )
    with writing(final):
        for name, data in content.items():
            (partial / name).write_bytes(data)
            sync(partial / name)
        manifest = Manifest(
            step=step_of(final.name) or 0,
            files={file.name: FileDigest.of(file) for file in sorted(partial.iterdir())},
            run=run,
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
    """Rename a directory, replacing what has its new name."""
    if final.exists():
        old = final.with_name(f".{partial.name}.replaced")
        os.replace(final, old)
        os.replace(partial, final)
        shutil.rmtree(old)
    else:
        os.replace(partial, final)
    sync(final.parent)


def remove(path: Path) -> None:
    """Remove a checkpoint; other readers see it complete or not at all."""
    gone = path.with_name(f".{path.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone)


def add_figures(
    checkpoint: Checkpoint, figures: Mapping[str, float], records: Mapping[str, str]
) -> Checkpoint:
    """Write the results of a later evaluation, and new digests, into the manifest."""
    manifest = replace(checkpoint.manifest, figures=figures, records=records)
    file = checkpoint.path / MANIFEST
    with writing(file), replacing(file, durable=True) as partial:
        partial.write_bytes(manifest.to_bytes())
    return Checkpoint(checkpoint.path, manifest)


def read_manifest(path: Path) -> Manifest:
    """The manifest in a checkpoint's directory; other files are not read.

    Raises:
        CheckpointError: missing, damaged, or of another directory than this one.
    """
    try:
        _check_regular(path / MANIFEST)
        data = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path.name}: no readable manifest ({error})") from error
    manifest = Manifest.from_bytes(data, path.name)
    if step_name(manifest.step) != path.name.removeprefix(".").partition(".")[0]:
        raise CheckpointError(
            f"checkpoint {path.name}: its content is that of step {manifest.step}: the directory "
            "was renamed"
        )
    return manifest


def verify(path: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: names the first file that is missing or differs.
    """
    if not path.resolve().is_relative_to(path.parent.resolve()):
        raise CheckpointError(
            f"checkpoint {path.name}: a link that leads out of {path.parent.resolve()}"
        )
    manifest = read_manifest(path)
    for name, expected in manifest.files.items():
        file, why = path / name, ""
        try:
            _check_regular(file)
            intact = file.stat().st_size == expected.size and FileDigest.of(file) == expected
        except OSError as error:
            intact, why = False, f" ({error})"
        if not intact:
            raise CheckpointError(f"checkpoint {path.name}: {name} is missing or damaged{why}")
    return Checkpoint(path, manifest)


def check_identity(checkpoint: Checkpoint, run: str, config: RunConfig) -> None:
    """Refuse a checkpoint of another run, or of another configuration than the run's.

    Raises:
        CheckpointError: says which.
    """
    name, theirs = checkpoint.path.name, checkpoint.manifest.run
    if theirs != run:
        raise CheckpointError(f"checkpoint {name}: it belongs to run {theirs}, this one is {run}")
    try:
        text, _ = verify_checksum(_required(checkpoint, CONFIG), f"checkpoint {name}, {CONFIG}")
        check_resume(parse_yaml(text, name), config)
    except ValueError as error:  # ConfigError is one
        raise CheckpointError(f"checkpoint {name}: of another configuration: {error}") from error


def _required(checkpoint: Checkpoint, name: str) -> bytes:
    data = checkpoint.read(name)
    if data is None:
        raise CheckpointError(f"checkpoint {checkpoint.path.name}: it has no {name}")
    return data


def _check_regular(file: Path) -> None:
    """Refuse links, which may lead anywhere.

    Raises:
        OSError: a link, a directory, or not there.
    """
    if not stat.S_ISREG(file.lstat().st_mode):
        raise OSError(f"{file.name} is a link or no file")
