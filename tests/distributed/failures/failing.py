"""Roles that end or stop their own process, once for each reason: a file tells that they did.

The files lie in a folder of the test's own. A reason whose file is there already does not happen.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from actors.sampler import Sampler
from cluster.roles import FleetPlan
from learner.training.learner import Learner
from rewards.servers.moments_server import MomentsServer

AT = {
    "learner-start": 0,
    "sampler-killed": 2,
    "moments-killed": 4,
    "learner-step": 5,
    "moments-answer": 6,
    "learner-save": 7,
    "sampler-stopped": 9,
    "moments-stopped": 10,
    "learner-stopped": 11,
}
"""Iteration in which each happens."""
AFTER = {"server-killed": "moments-killed", "server-stopped": "sampler-stopped"}
"""Of reward servers, which do not know the iteration: what happened before."""
OTHER = "learner-first-save"
REASONS = (*AT, *AFTER, OTHER)
EVERY = 2
"""Iterations between checkpoints."""


def end_once(folder: Path, reason: str) -> None:
    """End (or stop) this process, if none has done so for this reason."""
    try:
        (folder / reason).touch(exist_ok=False)
    except FileExistsError:
        return
    stop = reason.endswith("stopped")
    os.kill(os.getpid(), signal.SIGSTOP if stop else signal.SIGKILL)


def spare(folder: Path, reasons: Iterable[str]) -> None:
    """Make a folder in which only the given reasons will happen."""
    folder.mkdir()
    for reason in {*REASONS} - {*reasons}:
        (folder / reason).touch()


class FailingLearner(Learner):
    folder: Path
    _now = -1

    def start(self, base_entropy: float) -> None:
        end_once(self.folder, "learner-start")  # there is no checkpoint yet
        super().start(base_entropy)

    def step(self, batch: Any) -> Any:
        self._now = batch.iteration
        return super().step(batch)

    def _accumulate(self, *args: Any) -> dict[str, float]:
        """Its gradients are there, its weights are those of before."""
        stats = super()._accumulate(*args)
        for reason in ("learner-step", "learner-stopped"):
            if self._now == AT[reason]:
                end_once(self.folder, reason)
        return stats

    def save(self, directory: Path | None, background: bool = False) -> None:
        assert directory is not None  # on the node of the run directory
        if self.version > AT["learner-save"]:
            (directory / "optimizer.safetensors").write_bytes(b"half of")
            end_once(self.folder, "learner-save")
        super().save(directory, background)

    def saved(self, wait_s: float = 0.0) -> bool:
        """Asked while a thread writes the first checkpoint: there is none to go back to."""
        end_once(self.folder, "learner-first-save")
        return super().saved(wait_s)


class FailingMoments(MomentsServer):
    folder: Path
    _now = -1

    def commit(self, iteration: int, *args: Any, **kwargs: Any) -> Any:
        self._now = iteration
        answer = super().commit(iteration, *args, **kwargs)
        if iteration == AT["moments-answer"]:  # the history holds it, nobody has the answer
            end_once(self.folder, "moments-answer")
        return answer

    def _accept(self, prepared: Any) -> Any:
        """The commit is computed, and the histories do not hold it yet."""
        for reason in ("moments-killed", "moments-stopped"):
            if self._now == AT[reason]:
                end_once(self.folder, reason)
        return super()._accept(prepared)


class FailingSampler(Sampler):
    """With a group in hand."""

    folder: Path

    def sample(self, requests: Any) -> Any:
        for reason in ("sampler-killed", "sampler-stopped"):
            if any((r.stream, r.iteration, r.group) == ("train", AT[reason], 1) for r in requests):
                end_once(self.folder, reason)
        return super().sample(requests)


ROLES = {
    "sampler": FailingSampler,
    "moments_server": FailingMoments,
    "learner": FailingLearner,
}


def failing(plan: FleetPlan, folder: Path) -> FleetPlan:
    """A plan whose samplers, moments server and learners fail as `folder` lets them."""
    changed = {}
    for field, kind in ROLES.items():
        doomed = type(kind.__name__, (kind,), {"folder": folder})  # reaches the workers by value
        changed[field] = dataclasses.replace(getattr(plan, field), factory=doomed)
    return dataclasses.replace(plan, **changed)


class Scorer:
    """Brightness, by a process that fails in the middle of a batch."""

    def __init__(self, device: str, folder: str) -> None:
        self._folder = Path(folder)

    def __call__(self, images: np.ndarray, conditions: Any) -> np.ndarray:
        for reason, before in AFTER.items():
            if (self._folder / before).exists():
                end_once(self._folder, reason)
        return np.array([image.mean() / 255 for image in images], np.float32)
