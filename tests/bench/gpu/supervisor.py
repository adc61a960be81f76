"""Runs checks in a worker process, one after another; one that fails, hangs or ends the process
does not stop those after it.

A worker imports torch once and runs check after check. It tells what it finds as lines of JSON
through a pipe. When it ends early, or a check takes longer than its limit and the worker is killed,
a new one goes on with the next check. Imports nothing beyond the standard library.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.bench.gpu.checks import Check

ROOT = Path(__file__).parents[3]
WORKER = ("-m", "tests.bench.gpu.worker")
START_S = 120.0  # longest start of a worker: imports, CUDA's context
TAIL = 12  # lines of a dead worker's output that are shown

Event = dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """How a check ended."""

    check: Check
    status: str
    """done, failed or skipped"""
    reason: str = ""
    seconds: float = 0.0


class StartError(Exception):
    """The first worker did not start: no check can run here."""


class Supervisor:
    """See the module.

    Args:
        options: of the worker, as JSON has them.
        deadline: on `time.monotonic`'s clock; what has not ended by then is skipped.
        tell: called with every event that is no check's start or end.
        program: arguments of Python that start a worker.
    """

    def __init__(
        self,
        options: Event,
        deadline: float,
        tell: Callable[[Event], None],
        program: Sequence[str] = WORKER,
    ) -> None:
        self._options, self._deadline, self._tell = options, deadline, tell
        self._program, self._started = program, False

    def run(self, checks: Sequence[Check]) -> Iterator[Ended]:
        """How each check ended, in order, as they end.

        Raises:
            StartError: with the worker's last words.
        """
        left = list(checks)
        while left:
            first, done = left[0], 0
            apart = [index for index, check in enumerate(left) if check.alone] or [len(left)]
            together = 1 if first.alone else apart[0]
            if time.monotonic() < self._deadline:
                for ended in self._run_worker(left[:together]):
                    done += 1
                    yield ended
            if time.monotonic() >= self._deadline:
                for check in left[done:]:
                    yield Ended(check, "skipped", "no time was left for it")
                return
            left = left[done:]

    def _run_worker(self, checks: Sequence[Check]) -> Iterator[Ended]:
        """The checks that one worker ends; one of them at least."""
        with (
            tempfile.TemporaryFile("w+") as output,
            _Worker(self._program, self._options, checks, output) as it,
        ):
            running, began = None, time.monotonic()
            limit = min(began + START_S, self._deadline)
            while True:
                event = it.next_event(limit)
                if event is None:
                    break
                self._started = True
                if event["kind"] == "start":
                    running, began = checks[event["index"]], time.monotonic()
                    limit = min(began + running.limit_s, self._deadline)
                elif event["kind"] == "end":
                    assert running is not None
                    spent = time.monotonic() - began
                    yield Ended(running, event["status"], event["reason"], spent)
                    running, began = None, time.monotonic()
                    limit = min(began + START_S, self._deadline)
                    if checks[event["index"]] is checks[-1]:
                        return
                else:
                    self._tell(event)
            spent = time.monotonic() - began
            late = time.monotonic() >= limit
            cut = late and limit >= self._deadline
            reason = it.obituary(spent, late=late)
        if not self._started:
            raise StartError(reason)
        if running is None and it.ended_checks == 0:
            running = checks[0]  # this worker did not start
        if running is not None and cut:
            yield Ended(running, "skipped", "no time was left to finish it", spent)
        elif running is not None:
            yield Ended(running, "failed", reason, spent)


class _Worker:
    """A process in a group of its own, and the pipe of its events."""

    def __init__(
        self, program: Sequence[str], options: Event, checks: Sequence[Check], output: IO[str]
    ) -> None:
        self._output, self._buffer, self.ended_checks = output, b"", 0
        self._read, write = os.pipe()
        names = [check.name for check in checks]
        given = json.dumps({**options, "checks": names, "events": write})
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        if options["tiny"]:  # several threads would wait for each other by spinning
            environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        if options.get("device") == "cpu":
            environment["TRITON_INTERPRET"] = "1"
        for check in checks:
            environment |= check.environment
        self._process = subprocess.Popen(
            [sys.executable, *program, given],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(write,),
            env=environment,
            start_new_session=True,
        )
        os.close(write)

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._read)

    def next_event(self, until: float) -> Event | None:
        """The next event; None if the worker ended, or said nothing until then."""
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(until - time.monotonic(), 0))
            part = os.read(self._read, 1 << 16) if ready else b""
            if not part:
                return None
            self._buffer += part
        line, self._buffer = self._buffer.split(b"\n", 1)
        event = json.loads(line)
        self.ended_checks += event["kind"] == "end"
        return event

    def obituary(self, spent: float, *, late: bool) -> str:
        """Why the worker said nothing more."""
        if late:
            return f"took longer than {spent:.0f} s and was stopped"
        status = self._process.wait()
        self._output.seek(0)
        last = "\n".join(self._output.read().splitlines()[-TAIL:])
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"the process ended ({how}); its last words:\n{last}"
