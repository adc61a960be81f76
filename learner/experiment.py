"""One run from start to end: evaluation, training with records, evaluation, report."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.control.control_actor import Progress
from cluster.control.discovery import resume_command
from cluster.errors import (
    CheckpointError,
    DataError,
    FleetError,
    LearnerLostError,
    LostWhileStoppingError,
    StopRequestedError,
)
from cluster.fleet import Fleet, InlineFleet
from cluster.io.run_layout import BASE_GALLERY, BEFORE_AFTER, CAPTIONS, GALLERY, step_name
from cluster.messages import MAIN_SPACE
from learner.capacity.storage import DiskWatch, checkpoint_bytes, free_bytes
from learner.checkpoints.checkpoint import Checkpoint, restore
from learner.checkpoints.store import CheckpointStore
from learner.config import RunConfig
from learner.data.conditions import ConditionsConfig
from learner.evaluation.in_run import RunEvaluations
from learner.evaluation.nearest import no_neighbours, write_nearest
from learner.loggers.logger import Loggers
from learner.loop import Iteration, failures, prepare, train
from learner.monitoring.console import RunConsole
from learner.monitoring.gallery import (
    gallery_sheet,
    sample_gallery,
    save_gallery,
    save_side_by_side,
    shown_note,
)
from learner.monitoring.guards import Guards, SlowServers
from learner.monitoring.metrics import Recorder, read_metrics
from learner.monitoring.timeline import RoleUse, bottleneck
from learner.report import conclude
from learner.rollouts.feature_space import RewardSpace, set_reference
from learner.rollouts.prefetch import Pipeline
from learner.runs import records
from learner.runs.run_dir import RunDirectory
from rewards.combine import Combiner

logger = logging.getLogger(__name__)

TUNED_GALLERY = "tuned.png"
NEAREST = "nearest.png"


class Experiment:
    """A run on a fleet: everything around the main loop."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDirectory,
        fleet: Fleet,
        console: RunConsole,
        should_stop: Callable[[], bool],
        from_step: int | None = None,
        last_checkpoint: Callable[[], bool] = lambda: True,
        loggers: Loggers | None = None,
    ) -> None:
        """
        Args:
            from_step: resume this checkpoint; None is the newest.
            last_checkpoint: whether a stop is to write a checkpoint.
            loggers: for metrics and images; the caller closes them. None by default.
        """
        self._requested = self._config = config
        self._run, self._fleet = run, fleet
        self._console, self._should_stop = console, should_stop
        self._from_step, self._last_checkpoint = from_step, last_checkpoint
        self._evaluations = RunEvaluations(config, run, fleet)
        self._spaces = dict[str, RewardSpace]()
        self._shares: list[RoleUse] = []
        self._checkpoints = CheckpointStore(run, config)
        self._loggers = loggers or Loggers()
        self._recorder: Recorder | None = None
        self._saved_step = 0
        self._progress = Progress()

    def run(self) -> bool:
        """The whole run; returns False if it was stopped before its end."""
        logger.info(f"run directory: {self._run.path}")
        try:
            ended = self._run_to_end()
        except BaseException:
            self._checkpoints.abandon()
            raise
        self._checkpoints.close()
        return ended

    def _run_to_end(self) -> bool:
        self._report_progress("before training")
        lost = ""
        try:
            done = self._train_with_recovery()
            if self._ended(done):
                return True
            stopped = f"after {done} of {self._config.iterations} iterations"
            lost = self._save_last_checkpoint(done if self._last_checkpoint() else None)
        except StopRequestedError as error:  # outside the main loop, which returns instead
            stopped = self._progress.stage
            lost = self._save_last_checkpoint(None)
            if isinstance(error, LostWhileStoppingError):
                lost = str(error)
        self._log_stopped(stopped, lost)
        return False

    def _train_with_recovery(self) -> int:
        """Train, evaluate and report; restart from the newest checkpoint when the learner is lost.
        Returns the number of iterations done."""
        while True:
            try:
                done = self._train(self._prepare_fleet())
                self._checkpoints.wait()  # the last one needs its learner
                if self._ended(done):
                    self._finish(done)
                return done
            except LearnerLostError as error:
                if self._should_stop():
                    raise LostWhileStoppingError(f"{error} while the run stopped") from error
                self._fleet.recover_learner(error)

    def _ended(self, done: int) -> bool:
        """Whether training is over, after its last iteration or before (`evaluation.patience`)."""
        return done == self._config.iterations or bool(self._evaluations.ended)

    def _prepare_fleet(self) -> int:
        """Set conditions, reference and state of the fleet; returns the first iteration."""
        if self._run.read_config() != self._requested:
            self._run.write_config(self._requested)
        conditions = self._fleet.serve_while(self._read_conditions)
        self._config = replace(self._requested, conditions=conditions)
        self._evaluations.config = self._config
        self._spaces = set_reference(self._config, self._fleet)
        return self.restore()

    def _read_conditions(self) -> ConditionsConfig:
        """The conditions, with captions encoded if need be; they are cached."""
        found = self._requested.conditions.encoded(self._run.path / CAPTIONS)
        found.conditions()
        return found

    def restore(self) -> int:
        """Restore the newest complete checkpoint, or start a new run if there is none; returns the
        next iteration. Also called within a run, after the learner was replaced.

        Raises:
            CheckpointError: there are checkpoints, and none is complete.
        """
        self._checkpoints.abandon()
        self._combiner = Combiner(self._config.rewards.terms())
        self._pipeline = Pipeline(self._config, self._fleet)
        step, self._from_step = self._from_step, None
        checkpoints = self._checkpoints
        found = self._fleet.serve_while(  # hashes every file
            lambda: checkpoints.newest() if step is None else checkpoints.at(step)
        )
        checkpoints.clear()
        self._saved_step = found.step if found else 0
        if found is None:
            return self._start_new()
        records.check(self._run, found.step, found.manifest.records)
        checkpoints.roll_back(found.step)
        restore(found, self._fleet, self._combiner, self._pipeline)
        self._fleet.refresh_moments()  # the decomposition of the moments is not in a checkpoint
        self._fleet.broadcast(found.step)
        logger.info(f"resumed from {found.path.name}")
        if found.step >= self._config.iterations:
            logger.info(
                f"note: all {self._config.iterations} iterations are done: only what follows them "
                "is done again; a larger --iterations trains on"
            )
        self._evaluate_if_missed(found)
        self._evaluations.resume(found.step)
        return found.step

    def _start_new(self) -> int:
        """Start a new run: statistics and evaluation of the base policy."""
        self._fleet.broadcast(0)
        base = prepare(self._config, self._fleet, self._spaces)
        for space, each in self._config.rewards.spaces().items():
            if source := each.term.seed_from:
                logger.info(
                    f"{each.option}: the history starts from {source}, moments of "
                    f"{base.images[space]:.0f} images"
                )
        further = "".join(
            f", {fid:.3f} in {space!r}" for space, fid in base.fids.items() if space != MAIN_SPACE
        )
        logger.info(
            f"base policy: FID {base.fids[MAIN_SPACE]:.3f} in the reward's features{further}, "
            f"entropy {base.entropy:.3f} nats a token"
        )
        if some := shown_note(self._config):
            logger.info(f"note: galleries show {some}; --output.gallery-rows names others")
        self._gallery(BASE_GALLERY, 0)
        self._evaluations.base()
        return 0

    def _train(self, first: int) -> int:
        """The main loop, with records, guards and checkpoints; returns the iterations done."""
        config, run = self._config, self._run
        rollouts = config.output.rollouts
        recorder = Recorder(run, first, rollouts=rollouts, loggers=self._loggers)
        self._recorder = recorder
        rows = read_metrics(run.metrics)
        self._console.start(first, rows)
        self._progress = replace(self._progress, done=first)
        self._report_progress("training")
        one_policy = config.sampling.learned() == config.sampling
        guards = Guards(config.guards, config.groups_per_iteration, one_policy)
        guards.replay(rows)
        slow_servers = SlowServers(config.guards.patience)
        disk = DiskWatch(run.checkpoints, checkpoint_bytes(config))
        disk()
        failure_logged = False

        def after(done: Iteration) -> None:
            nonlocal failure_logged
            failed, images = failures(group.scores for group in done.groups)
            if failed and not failure_logged:
                failure_logged = True
                text = f"{len(failed)} of {images}; the first: {failed[0]}"
                logger.warning(f"note: images without a score leave the iteration ({text})")
            found = guards(done.metrics)
            metrics = done.metrics | found.metrics
            self._fleet.serve_while(
                lambda: recorder.record(metrics, done.groups, done.advantages, done.spans)
            )
            for line in (*done.warnings, *found.notes, *slow_servers(done.spans)):
                logger.warning(f"note: {line}")
            self._console.roles(recorder.usage.shares())
            self._console.update(metrics)
            self._report_progress("training", metrics)
            found.enforce()
            disk()
            self._save_what_is_due(done.metrics["iteration"])

        try:
            if self._evaluations.ended:  # a resumed run that had ended early
                return first
            return train(
                config,
                self._fleet,
                self._spaces,
                first,
                after,
                lambda: self._should_stop() or bool(self._evaluations.ended),
                run.path.name,
                self._combiner,
                self._pipeline,
            )
        finally:
            self._console.stop()
            recorder.close()
            self._shares = recorder.usage.shares()

    def _save_what_is_due(self, done: int) -> None:
        """Evaluation, checkpoint and gallery after `done` iterations, each if due."""
        output, figures = self._config.output, dict[str, float]()
        self._checkpoints.poll()
        with contextlib.suppress(StopRequestedError):  # the main loop ends right after this
            if self._evaluations.due(done) and self._recorder is not None:
                figures = self._evaluations.current()
                self._recorder.record_evaluation(done, figures)
                self._console.evaluated(done, figures)
        if figures or done % output.checkpoint_every == 0 or done == self._config.iterations:
            self._checkpoint(done, figures)
        if output.gallery_every and done % output.gallery_every == 0:
            with contextlib.suppress(StopRequestedError):
                self._gallery(f"{step_name(done)}.png", done)
        if figures:
            found = self._evaluations.conclude(done)
            if found.stop:
                self._checkpoints.wait()  # the evaluation's own is kept
            found.enforce()

    def _evaluate_if_missed(self, found: Checkpoint) -> None:
        """Repeat the evaluation of a checkpoint's step that a stop interrupted."""
        self._evaluations.forget_tuned()
        if self._evaluations.due(found.step) and not found.manifest.figures:
            self._checkpoints.add_figures(found, self._evaluations.repeat(found.step))

    def _checkpoint(self, done: int, figures: dict[str, float] | None = None) -> None:
        if self._saved_step == done:
            return
        groups = self._pipeline.state()
        self._checkpoints.save(done, self._fleet, self._combiner, groups, figures)
        self._saved_step = done
        if done == self._config.iterations:  # before the last evaluation, which may be long
            self._checkpoints.wait()

    def _save_last_checkpoint(self, done: int | None) -> str:
        """Complete the pending checkpoint of a stopped run, after saving one more if `done` is
        given; returns the error if a worker that is needed for it is lost."""
        try:
            if done is not None:
                self._checkpoint(done)
            self._checkpoints.wait()
        except (FleetError, LostWhileStoppingError) as error:
            self._checkpoints.abandon()
            return str(error)
        return ""

    def _log_stopped(self, stopped: str, lost: str) -> None:
        text = f"stopped {stopped}"
        if lost:
            steps = self._checkpoints.steps()
            newest = f"the newest is {step_name(steps[-1])}" if steps else "there is none"
            text += f", without a checkpoint of where it was ({lost}); {newest}"
        if self._run.has_results():
            text += f"; go on with\n  {resume_command(self._run.path)}"
        (logger.warning if lost else logger.info)(text)

    def _gallery(self, name: str, done: int) -> None:
        """Write a contact sheet of the current policy after `done` iterations, with rewards."""
        gallery = sample_gallery(self._config, self._fleet)
        file = self._run.gallery / name
        self._run.check_owned()
        sheet = gallery_sheet(self._config, gallery)
        self._fleet.serve_while(lambda: save_gallery(gallery, sheet, done, file))
        self._loggers.images(GALLERY, sheet.pixels, done)

    def _nearest(self, file: Path, done: int) -> None:
        """Write the real images that are nearest to some of the tuned policy's."""
        config = self._config
        real = self._evaluations.real() if config.evaluation.num_images else None
        if why := no_neighbours(config, real):
            logger.info(f"note: no {file.name} of the nearest real images: {why}")
            return
        assert real is not None
        self._run.check_owned()
        try:
            write_nearest(config, self._fleet, real, done, file)
        except (DataError, CheckpointError, OSError) as error:  # the run is finished without it
            logger.warning(f"note: no {file.name} of the nearest real images: {error}")

    def _report_progress(self, stage: str, metrics: Mapping[str, Any] | None = None) -> None:
        """Update the progress that `cluster.status` shows."""
        if metrics:
            done, pace = metrics["iteration"], self._console.seconds_per_iteration
            self._progress = replace(self._progress, done=done, seconds=pace, metrics=metrics)
        self._progress = replace(
            self._progress,
            stage=stage,
            directory=str(self._run.path),
            iterations=self._config.iterations,
            free_bytes=free_bytes(self._run.path),
        )
        self._fleet.report_progress(self._progress)

    def _finish(self, done: int) -> None:
        """After `done` iterations of training: last evaluation, galleries, report."""
        self._report_progress("after training, in the last evaluation")
        self._evaluations.tuned(done)
        gallery = self._run.gallery
        self._gallery(TUNED_GALLERY, done)
        self._nearest(gallery / NEAREST, done)
        sheets = {"base policy": gallery / BASE_GALLERY, "tuned policy": gallery / TUNED_GALLERY}
        # a run directory that was restored from a URL has no images of the base policy
        there = {name: file for name, file in sheets.items() if file.is_file()}
        save_side_by_side(there, gallery / BEFORE_AFTER)
        written = self._fleet.serve_while(lambda: conclude(self._run, "finished"))
        files = (self._run.report, self._run.config, self._run.evaluation, gallery / BEFORE_AFTER)
        self._loggers.finish(self._evaluations.table, files)
        if self._evaluations.table:
            self._console.table(self._evaluations.table)
        if self._shares:
            inline = isinstance(self._fleet, InlineFleet)
            advice = bottleneck(self._shares, self._config.max_staleness, inline=inline)
            self._console.timeline(self._shares, advice)
        report = f"report:  {self._run.report}\n" if written else ""
        logger.info(f"gallery: {gallery / BEFORE_AFTER}\n{report}everything is in {self._run.path}")
