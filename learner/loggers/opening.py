"""Opens the loggers of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from learner.loggers.logger import Loggers
from learner.runs.run_dir import RunDirectory


@contextmanager
def open_loggers(run: RunDirectory) -> Iterator[Loggers]:
    """The loggers of a run, completed at the end of the block."""
    from learner.loggers.tensorboard import TensorBoard  # its import takes a second

    loggers = Loggers({"TensorBoard": TensorBoard(run.tensorboard)})
    try:
        yield loggers
    finally:
        loggers.close()
