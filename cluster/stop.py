"""End a running job at its next safe point, and say how to go on with it.

python -m cluster.stop --checkpoint       with a checkpoint of where it is, as Ctrl-C does
python -m cluster.stop --run NAME         without: what came after its newest one is lost
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program.start import run_command

    sys.exit(run_command("cluster.stop"))

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from cluster.control.control_actor import (
    RunConnection,
    RunEndedError,
    RunSelection,
    connect_to_run,
    control_answer,
)
from cluster.control.discovery import RunLocation, find_run, left_behind, was_killed
from cluster.errors import FleetError
from cluster.io.run_layout import DISCOVERY_FILE
from cluster.program.console import exit_status
from cluster.program.invocation import command_of

POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Arguments(RunSelection):
    """End a running job at its next safe point."""

    checkpoint: bool = False
    """Have it write a checkpoint first."""
    timeout_s: float = 600.0
    """Longest wait for the end, seconds: an iteration, and a checkpoint."""


def stop(run: RunConnection, checkpoint: bool, timeout_s: float) -> Path | None:
    """Ask a run to end, and wait until it has heard.

    Returns:
        Its directory, if that is known.

    Raises:
        FleetError: it did not hear in time.
    """
    try:
        number = control_answer(run.control.stop.remote(checkpoint))
        deadline = time.monotonic() + timeout_s
        while True:
            status = control_answer(run.control.status.remote())
            directory = run.place.directory or _there(status.progress.directory)
            if status.answered >= number:
                return directory
            if time.monotonic() > deadline:
                raise FleetError(
                    f"the run {run.name} did not answer within {timeout_s:g} s: it reads requests "
                    "while it waits for workers; is it stuck? (kill its process, and go on with "
                    "--resume)"
                )
            time.sleep(POLL_S)
    except RunEndedError:
        return run.place.directory


def _there(directory: str) -> Path | None:
    """A directory that the run told of, if this machine sees it, too."""
    return Path(directory) if directory and Path(directory).is_dir() else None


def await_end(ended: Callable[[], bool], timeout_s: float) -> None:
    """Wait until a run has ended.

    Raises:
        FleetError: it did not in time.
    """
    deadline = time.monotonic() + timeout_s
    while not ended():
        if time.monotonic() > deadline:
            raise FleetError(
                f"the run has heard, but did not end within {timeout_s:g} s: an iteration may take "
                "longer (--timeout-s sets the bound)"
            )
        time.sleep(POLL_S)


def gone(place: RunLocation, directory: Path) -> bool:
    """Whether the program that drove a run has ended: its file is gone, or its process."""
    if place.here and place.pid:
        return was_killed(place)
    return not (directory / DISCOVERY_FILE).is_file()


def answers_no_more(control: Any) -> bool:
    try:
        control_answer(control.status.remote())
    except RunEndedError:
        return True
    return False


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    asked = tyro.cli(Arguments, args=arguments, prog=command_of("cluster.stop"))
    deadline = time.monotonic() + asked.timeout_s

    def work() -> None:
        with connect_to_run(find_run(asked.run, asked.address)) as run:
            directory = stop(run, asked.checkpoint, asked.timeout_s)
            print(f"run {run.name}: stopping at the next safe point", flush=True)
            if directory is None:  # on a cluster that stays, whose run directory is elsewhere
                await_end(lambda: answers_no_more(run.control), deadline - time.monotonic())
        # Else without a connection: a private Ray ends with its run, which Ray takes for a crash.
        if directory is not None:
            await_end(lambda: gone(run.place, directory), deadline - time.monotonic())
            kept = left_behind(directory)
            newest = kept["checkpoint"] or "none: it will begin anew"
            print(f"stopped; newest checkpoint: {newest}\ngo on with\n  {kept['resume']}")
        else:
            print("stopped; what it kept is in its run directory, where --resume goes on")

    return exit_status(work)
