"""Standard streams that may fail without ending a run: closed pipe or terminal, full disk,
character outside the encoding."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

CLOSED_PIPE = 141  # 128 + SIGPIPE, as shells count it
NOT_WRITTEN = 1
FAILURES = (OSError, ValueError)
"""Errors of writing; ValueError: the file is closed."""


def printable(text: object) -> str:
    """Text with lone surrogates (bytes of a file name that are not UTF-8) escaped (\\udcff)."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def escaped(name: object) -> str:
    """A file's name on one line: control characters escaped, too (\\n, \\x1b)."""
    text = printable(name)
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


class SafeStream:
    """A standard stream that records its first failure and drops later output.

    Args:
        ends: a failure ends the program, without a message if a pipe was closed.
    """

    def __init__(self, stream: TextIO | None, name: str, *, ends: bool) -> None:
        # closed: libraries still ask for its encoding
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self._name, self._ends = name, ends
        self.failure = "" if stream is not None else "it is closed"
        self._error: Exception | None = None
        """Of the failure, until the program ends by it."""

    def write(self, text: str) -> int:
        self._attempt("write", text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._attempt("flush")

    def isatty(self) -> bool:
        return not self.failure and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, method: str, *text: str) -> None:
        if self.failure:
            self._end()
            return
        try:
            getattr(self._stream, method)(*text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self._attempt(method, *(t.encode(encoding, "replace").decode(encoding) for t in text))
        except RuntimeError:
            pass  # reentrant write from a signal handler
        except FAILURES as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.failure = getattr(error, "strerror", None) or str(error)
        self._error = error
        _drain(self._stream)
        self._end()

    def _end(self) -> None:
        error = self._error
        if not self._ends or error is None:
            return
        self._error = None
        if getattr(error, "errno", None) == errno.EPIPE:
            raise SystemExit(CLOSED_PIPE)
        with suppress(*FAILURES):
            print(f"error: the {self._name} cannot be written: {self.failure}", file=sys.stderr)
        raise SystemExit(NOT_WRITTEN)


def _drain(stream: TextIO) -> None:
    """Discard a stream's buffer, which the interpreter would flush at its end with an error.
    (https://docs.python.org/3/library/signal.html#note-on-sigpipe)"""
    with suppress(*FAILURES):
        number = stream.fileno()
        if number in (1, 2):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


@contextmanager
def safe_streams(*, output_is_all: bool) -> Iterator[None]:
    """Standard output and error are `SafeStream`s while the block runs.

    Args:
        output_is_all: end the program if the output cannot be written.
    """
    before = sys.stdout, sys.stderr
    _open_missing()
    sys.stdout = _safe(before[0], "standard output", ends=output_is_all)
    sys.stderr = _safe(before[1], "standard error", ends=False)
    try:
        try:
            yield
        except SystemExit:  # as after --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before


@contextmanager
def optional_output() -> Iterator[None]:
    """A failure to write in the block does not end the program at once, but at the next output."""
    stream = sys.stdout
    if not isinstance(stream, SafeStream):
        yield
        return
    ends, stream._ends = stream._ends, False
    try:
        yield
    finally:
        stream._ends = ends


def console_failure() -> str:
    """Why the standard output cannot be written; empty: no failure is known."""
    return getattr(sys.stdout, "failure", "")


def _safe(stream: Any, name: str, *, ends: bool) -> Any:
    if not isinstance(stream, SafeStream):
        return SafeStream(stream, name, ends=ends)
    safe = SafeStream(stream._stream, name, ends=ends)
    safe.failure = stream.failure
    if not ends:
        stream._error = None
    return safe


def _open_missing() -> None:
    """Open missing file descriptors 0 to 2, so that no other file gets them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
