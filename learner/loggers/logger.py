"""What a logger is, and the loggers of a run together.

The run's own files are complete without any logger, so none of them can end or hold up a run: each
works in a thread of its own, behind a bounded queue, and its first failure is reported. What a tool
lacks of earlier starts is given to it again from the run's files.
"""

from __future__ import annotations

import json
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from cluster.errors import DataError
from cluster.io.files import replacing, writing
from cluster.io.run_layout import BASE_GALLERY, GALLERY, LOGGERS, step_of
from cluster.io.strict_json import dumps
from learner.runs.records import ITERATION, STEP, read_records
from learner.runs.run_dir import RunDirectory

logger = logging.getLogger(__name__)

Values = Mapping[str, float]
Newest = Mapping[str, int]
"""Kind of record -> the newest step of it that a tool has."""
SCALARS, EVALUATION, HISTOGRAMS = "scalars", "evaluation", "histograms"
"""Kinds of records, besides images."""
EVALUATED = "evaluation/step"
"""Name under which tools that can be asked keep the step of the newest evaluation."""
MOST_WAITING = 1000
"""Records that a slow tool may be behind; further ones are left out."""
ATTEMPTS, AGAIN_S = 10, 30.0
"""How often a record is given to a tool that fails, and the seconds between."""
CLOSE_S, STOP_S = 60.0, 10.0
"""Longest wait for all tools together after the last iteration, and after an error or a stop,
seconds."""


@dataclass(frozen=True)
class Record:
    """What a step gives to every logger."""

    kind: str
    """Of one kind, a tool gets each step once."""
    step: int
    write: Callable[[Logger], None]


class Logger(Protocol):
    """A tool that shows curves and images. After `begin`, one thread calls it, with steps that do
    not decrease."""

    @property
    def run_id(self) -> str:
        """The tool's name for the run, by which it can be continued; empty where it needs none."""
        ...

    def begin(self, next_step: int) -> Newest | None:
        """Continue a run, or begin one, whose next iteration has this number.

        Returns:
            What the tool has; None: the same steps as the run's files.
        """
        ...

    def scalars(self, values: Values, step: int) -> None:
        """Finite metrics of an iteration, by name."""
        ...

    def evaluation(self, figures: Values, step: int) -> None:
        """Finite figures of an evaluation, shown as evaluation/NAME."""
        ...

    def histograms(self, values: Mapping[str, np.ndarray], step: int) -> None: ...

    def images(self, name: str, image: np.ndarray, step: int) -> None:
        """One image (H, W, 3) uint8."""
        ...

    def finish(self, table: Mapping[str, Values], files: Sequence[Path]) -> None:
        """The table of evaluations, and the files with the results, of a run that has ended."""
        ...

    def close(self, *, failed: bool) -> None:
        """
        Args:
            failed: the run ended before its last iteration, by an error or a stop.
        """
        ...


class Loggers:
    """The loggers of a run; what they are given reaches each of them, once they have begun.

    Args:
        tools: name of the tool, for messages -> logger.
    """

    def __init__(self, tools: Mapping[str, Logger] | None = None) -> None:
        self._followers = [_Follower(name, tool) for name, tool in (tools or {}).items()]
        self._finished = False

    def begin(self, run: RunDirectory, next_step: int) -> None:
        """Start, once the run's files hold the steps before `next_step` alone. Only the first call
        counts: a learner that is lost within the run repeats steps that the tools have."""
        if not self._followers or self._followers[0].begun:
            return
        ids = {each.name: each.tool.run_id for each in self._followers if each.tool.run_id}
        if ids:
            _keep_runs(run, ids)
        stored = _stored(run, next_step)
        for each in self._followers:
            each.begin(next_step, stored)

    def scalars(self, values: Mapping[str, float | None], step: int) -> None:
        """Metrics of an iteration; those that are not finite are left out."""
        self._give(_scalars(values, step))

    def evaluation(self, figures: Mapping[str, float | None], step: int) -> None:
        """Figures of an evaluation after `step` iterations; as `scalars`."""
        self._give(_evaluation(figures, step))

    def histograms(self, values: Mapping[str, np.ndarray], step: int) -> None:
        self._give(Record(HISTOGRAMS, step, lambda tool: tool.histograms(values, step)))

    def images(self, name: str, image: np.ndarray, step: int) -> None:
        """One image (H, W, 3) uint8 after `step` iterations."""
        self._give(Record(kind_of(name), step, lambda tool: tool.images(name, image, step)))

    def finish(self, table: Mapping[str, Values], files: Sequence[Path]) -> None:
        """The table of evaluations, and the files with the results, of a run that has ended."""
        self._finished = True
        there = [file for file in files if file.is_file()]
        rows = {policy: _finite(figures) for policy, figures in table.items()}
        for each in self._followers:
            each.call(lambda tool: tool.finish(rows, there))

    def close(self) -> None:
        """Complete the records, of all tools at once; one that takes too long loses the rest."""
        longest = CLOSE_S if self._finished else STOP_S
        until = time.monotonic() + longest
        for each in self._followers:
            each.close(failed=not self._finished)
        for each in self._followers:
            each.wait(until, longest)

    def _give(self, record: Record) -> None:
        for each in self._followers:
            each.give(record)


