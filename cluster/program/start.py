"""Start of every command: signals and closed streams are handled from the first moment on, although
the imports take seconds."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from contextlib import suppress
from types import FrameType

from cluster.program.signals import deferred_signals, ignore_signals, interrupt, signal_handler
from cluster.program.streams import FAILURES, safe_streams

FAILED = 1
INTERRUPTED = 130  # as shells count it
LINGER_S = 10.0
"""Longest wait for other threads at a command's end."""


def run_command(module: str, *arguments: list[str]) -> int:
    """Import a command's module under its own name, under which workers find its classes, and run
    its `main`. Returns the exit status.

    Args:
        arguments: one list; none: the process's.
    """
    status = FAILED
    try:
        with safe_streams(output_is_all=True):
            with signal_handler(_exit_at_once), deferred_signals():
                main = importlib.import_module(module).main
            with signal_handler(interrupt):
                try:
                    status = int(main(*arguments) or 0)
                except KeyboardInterrupt:
                    status = INTERRUPTED
                return status
    finally:
        ignore_signals()
        threading.Thread(target=_leave_threads, args=(status,), daemon=True).start()


def _exit_at_once(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)  # an exception would be raised inside some import


def _leave_threads(status: int) -> None:
    """End the process although threads, of a user's reward for example, still run."""
    time.sleep(LINGER_S)
    threads = [each for each in threading.enumerate() if not each.daemon]
    if left := [each.name for each in threads if each is not threading.main_thread()]:
        with suppress(*FAILURES):
            words = f"note: ended while threads are running: {', '.join(left)}"
            print(words, file=sys.stderr, flush=True)
        os._exit(status)
