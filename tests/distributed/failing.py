"""Roles that end their own process at a chosen moment, once: a file tells that they did.

The file lies in the test's own directory, and is named after what died.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np

from actors.sampler import Sampler
from cluster.roles import FleetPlan
from learner.training.learner import Learner
from rewards.servers.moments_server import MomentsServer

ROLES = {"sampler": "sampler", "moments": "moments_server", "learner": "learner"}
ITERATION = 2
"""In which they die."""
EVERY = 2
"""Iterations between checkpoints."""


def die_once(folder: Path, what: str, number: signal.Signals = signal.SIGKILL) -> None:
    """End (or stop) this process, if none has done so for this reason."""
    file = folder / what
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), number)


class StepKilledLearner(Learner):
    """Dies in the middle of a step: its gradients are there, its weights are those of before."""

    folder: Path
    _now = -1

    def step(self, batch: Any) -> Any:
        self._now = batch.iteration
        return super().step(batch)

    def _accumulate(self, *args: Any) -> dict[str, float]:
        stats = super()._accumulate(*args)
        if self._now == ITERATION:
            die_once(self.folder, "learner-step")
        return stats


class StartKilledLearner(Learner):
    """Dies before there is a checkpoint."""

    folder: Path

    def start(self, base_entropy: float) -> None:
        die_once(self.folder, "learner-start")
        super().start(base_entropy)


class SaveKilledLearner(Learner):
    """Dies in the middle of its second checkpoint: one of its files is there."""

    folder: Path

    def save(self, directory: Path, background: bool = False) -> None:
        if self.version > ITERATION:
            (directory / "optimizer.safetensors").write_bytes(b"half of")
            die_once(self.folder, "learner-save")
        super().save(directory, background)


class FirstSaveKilledLearner(Learner):
    """Dies while a thread writes its first checkpoint: there is none to go back to."""

    folder: Path

    def saved(self, wait_s: float = 0.0) -> bool:
        die_once(self.folder, "learner-save")
        return super().saved(wait_s)


class StoppedLearner(StepKilledLearner):
    """Stands still in the middle of a step, as if its machine had."""

    def _accumulate(self, *args: Any) -> dict[str, float]:
        if self._now == ITERATION:
            die_once(self.folder, "learner-stopped", signal.SIGSTOP)
        return Learner._accumulate(self, *args)


class CommitKilledMoments(MomentsServer):
    """Dies when it has received a commit and judged it, and before the history holds it."""

    folder: Path
    _now = -1

    def commit(self, iteration: int, *args: Any, **kwargs: Any) -> Any:
        self._now = iteration
        return super().commit(iteration, *args, **kwargs)

    def _warnings(self, *answer: Any) -> tuple[str, ...]:
        if self._now == ITERATION:
            die_once(self.folder, "moments-commit")
        return super()._warnings(*answer)


class StoppedMoments(CommitKilledMoments):
    """Stands still with a commit in hand."""

    def _warnings(self, *answer: Any) -> tuple[str, ...]:
        if self._now == ITERATION:
            die_once(self.folder, "moments-stopped", signal.SIGSTOP)
        return MomentsServer._warnings(self, *answer)


class AnswerKilledMoments(CommitKilledMoments):
    """Dies when the history holds a commit, and before anybody has the answer."""

    def _warnings(self, *answer: Any) -> tuple[str, ...]:
        return MomentsServer._warnings(self, *answer)

    def commit(self, iteration: int, *args: Any, **kwargs: Any) -> Any:
        answer = super().commit(iteration, *args, **kwargs)
        if iteration == ITERATION:
            die_once(self.folder, "moments-answer")
        return answer


class BusySampler(Sampler):
    """Dies, or stands still, with a group in hand."""

    folder: Path
    number = signal.SIGKILL

    def sample(self, requests: Any) -> Any:
        if any((r.stream, r.iteration, r.group) == ("train", ITERATION, 1) for r in requests):
            die_once(self.folder, f"sampler-{self.number.name}", self.number)
        return super().sample(requests)


class StoppedSampler(BusySampler):
    number = signal.SIGSTOP


def with_role(plan: FleetPlan, role: str, kind: type, folder: Path) -> FleetPlan:
    """A plan in which one role is of another kind."""
    field = ROLES[role]
    doomed = type(kind.__name__, (kind,), {"folder": folder})  # reaches the workers by value
    changed = dataclasses.replace(getattr(plan, field), factory=doomed)
    return dataclasses.replace(plan, **{field: changed})


class Scorer:
    """Brightness, by a process that dies, or stands still, in the middle of a batch."""

    def __init__(self, device: str, folder: str, end: str) -> None:
        self._folder, self._number, self._batches = Path(folder), signal.Signals[end], 0

    def __call__(self, images: np.ndarray, conditions: Any) -> np.ndarray:
        self._batches += 1
        if self._batches > 12:  # the moments' seed images, and an iteration or two
            die_once(self._folder, f"server-{self._number.name}", self._number)
        return np.array([image.mean() / 255 for image in images], np.float32)
