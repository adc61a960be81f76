"""When a checkpoint is made, how it is written beside the learner's work, and which are kept.

At most one is pending: the learner writes its files from a copy, then a thread here adds the
rest, hashes, renames and uploads. The main loop asks between iterations (`poll`); failures are
raised there.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial as bound
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
from learner.checkpoints.manifest import Manifest
from learner.checkpoints.remote import RemoteCheckpoints
from learner.checkpoints.retention import best_step, retained_steps
from learner.config import RunConfig
from learner.runs import records
from learner.runs.run_dir import RunDirectory
from rewards.combine import Combiner

logger = logging.getLogger(__name__)

WAIT_S = 0.5  # at a time, for the learner


@dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint that the learner writes."""

    step: int
    partial: Path
    learner: LearnerRole
    content: Mapping[str, bytes]
    figures: Mapping[str, float]
    iterations: range
    """What was recorded since the one before."""


class CheckpointStore:
    """The checkpoints of one run, here and at `output.checkpoint_url`.

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
        self._unsent: TesseraError | None = None
        self._saved = 0  # the step of the newest

    def clear(self) -> None:
        """Remove what earlier processes left half written. For the owner of the directory, once it
        is sure to go on with the run."""
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
        """Make one. With `output.background` it is complete later: see `poll` and `wait`.

        Args:
            groups: see `checkpoint.capture`.
            figures: of the evaluation at this step.

        Raises:
            CheckpointError: the learner's files did not arrive here.
            StorageError: there is no room.
        """
        self.wait()
        self._run.check_owned()
        partial = self._root / f".{step_name(step)}.{secrets.token_hex(4)}"
        with writing(partial):
            partial.mkdir(parents=True)
        content = capture(fleet, combiner, groups, self._run.config_with_checksum())
        iterations = range(self._saved, step)
        self._pending = PendingCheckpoint(
            step, partial, fleet.learner, content, figures or {}, iterations
        )
        try:
            fleet.learner.save(partial, self._config.output.background)
        except StorageError as error:
            raise self._storage_error(error) from error
        if not self._config.output.background:
            self.wait()

    def poll(self) -> None:
        """Let the checkpoint in the making go on, without waiting for it.

        Raises:
            CheckpointError, StorageError: it could not be made.
        """
        self._advance(0.0)

    def wait(self) -> None:
        """Until nothing is pending, `timeout_s` at most.

        Raises:
            CheckpointError, StorageError: it could not be made, or not in time.
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
        """Forget one that the learner still writes (it died); one that needs it no more becomes
        complete. For whoever starts over within a run, or ends it by an error."""
        try:
            if self._task is not None:
                self.wait()
        except TesseraError as error:
            logger.warning("note: %s", error)
        self._discard_pending()

    def close(self) -> None:
        """Wait for everything, uploads too.

        Raises:
            CheckpointError, StorageError: the last one could not be made, or not uploaded.
        """
        self.wait()
        if self._unsent is not None:
            raise self._unsent

    def steps(self) -> list[int]:
        """Of the checkpoints there are, in both places, oldest first; not verified."""
        there = self._remote.steps() if self._remote else []
        return sorted({*steps_in(self._root), *there})

    def newest(self) -> Checkpoint | None:
        """The newest complete one of this run, brought here if it is elsewhere; None if there are
        none at all.

        Raises:
            CheckpointError: there are some, and none is complete.
        """
        steps = self.steps()
        for step in reversed(steps):
            found = self._find(step)
            if found is not None:
                self._saved = step
                return found
        if not steps:
            return None
        raise CheckpointError(
            f"no complete checkpoint under {self._root}: the reasons are above. To begin anew, "
            "start a new run"
        )

    def at(self, step: int) -> Checkpoint:
        """The one of a step.

        Raises:
            ConfigError: there is none, or it is not complete; lists those there are.
        """
        steps = self.steps()
        if step in steps and (found := self._find(step)) is not None:
            self._saved = step
            return found
        there = ", ".join(str(each) for each in steps if each != step) or "none"
        raise ConfigError(f"--from-step {step}: no complete checkpoint of it; there are: {there}")

    def roll_back(self, step: int) -> None:
        """Set later checkpoints aside, newest first: whatever happens meanwhile, what is left is a
        run that can be resumed."""
        self._run.check_owned()
        later = [each for each in self.steps() if each > step]
        if not later:
            return
        folder = f"{ARCHIVED}{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        aside = self._root / folder
        for each in reversed(later):
            if self._remote:
                self._remote.archive(each, folder)
            if (here := self._root / step_name(each)).exists():
                aside.mkdir(exist_ok=True)
                here.rename(aside / here.name)
        for record in (self._run.metrics, self._run.evaluations):
            if record.is_file() and aside.is_dir():
                shutil.copy(record, aside)
        self._point_to_best()
        numbers = ", ".join(map(str, later))
        logger.info("later checkpoints are set aside in %s: %s", folder, numbers)

    def add_figures(self, checkpoint: Checkpoint, figures: Mapping[str, float]) -> None:
        """Add the figures of an evaluation that was taken later; waits for what is pending."""
        self.wait()
        self._run.check_owned()
        digests = records.digests(self._run, checkpoint.step)
        self._publish(add_figures(checkpoint, figures, digests))

    def _find(self, step: int) -> Checkpoint | None:
        here = self._root / step_name(step)
        if here.exists():
            try:
                return self._check_identity(verify(here))
            except CheckpointError as error:
                logger.warning("skipping %s", error)
        if self._remote is None or step not in self._remote.steps():
            return None
        partial = self._root / f".{step_name(step)}.{secrets.token_hex(4)}"
        try:
            self._remote.download(step, partial)
            self._check_identity(verify(partial))
            replace_directory(partial, here)
            logger.info("fetched %s from %s", step_name(step), self._remote.url)
            return verify(here)
        except CheckpointError as error:
            logger.warning("skipping %s (at %s)", error, self._remote.url)
            return None
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _check_identity(self, found: Checkpoint) -> Checkpoint:
        check_identity(found, self._identity, self._config)
        return found

    def _advance(self, wait_s: float) -> bool:
        """One step of what is in the making; whether nothing is."""
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
                what = f"completing checkpoint {step_name(pending.step)}"
                self._task = Background(what, bound(self._complete, pending))
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
        self._saved = pending.step
        self._publish(found)

    def _publish(self, checkpoint: Checkpoint) -> None:
        """After one is whole: let old ones go, and bring it to the other place."""
        self._run.check_owned()
        best = self._point_to_best()
        output = self._config.output
        staying = retained_steps(steps_in(self._root), output, best)
        for step in steps_in(self._root):
            if step not in staying:
                remove(self._root / step_name(step))
        sync(self._root)
        if self._remote is None:
            return
        try:
            self._remote.upload(checkpoint.path)
            for step in staying - {checkpoint.step}:  # that could not be uploaded when made
                if self._manifest_of(step):
                    self._remote.upload(self._root / step_name(step))
            self._remote.keep(retained_steps(self._remote.steps(), output, best))
            self._unsent = None
        except (CheckpointError, StorageError) as error:
            self._unsent = error
            logger.warning("note: %s; it is whole here, and goes there with the next one", error)

    def _point_to_best(self) -> int | None:
        """Write best.json, where a best one is wanted; returns its step."""
        figure = self._config.output.keep_best
        if not figure:
            return None
        figures_of = {step: self._figures(step) for step in steps_in(self._root)}
        best = best_step(figure, figures_of)
        file = self._run.best
        if best is None:
            file.unlink(missing_ok=True)
            return None
        place = f"{self._root.name}/{step_name(best)}"
        said = {
            "figure": figure,
            "value": figures_of[best][figure],
            "step": best,
            "checkpoint": place,
        }
        with writing(file), replacing(file, durable=True) as partial:
            partial.write_text(dumps(said, indent=2) + "\n")
        return best

    def _manifest_of(self, step: int) -> Manifest | None:
        """The manifest of a checkpoint here; None of a damaged one, which nothing is done with:
        whoever wants to resume from it is told."""
        try:
            return read_manifest(self._root / step_name(step))
        except CheckpointError:
            return None

    def _figures(self, step: int) -> Mapping[str, float]:
        manifest = self._manifest_of(step)
        return manifest.figures if manifest else {}

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
