"""End a running job at its next safe point, and print the command that resumes it.

python -m cluster.stop --checkpoint       with a checkpoint first, as Ctrl-C does
python -m cluster.stop --run NAME         without: iterations after its newest one are lost
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from cluster.program.start import run_command

    sys.exit(run_command("cluster.stop"))

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from cluster.control.control_actor import POLL_S, RunConnection, RunEndedError, RunSelection
from cluster.control.discovery import RunLocation, left_behind, was_killed
from cluster.errors import FleetError
from cluster.io.run_layout import DISCOVERY_FILE
from cluster.program.console import exit_status
from cluster.program.invocation import command_of


@dataclass(frozen=True, kw_only=True)
class Arguments(RunSelection):
    """End a running job at its next safe point."""

    checkpoint: bool = False
    """Write a checkpoint first."""
    timeout_s: float = 600.0
    """Longest wait for the end, seconds: an iteration, and a checkpoint."""


def stop(run: RunConnection, checkpoint: bool, timeout_s: float) -> Path | None:
    """Request that a run ends, and wait until it has taken the request.

    Returns:
        The run directory, if this machine sees it.

    Raises:
        FleetError: it did not answer in time.
    """
    too_late = (
        f"the run {run.name} did not answer within {timeout_s:g} s: it reads requests while it "
        "waits for workers; is it stuck? (kill its process, and go on with --resume)"
    )
    try:
        number = run.call("stop", checkpoint)
        status = run.await_status(lambda s: s.answered >= number, timeout_s, lambda s: too_late)
    except RunEndedError:
        return run.location.directory
    reported = status.progress.directory
    there = Path(reported) if reported and Path(reported).is_dir() else None
    return run.location.directory or there


def await_end(ended: Callable[[], bool], deadline: float) -> None:
    """Wait until a run has ended.

    Raises:
        FleetError: it did not before the deadline (of `time.monotonic`).
    """
    while not ended():
        if time.monotonic() > deadline:
            raise FleetError(
                "the run was asked to stop, but did not end in time: an iteration may take longer "
                "(--timeout-s sets the bound)"
            )
        time.sleep(POLL_S)


def driver_ended(location: RunLocation, directory: Path) -> bool:
    """Whether the driver has ended: its discovery file is gone, or its process."""
    if location.on_this_host and location.pid:
        return was_killed(location)
    return not (directory / DISCOVERY_FILE).is_file()


def control_actor_ended(run: RunConnection) -> bool:
    try:
        run.status()
    except RunEndedError:
        return True
    return False


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    asked = tyro.cli(Arguments, args=arguments, prog=command_of("cluster.stop"))
    deadline = time.monotonic() + asked.timeout_s

    def work() -> None:
        with asked.connect() as run:
            run.check_meant(asked.run)
            directory = stop(run, asked.checkpoint, asked.timeout_s)
            print(f"run {run.name}: stopping at the next safe point", flush=True)
            if directory is None:  # a cluster that stays, with the run directory on another host
                await_end(lambda: control_actor_ended(run), deadline)
        # A private Ray ends with its run, which a connection would report as a crash.
        if directory is None:
            print("stopped; what it kept is in its run directory, where --resume goes on")
            return
        await_end(lambda: driver_ended(run.location, directory), deadline)
        if run.location.again:
            print(f"stopped; go on with\n  {run.location.again}")
            return
        left = left_behind(directory)
        newest = left["checkpoint"] or "none: it will begin anew"
        print(f"stopped; newest checkpoint: {newest}\ngo on with\n  {left['resume']}")

    return exit_status(work)
