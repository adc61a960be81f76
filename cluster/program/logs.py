"""Logging of commands: messages on the console, and lines with times in a file.

Modules log to `logging.getLogger(__name__)`; commands configure it with the two context managers
here, which restore it at the end. The level is INFO for our packages and WARNING for others;
`warnings` are logged, too.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from cluster.program.streams import console_failure, optional_output

PACKAGES = ("actors", "cluster", "learner", "rewards")
LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"
TIME = "%Y-%m-%d %H:%M:%S%z"
FILE_ONLY = {"file_only": True}
"""As `extra=`: not on the console, which shows it in another form or not at all."""
PLAIN_ONLY = {"plain_only": True}
"""As `extra=`: not on a terminal, which has a live table."""
LOGGED = "traceback_logged"
"""Attribute of an exception."""

logger = logging.getLogger(__name__)


class ConsoleHandler(logging.Handler):
    """Prints messages without markup, above a live table or progress bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        if getattr(record, "plain_only", False) and self._console.is_terminal:
            return
        try:
            text = self.format(record)
            with optional_output():
                self._console.print(
                    text, highlight=False, markup=False, emoji=False, soft_wrap=True
                )
        except Exception:
            self.handleError(record)


class RunLog(logging.FileHandler):
    """Appends to a run's log. If that fails, the run continues, with one warning."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._failed = self._console_reported = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._console_reported and (why := console_failure()):
            self._console_reported = True
            note = f"note: the console cannot be written, the run goes on: {why}"
            print(note, file=sys.stderr)
            super().emit(logger.makeRecord(__name__, logging.WARNING, "", 0, note, (), None))
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (its name there)
        if not self._failed:
            self._failed = True  # before the note, which comes here again
            why = traceback.format_exc(limit=0).strip().rpartition("\n")[2]
            logger.warning(
                "note: %s cannot be written, the run goes on: %s", self.baseFilename, why
            )

    def close(self) -> None:
        with suppress(OSError):  # what the disk had no room for
            super().close()


@contextmanager
def to_console(console: Console) -> Iterator[None]:
    """Log to a console while the block runs."""
    with _handled_by(ConsoleHandler(console)):
        yield


@contextmanager
def to_file(path: Path) -> Iterator[None]:
    """Also log to a file while the block runs, with tracebacks of unexpected exceptions in the
    block or in threads. Continues without the file if it cannot be opened."""
    try:
        handler = RunLog(path)
    except OSError as error:
        logger.warning("note: %s cannot be written, the run goes on: %s", path, error)
        yield
        return
    handler.setFormatter(logging.Formatter(LINE, TIME))
    with _handled_by(handler):
        try:
            yield
        except Exception as error:
            log_unexpected(error)
            raise


def log_unexpected(error: Exception) -> None:
    """Log the traceback of an unexpected exception into the file; once for each exception, so that
    a block may do so before a long clean-up."""
    if not vars(error).setdefault(LOGGED, False):
        vars(error)[LOGGED] = True
        logger.critical("unexpected exception", exc_info=error, extra=FILE_ONLY)


@contextmanager
def _handled_by(handler: logging.Handler) -> Iterator[None]:
    root = logging.getLogger()
    ours = [logging.getLogger(name) for name in PACKAGES]
    levels = [each.level for each in ours]
    shown, hook = warnings.showwarning, threading.excepthook
    for each in ours:
        each.setLevel(logging.INFO)
    root.addHandler(handler)
    logging.captureWarnings(True)
    captured = warnings.showwarning is not shown  # else an outer block restores it
    threading.excepthook = _thread_failed
    try:
        yield
    finally:
        threading.excepthook = hook
        if captured:
            logging.captureWarnings(False)
        root.removeHandler(handler)
        handler.close()
        for each, level in zip(ours, levels):
            each.setLevel(level)


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """A `threading.excepthook` that logs."""
    if failed.exc_value is None or isinstance(failed.exc_value, SystemExit):
        return
    name = failed.thread.name if failed.thread else "a thread"
    logger.error("unexpected exception in %s", name, exc_info=failed.exc_value)
