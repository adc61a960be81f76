"""The checkpoint store of a run: when a checkpoint is written, which are kept, which is resumed.

At most one is pending: the learner writes its files from a copy, then a thread here adds the
driver's files and the manifest, renames, and uploads. The main loop calls `poll` between
iterations; failures are raised there.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.errors import CheckpointError, ConfigError, StorageError, TesseraError
from cluster.fleet import Fleet
from cluster.io.background import Background
from cluster.io.files import replacing, sync, writing
from cluster.io.run_layout import ARCHIVED, step_name, steps_in
from cluster.io.strict_json import dumps
from cluster.roles import LearnerRole
from cluster.scheduling.listening import Listening
from learner.checkpoints.checkpoint import (
    Checkpoint,
    add_figures,
    capture,
    check_identity,
    complete,
    read_manifest,
    remove,
    replace_directory,
    verify,
)
from learner.checkpoints.exchange import fetch, shares
from learner.checkpoints.manifest import Manifest
from learner.checkpoints.remote import RemoteCheckpoints
from learner.config import RunConfig
from learner.output import OutputConfig, best_step
from learner.runs import records
from learner.runs.run_dir import RunDirectory
from rewards.combine import Combiner

logger = logging.getLogger(__name__)

WAIT_S = 0.5  # of one wait for the learner


@dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint that the learner is writing."""

    step: int
    partial: Path
    learner: LearnerRole
    content: Mapping[str, bytes]
    figures: Mapping[str, float]
    iterations: range
    """Iterations recorded since the checkpoint before."""
    shared: bool = True
    """Whether the learner sees the run directory."""


