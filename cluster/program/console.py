"""Consoles, exit statuses and progress bars of commands."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cluster.errors import TesseraError

FAILED = 1  # exit statuses of every command
REFUSED = 2  # as for any bad command line
INTERRUPTED = 130  # asked to stop, as shells count it

LINES_WITHOUT_TERMINAL = 10
NARROWEST, USUAL = 20, 80  # columns


def make_console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console on a standard stream, without markup, since names of runs and files may have
    brackets. FORCE_COLOR does not make a file a terminal: a bar there would be control codes."""
    stream = sys.stderr if stderr else sys.stdout
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    terminal = stream is not None and stream.isatty() and not dumb
    console = _Console(
        stderr=stderr,
        width=width,
        force_terminal=terminal,
        markup=False,
        emoji=False,
        highlight=False,
    )
    if console.width < NARROWEST:  # COLUMNS=0, say
        console.width = USUAL
    return console


class _Console(Console):
    @property
    def encoding(self) -> str:
        """The stream's encoding, so that tables use characters that it can show."""
        return (getattr(self.file, "encoding", None) or "utf-8").lower()


def exit_status(
    work: Callable[[], object],
    refused: tuple[type[TesseraError], ...] = (),
    stopped: str = "",
) -> int:
    """Run a command's work; an error becomes a message and an exit status.

    Args:
        refused: errors raised before any work was done; their status is REFUSED.
        stopped: message if the user interrupts it.
    """
    try:
        work()
    except (TesseraError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED if isinstance(error, refused) else FAILED
    except KeyboardInterrupt:
        if stopped:
            print(stopped, file=sys.stderr)
        return INTERRUPTED
    return 0


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """End the program with an error if the block does not end in time: for library calls that
    have no timeout."""

    def give_up() -> None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(FAILED)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def progress_bar(
    task: str, total: int, unit: str, first: int = 0
) -> Iterator[Callable[[int], None]]:
    """A progress bar with a rate on stderr; without a terminal, a few lines.

    Args:
        first: units done by an earlier run of the program; not part of the rate.

    Yields:
        A function to call with the number of further units done.
    """
    console = make_console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    start, done = time.monotonic(), first
    printed = done * LINES_WITHOUT_TERMINAL // max(total, 1)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(task, total=total, completed=first, rate="")

        def advance(count: int) -> None:
            nonlocal done, printed
            done += count
            rate = f"{(done - first) / max(time.monotonic() - start, 1e-9):.3g} {unit}/s"
            progress.update(bar, completed=done, rate=rate)
            lines = done * LINES_WITHOUT_TERMINAL // max(total, 1)
            if not console.is_terminal and lines > printed:
                printed = lines
                console.print(f"{task} {done}/{total}  {rate}", highlight=False, soft_wrap=True)

        yield advance
