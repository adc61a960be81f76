"""One run from beginning to end: exam, training with its records, exam, report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cluster.control import Progress
from cluster.fleet import Fleet, InlineFleet, StopRequestedError
from cluster.messages import ScoredGroup
from learner import evaluate
from learner.checkpoint import newest_checkpoint, restore, save_checkpoint
from learner.config import RunConfig
from learner.distribution import RewardSpace, set_reference
from learner.footprint import DiskWatch, checkpoint_bytes, free_bytes
from learner.gallery import sample_gallery, save_sheet, save_side_by_side
from learner.guards import Guards, SlowServers
from learner.loop import Iteration, failures, prepare, train
from learner.metrics import Recorder, read_metrics
from learner.pipeline import Pipeline
from learner.progress import RunConsole
from learner.report import write_report
from learner.rundir import BEFORE_AFTER, RunDirectory
from learner.timeline import RoleUse, bottleneck
from rewards.combine import Combiner

BASE_GALLERY = "base.png"
TUNED_GALLERY = "tuned.png"


def first_failure(groups: Sequence[ScoredGroup]) -> str:
    """How many images of an iteration were not scored, and why the first was not; or nothing."""
    failed, images = failures(groups)
    return f"{len(failed)} of {images}; the first: {failed[0]}" if failed else ""


class Experiment:
    """A run on a fleet: what happens around the main loop."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDirectory,
        fleet: Fleet,
        console: RunConsole,
        should_stop: Callable[[], bool],
        last_checkpoint: Callable[[], bool] = lambda: True,
    ) -> None:
        """last_checkpoint: whether a run that was asked to stop writes one where it ends."""
        self._last_checkpoint = last_checkpoint
        self._config, self._run, self._fleet = config, run, fleet
        self._console, self._should_stop = console, should_stop
        self._rows = run.read_evaluation()
        self._real: dict[str, np.ndarray] | None = None
        self._space = RewardSpace()
        self._combiner = Combiner(config.rewards.terms())
        self._shares: list[RoleUse] = []
        self._pipeline = Pipeline(config, fleet)
        self._newest = Progress()

    def run(self) -> bool:
        """Everything; False if the run was asked to stop before its end."""
        self._console.say(f"run directory: {self._run.path}")
        stage = "before training"
        self._tell(stage)
        try:
            first = self._begin()
            stage = "after training, in the last exam"
            done = self._train(first)
            if done == self._config.iterations:
                self._finish()
                return True
            if self._last_checkpoint():
                self._checkpoint(done)
            stopped = f"after {done} of {self._config.iterations} iterations"
        except StopRequestedError:  # training itself ends without it
            stopped = stage
        self._console.say(
            f"stopped {stopped}; go on with\n"
            f"  python -m learner.run --resume --run-dir {self._run.path}"
        )
        return False

    def _train(self, first: int) -> int:
        """The main loop, with its records; returns how many iterations are done."""
        config, console, run = self._config, self._console, self._run
        recorder = Recorder(run, first, rollouts=config.output.rollouts)
        console.start(first)
        self._newest = replace(self._newest, done=first)
        self._tell("training")

        told = False
        one_policy = config.sampling.learned() == config.sampling
        guards = Guards(config.guards, config.groups_per_iteration, one_policy)
        guards.replay(read_metrics(run.metrics))
        slow = SlowServers(config.guards.patience)
        room = DiskWatch(run.checkpoints, checkpoint_bytes(config), console.say)
        room()

        def after(done: Iteration) -> None:
            nonlocal told
            if not told and (fault := first_failure(done.groups)):
                told = True
                console.say(f"note: images without a score leave the iteration ({fault})")
            found = guards(done.row)
            row = done.row | found.metrics
            recorder.record(row, done.groups, done.advantages, done.spans)
            for line in (*done.advice, *found.notes, *slow(done.spans)):
                console.say(f"note: {line}")
            console.update(row)
            self._tell("training", row)
            found.enforce()
            room()
            self._keep(done.row["iteration"] + 1)

        try:
            return train(
                config,
                self._fleet,
                self._space,
                first,
                after,
                self._should_stop,
                run.path.name,
                self._combiner,
                self._pipeline,
            )
        finally:
            recorder.close()
            self._shares = recorder.usage.shares()

    def _begin(self) -> int:
        """Bring the fleet to where training starts; returns the first iteration."""
        if self._run.read_config() != self._config:
            self._run.write_config(self._config)
        self._space = set_reference(self._config, self._fleet)
        if any(self._run.checkpoints.glob("step_*")):
            checkpoint = newest_checkpoint(self._run.checkpoints, self._console.say)
            restore(checkpoint, self._fleet, self._combiner, self._pipeline)
            self._fleet.broadcast()
            self._console.say(f"resumed from {checkpoint.path.name}")
            return checkpoint.step
        self._fleet.broadcast()
        base = prepare(self._config, self._fleet, self._space)
        self._console.say(
            f"base policy: FID {base['fid']:.3f} in the reward's features, "
            f"entropy {base['entropy']:.3f} nats a token"
        )
        save_sheet(sample_gallery(self._config, self._fleet), self._run.gallery / BASE_GALLERY)
        for row in evaluate.base_rows(self._config):
            self._examine(row)
        return 0

    def _keep(self, done: int) -> None:
        """Checkpoint and gallery when they are due."""
        output = self._config.output
        if done % output.checkpoint_every == 0 or done == self._config.iterations:
            self._checkpoint(done)
        if output.gallery_every and done % output.gallery_every == 0:
            with contextlib.suppress(StopRequestedError):  # the main loop ends right after this
                sheet = sample_gallery(self._config, self._fleet)
                save_sheet(sheet, self._run.gallery / f"step_{done:06d}.png")

    def _checkpoint(self, done: int) -> None:
        save_checkpoint(
            self._run.checkpoints,
            done,
            self._fleet,
            self._combiner,
            self._config.output.keep_checkpoints,
            self._pipeline.state(),
        )

    def _examine(self, row: evaluate.Row) -> None:
        """Fill one row of the table, once."""
        if not self._config.evaluation.num_images or row.name in self._rows:
            return
        self._console.say(f"examining: {row.name}")
        if self._real is None:
            self._real = evaluate.real_features(self._config, self._fleet)
        self._rows[row.name] = evaluate.examine(self._config, self._fleet, row.spec, self._real)
        self._run.write_evaluation(self._rows)

    def _tell(self, stage: str, row: Mapping[str, Any] | None = None) -> None:
        """How far the run is, to whoever asks the fleet."""
        if row:
            done, pace = row["iteration"] + 1, self._console.seconds_per_iteration
            self._newest = replace(self._newest, done=done, seconds=pace, metrics=row)
        self._newest = replace(
            self._newest,
            stage=stage,
            directory=str(self._run.path),
            iterations=self._config.iterations,
            free_bytes=free_bytes(self._run.path),
        )
        self._fleet.tell(self._newest)

    def _finish(self) -> None:
        """After the last iteration: the tuned policy's exam, galleries, report."""
        self._tell("after training")
        self._rows.pop(evaluate.TUNED, None)  # of an earlier, shorter run
        self._examine(evaluate.tuned_row(self._config))
        sheet = sample_gallery(self._config, self._fleet)
        gallery = self._run.gallery
        save_sheet(sheet, gallery / TUNED_GALLERY)
        save_side_by_side(
            {"base policy": gallery / BASE_GALLERY, "tuned policy": gallery / TUNED_GALLERY},
            gallery / BEFORE_AFTER,
        )
        if self._rows:
            self._console.table(self._rows)
        if self._shares:
            inline = isinstance(self._fleet, InlineFleet)
            advice = bottleneck(self._shares, self._config.max_staleness, inline=inline)
            self._console.timeline(self._shares, advice)
        write_report(self._run, self._config, self._rows)
        self._console.say(
            f"gallery: {gallery / BEFORE_AFTER}\nreport:  {self._run.report}\n"
            f"everything is in {self._run.path}"
        )
