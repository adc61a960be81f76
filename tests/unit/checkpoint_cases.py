"""A fleet that saves a few bytes, and the store of its checkpoints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cluster.io.run_layout import step_name, steps_in
from learner.checkpoints.checkpoint import Checkpoint, verify
from learner.checkpoints.store import CheckpointStore
from learner.config import RunConfig
from learner.runs.run_dir import RunDirectory
from learner.training.file_exchange import FileExchange
from rewards.combine import Combiner, RewardTerm
from tests.small_run import small_config


class FakeFleet(FileExchange):
    """A learner and a moments server; the learner's files take `slow_s` to be written."""

    elsewhere = False
    """Whether it is on a node that does not see the run directory."""

    def sees(self, file: Path, content: bytes) -> bool:
        return not self.elsewhere and super().sees(file, content)

    def __init__(self, content: bytes = b"weights", slow_s: float = 0.0) -> None:
        self.learner = self.moments = self
        self.restored: dict[str, bytes] = {}
        self.content, self.slow_s = content, slow_s
        self.ready_at = 0.0
        self.error: Exception | None = None
        self.left = False  # whether somebody knows that the files are written

    def save(self, directory: Path | None, background: bool = False) -> None:
        assert (directory is None) == self.elsewhere
        directory = directory or self.exchange_folder()
        (directory / "policy.safetensors").write_bytes(self.content)
        if background:
            self.ready_at = time.monotonic() + self.slow_s
        else:
            time.sleep(self.slow_s)

    def saved(self, wait_s: float = 0.0) -> bool:
        if self.error is not None:
            raise self.error
        time.sleep(min(wait_s, max(self.ready_at - time.monotonic(), 0.0)))
        self.left = time.monotonic() >= self.ready_at
        return self.left

    def state(self) -> bytes:
        return b"moments"

    def restore(self, what: object) -> None:
        if isinstance(what, bytes):
            self.restored["moments"] = what
            return
        assert (what is None) == self.elsewhere
        folder = what if isinstance(what, Path) else self.exchange_folder()
        self.restored["learner"] = (folder / "policy.safetensors").read_bytes()


def combiner(step: int = 0) -> Combiner:
    made = Combiner({"clip": RewardTerm()})
    made.anchors = {"clip": 0.1 + step}
    return made


def run_config(**output: Any) -> RunConfig:
    evaluation = {"every": 1} if output.get("keep_best") else {}
    return small_config(output=output, evaluation=evaluation)


class Kept:
    """A run directory with its checkpoint store."""

    def __init__(self, path: Path, **output: Any) -> None:
        self.config = run_config(**{"checkpoint_every": 1, **output})
        fresh = not path.exists()
        self.run = RunDirectory.create(str(path), self.config) if fresh else RunDirectory(path)
        self.open()

    def open(self) -> CheckpointStore:
        """The store that a new process opens."""
        self.store = CheckpointStore(self.run, self.config)
        return self.store

    def save(self, step: int, fleet: FakeFleet | None = None, **given: Any) -> Checkpoint:
        """One that is complete when this returns."""
        fleet = fleet or FakeFleet(f"weights {step}".encode())
        self.store.save(step, fleet, combiner(step), **given)
        self.store.wait()
        return verify(self.run.checkpoints / step_name(step))

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.run.checkpoints.iterdir())

    @property
    def steps(self) -> list[int]:
        return steps_in(self.run.checkpoints)