class CheckpointStore:
    """The checkpoints of one run, in its directory and at `output.checkpoint_url`.

    Raises:
        ConfigError: the URL cannot be opened, or holds another run's.
    """

    def __init__(self, run: RunDirectory, config: RunConfig) -> None:
        self._run, self._root, self._config = run, run.checkpoints, config
        self._identity = run.identity
        url = config.output.checkpoint_url
        self._remote = RemoteCheckpoints(url, self._identity, run.check_remote) if url else None
        self._pending: PendingCheckpoint | None = None
        self._task: Background | None = None
        self._upload_error: TesseraError | None = None
        self._newest_step = 0
        self._noted = False

    def clear(self) -> None:
        """Remove incomplete checkpoints of earlier processes; only for the directory's owner."""
        self._run.check_owned()
        for leftover in (*self._root.glob(".step_*"), *self._root.glob("..step_*")):
            shutil.rmtree(leftover)

    def save(
        self,
        step: int,
        fleet: Fleet,
        combiner: Combiner,
        groups: bytes = b"",
        figures: Mapping[str, float] | None = None,
    ) -> None:
        """Write a checkpoint. With `output.background` it is complete later: see `poll`, `wait`.

        Args:
            groups: see `checkpoint.capture`.
            figures: of the evaluation at this step.

        Raises:
            CheckpointError: the learner's files did not arrive here.
            StorageError: no space left.
        """
        self.wait()
        self._run.check_owned()
        partial = self._partial(step)
        with writing(partial):
            partial.mkdir(parents=True)
        content = capture(fleet, combiner, groups, self._run.config_with_checksum())
        self._pending = PendingCheckpoint(
            step, partial, fleet.learner, content, figures or {}, range(self._newest_step, step)
        )
        try:
            shared = self._shares(fleet.learner, partial)
            self._pending = replace(self._pending, shared=shared)
            fleet.learner.save(partial if shared else None, self._config.output.background)
        except StorageError as error:
            raise self._storage_error(error) from error
        if not self._config.output.background:
            self.wait()

    def poll(self) -> None:
        """Advance the pending checkpoint, without waiting.

        Raises:
            CheckpointError, StorageError: it could not be written.
        """
        self._advance(0.0)

    def wait(self) -> None:
        """Wait until no checkpoint is pending, `timeout_s` at most.

        Raises:
            CheckpointError, StorageError: it could not be written, or not in time.
        """
        listening, began = Listening(2 * WAIT_S), time.monotonic()
        while not self._advance(WAIT_S):
            listening.look()
            if listening.silence(began) > self._config.timeout_s:
                what = self._task.what if self._task else "the learner's files"
                raise CheckpointError(
                    f"{what}: not done within {self._config.timeout_s:g} s: a faster storage, a "
                    "larger output.checkpoint_every or --timeout-s helps"
                )

    def abandon(self) -> None:
        """Drop the pending checkpoint if it still needs the learner, which may be lost; else
        complete it. Called before a restart within a run, and when a run fails."""
        try:
            if self._task is not None:
                self.wait()
        except TesseraError as error:
            logger.warning("note: %s", error)
        self._discard_pending()

    def close(self) -> None:
        """Wait for the pending checkpoint and its upload.

        Raises:
            CheckpointError, StorageError: the last one could not be written, or not uploaded.
        """
        self.wait()
        if self._upload_error is not None:
            raise self._upload_error

    def steps(self) -> list[int]:
        """Steps of all checkpoints, local and remote, oldest first; not verified."""
        remote = self._remote.steps() if self._remote else []
        return sorted({*steps_in(self._root), *remote})

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint of this run, downloaded if need be; None if there are no
        checkpoints.

        Raises:
            CheckpointError: there are some, and none is complete.
        """
        steps = self.steps()
        for step in reversed(steps):
            if (found := self._find(step)) is not None:
                return found
        if not steps:
            return None
        raise CheckpointError(
            f"no complete checkpoint under {self._root}: the reasons are above. To begin anew, "
            "start a new run"
        )

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step.

        Raises:
            ConfigError: there is none, or it is not complete; lists the others.
        """
        steps = self.steps()
        if step in steps and (found := self._find(step)) is not None:
            return found
        others = ", ".join(str(each) for each in steps if each != step) or "none"
        raise ConfigError(f"--from-step {step}: no complete checkpoint of it; there are: {others}")

    def roll_back(self, step: int) -> None:
        """Archive later checkpoints, newest first, so that an interruption leaves a run that can be
        resumed."""
        self._run.check_owned()
        later = [each for each in self.steps() if each > step]
        if not later:
            return
        name = f"{ARCHIVED}{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        archive = self._root / name
        for each in reversed(later):
            if self._remote:
                self._remote.archive(each, name)
            if (local := self._root / step_name(each)).exists():
                archive.mkdir(exist_ok=True)
                local.rename(archive / local.name)
        for record in (self._run.metrics, self._run.evaluations):
            if record.is_file() and archive.is_dir():
                shutil.copy(record, archive)
        self._point_to_best()
        logger.info("later checkpoints are archived in %s: %s", name, ", ".join(map(str, later)))

    def add_figures(self, checkpoint: Checkpoint, figures: Mapping[str, float]) -> None:
        """Add the figures of a later evaluation to a checkpoint."""
        self.wait()
        self._run.check_owned()
        digests = records.digests(self._run, checkpoint.step)
        self._publish(add_figures(checkpoint, figures, digests))

    def _shares(self, learner: LearnerRole, partial: Path) -> bool:
        """Whether the learner sees the run directory; the first time that it does not, a note."""
        shared = shares(learner, partial)
        if not shared and not self._noted:
            lost = "" if self._remote else ", and no copy is kept elsewhere (output.checkpoint_url)"
            logger.warning(
                f"note: the learner is on a node that does not see {self._root}: its files of "
                f"checkpoints come here through Ray{lost}"
            )
            self._noted = True
        return shared

    def _partial(self, step: int) -> Path:
        return self._root / f".{step_name(step)}.{secrets.token_hex(4)}"

    def _find(self, step: int) -> Checkpoint | None:
        """The checkpoint of a step, verified; None, with a warning, if no copy is intact."""
        local = self._root / step_name(step)
        if local.exists():
            try:
                return self._verified(local)
            except CheckpointError as error:
                logger.warning("skipping %s", error)
        if self._remote is None or step not in self._remote.steps():
            return None
        partial = self._partial(step)
        try:
            self._remote.download(step, partial)
            found = self._verified(partial)
            replace_directory(partial, local)
            logger.info("fetched %s from %s", step_name(step), self._remote.url)
            return Checkpoint(local, found.manifest)
        except CheckpointError as error:
            logger.warning("skipping %s (at %s)", error, self._remote.url)
            return None
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _verified(self, path: Path) -> Checkpoint:
        found = verify(path)
        check_identity(found, self._identity, self._config)
        self._newest_step = found.step
        return found

    def _advance(self, wait_s: float) -> bool:
        """Advance the pending checkpoint; returns whether none is pending any more."""
        pending = self._pending
        try:
            if self._task is not None:
                if not self._task.done(wait_s):
                    return False
                self._pending = self._task = None
                return True
            if pending is None:
                return True
            if pending.learner.saved(wait_s):
                if not pending.shared:
                    fetch(pending.learner, pending.partial)
                what = f"completing checkpoint {step_name(pending.step)}"
                self._task = Background(what, lambda: self._complete(pending))
            return False
        except StorageError as error:
            raise self._storage_error(error) from error
        except CheckpointError:
            self._discard_pending()
            raise

    def _complete(self, pending: PendingCheckpoint) -> None:
        rollouts = self._config.output.rollouts
        records.keep(self._run, pending.iterations, rollouts=rollouts)
        found = complete(
            pending.partial,
            self._root / step_name(pending.step),
            pending.content,
            self._identity,
            pending.figures,
            records.digests(self._run, pending.step),
            self._run.check_owned,
        )
        self._newest_step = pending.step
        self._publish(found)

    def _publish(self, checkpoint: Checkpoint) -> None:
        """After one is complete: update best.json, remove old ones, upload."""
        self._run.check_owned()
        best = self._point_to_best()
        output = self._config.output
        kept = retained_steps(steps_in(self._root), output, best)
        for step in steps_in(self._root):
            if step not in kept:
                remove(self._root / step_name(step))
        sync(self._root)
        if self._remote is None:
            return
        try:
            self._remote.upload(checkpoint.path)
            for step in kept - {checkpoint.step}:  # whose own upload failed
                if self._manifest_of(step):
                    self._remote.upload(self._root / step_name(step))
            self._remote.keep(retained_steps(self._remote.steps(), output, best))
            self._upload_error = None
        except (CheckpointError, StorageError) as error:
            self._upload_error = error
            logger.warning("note: %s; it is whole here, and goes there with the next one", error)

    def _point_to_best(self) -> int | None:
        """Write best.json, if `output.keep_best` is set; returns its step."""
        figure, file = self._config.output.keep_best, self._run.best
        if not figure:
            return None
        figures = {
            step: manifest.figures
            for step in steps_in(self._root)
            if (manifest := self._manifest_of(step))
        }
        best = best_step(figure, figures)
        if best is None:
            file.unlink(missing_ok=True)
            return None
        place = f"{self._root.name}/{step_name(best)}"
        content = {"figure": figure, "value": figures[best][figure]}
        content |= {"step": best, "checkpoint": place}
        with writing(file), replacing(file, durable=True) as partial:
            partial.write_text(dumps(content, indent=2) + "\n")
        return best

    def _manifest_of(self, step: int) -> Manifest | None:
        """The manifest of a local checkpoint; None if it is damaged, which resuming reports."""
        try:
            return read_manifest(self._root / step_name(step))
        except CheckpointError:
            return None

    def _storage_error(self, error: StorageError) -> StorageError:
        step = self._pending.step if self._pending else 0
        self._discard_pending()
        before = [each for each in steps_in(self._root) if each != step]
        whole = f"{step_name(before[-1])} is whole" if before else "there is none before it"
        return StorageError(f"checkpoint {step_name(step)} was not kept ({whole}). {error}")

    def _discard_pending(self) -> None:
        if self._pending is not None:
            shutil.rmtree(self._pending.partial, ignore_errors=True)
        self._pending = self._task = None


def retained_steps(steps: Iterable[int], output: OutputConfig, best: int | None) -> set[int]:
    """Which of the steps are kept: the newest, every `keep_every`-th, the best."""
    ordered = sorted(steps)
    kept = {*ordered[-output.keep_checkpoints :]}
    kept |= {step for step in ordered if output.keep_every and step % output.keep_every == 0}
    return kept | ({best} & {*ordered} if best is not None else set())
