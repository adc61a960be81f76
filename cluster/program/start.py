"""How every command is started: from its first moment on, signals and closed streams end it in an
orderly way, though its imports take seconds."""

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
"""Longest wait, at a command's end, for threads that it does not know."""


def run_command(module: str, *arguments: list[str]) -> int:
    """Import a command's module, under its own name (so that what it defines reaches workers under
    that name), and run its `main`, with the program's own arguments or with those given. Returns
    the exit status."""
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
    os._exit(INTERRUPTED)  # an exception would come up inside of somebody's import


def _leave_threads(status: int) -> None:
    """Python waits for threads at its end; one that a reward has started may never end."""
    time.sleep(LINGER_S)
    threads = [each for each in threading.enumerate() if not each.daemon]
    if left := [each.name for each in threads if each is not threading.main_thread()]:
        with suppress(*FAILURES):
            words = f"note: ended while threads are running: {', '.join(left)}"
            print(words, file=sys.stderr, flush=True)
        os._exit(status)