def kept_runs(run: RunDirectory) -> dict[str, str]:
    """Name of a tool -> its run that has the records of this one, as earlier starts kept it.

    Raises:
        DataError: the file is damaged.
    """
    file = run.path / LOGGERS
    if not file.is_file():
        return {}
    try:
        return {str(name): str(kept) for name, kept in json.loads(file.read_text()).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{file}: expected names of runs of loggers ({error}): remove it, and loggers begin "
            "new ones"
        ) from error


def _keep_runs(run: RunDirectory, ids: Mapping[str, str]) -> None:
    run.check_owned()
    file = run.path / LOGGERS
    with writing(file), replacing(file) as partial:
        partial.write_text(dumps({**kept_runs(run), **ids}, indent=2) + "\n")


def kind_of(image: str) -> str:
    """The kind of records of an image's name."""
    return f"images/{image}"


class _Follower:
    """Gives records to a logger, in order, in a thread of its own."""

    def __init__(self, name: str, tool: Logger) -> None:
        self.name, self.tool = name, tool
        self._newest: dict[str, int] = {}
        self._queue: queue.Queue[Callable[[Logger], None] | None] = queue.Queue()
        self._most = MOST_WAITING
        self._thread = threading.Thread(target=self._work, name=f"logger {name}", daemon=True)
        self._early: list[Record] = []
        self._closing = threading.Event()
        self._warned = False
        self.begun = False
        self._useless = False
        """Whether the tool could not begin."""

    def begin(self, next_step: int, stored: Sequence[Record]) -> None:
        """Start the thread, and give the tool what it lacks of the run's earlier records."""
        self.begun = True
        try:
            has = self.tool.begin(next_step)
        except Exception as error:  # of any tool, of any kind: the run goes on
            self._useless = True
            self._warn(f"{type(error).__name__}: {error}")
            has = {}
        if has is None:
            has = {record.kind: record.step for record in stored}
        self._newest = dict(has)
        missing = [record for record in stored if self._is_new(record)]
        self._most = MOST_WAITING + len(missing)
        self._thread.start()
        for record in missing:
            self.call(record.write)
        for record in self._early:
            self.give(record)
        self._early.clear()

    def give(self, record: Record) -> None:
        """Write a record, unless the tool has it: the steps between the checkpoint and the end of
        an interrupted run are done twice."""
        if not self.begun:
            self._early.append(record)
        elif self._is_new(record):
            self.call(record.write)

    def call(self, write: Callable[[Logger], None]) -> None:
        if self._useless:
            return
        if self._queue.qsize() >= self._most:
            self._warn(f"it is {MOST_WAITING} records behind")
        else:
            self._queue.put(write)

    def close(self, *, failed: bool) -> None:
        """Let the thread end after the records that wait; `wait` waits for it."""
        if not self.begun:
            self.begun = True
            self._thread.start()
        self._closing.set()
        self._queue.put(lambda tool: tool.close(failed=failed))
        self._queue.put(None)

    def wait(self, until: float, longest: float) -> None:
        """
        Args:
            until: of `time.monotonic`.
            longest: seconds from `close` to then.
        """
        self._thread.join(max(until - time.monotonic(), 0.0))
        if self._thread.is_alive():
            self._warn(f"it did not take the last records within {longest:.0f} s")

    def _is_new(self, record: Record) -> bool:
        if record.step <= self._newest.get(record.kind, -1):
            return False
        self._newest[record.kind] = record.step
        return True

    def _work(self) -> None:
        while (write := self._queue.get()) is not None:
            for _ in range(ATTEMPTS):  # a server may be away for minutes
                try:
                    write(self.tool)
                    break
                except Exception as error:  # of any tool, of any kind: the run goes on
                    self._warn(f"{type(error).__name__}: {error}")
                if self._closing.wait(AGAIN_S):
                    break

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                f"note: {self.name} lacks a part of the records, the run goes on, and its own "
                f"files are complete: {why}"
            )


def _finite(values: Mapping[str, float | None]) -> dict[str, float]:
    return {k: v for k, v in values.items() if v is not None and math.isfinite(v)}


def _scalars(values: Mapping[str, float | None], step: int) -> Record:
    finite = _finite(values)
    return Record(SCALARS, step, lambda tool: tool.scalars(finite, step))


def _evaluation(figures: Mapping[str, float | None], step: int) -> Record:
    finite = _finite(figures)
    return Record(EVALUATION, step, lambda tool: tool.evaluation(finite, step))


def _stored(run: RunDirectory, next_step: int) -> list[Record]:
    """Records in the run's files, in order of their steps, all before `next_step`."""
    found = [_scalars(row, row[ITERATION]) for row in read_records(run.metrics, ITERATION)]
    evaluations = read_records(run.evaluations, STEP)
    found += [_evaluation({k: v for k, v in e.items() if k != STEP}, e[STEP]) for e in evaluations]
    for file in run.gallery.glob("*.png"):
        step = 0 if file.name == BASE_GALLERY else step_of(file.stem)
        if step is not None and step < next_step:
            found.append(_gallery(file, step))
    return sorted(found, key=lambda record: record.step)


def _gallery(file: Path, step: int) -> Record:
    def write(tool: Logger) -> None:
        with Image.open(file) as image:
            tool.images(GALLERY, np.asarray(image.convert("RGB")), step)

    return Record(kind_of(GALLERY), step, write)
