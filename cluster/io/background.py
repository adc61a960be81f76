"""One task in a background thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cluster.errors import FleetError


class Background:
    """Runs `work` in a daemon thread.

    Args:
        what: name of the task, for errors.
    """

    def __init__(self, what: str, work: Callable[[], None]) -> None:
        self.what, self._work = what, work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=what, daemon=True)
        self._thread.start()

    def done(self, wait_s: float = 0.0) -> bool:
        """Whether it has ended; waits for `wait_s` seconds at most.

        Raises:
            FleetError: the work raised SystemExit or another BaseException.
            Exception: the work raised it.
        """
        self._thread.join(wait_s)
        if self._thread.is_alive():
            return False
        if isinstance(self._error, Exception):
            raise self._error
        if self._error is not None:
            kind, words = type(self._error).__name__, str(self._error)
            raise FleetError(f"{self.what} ended by {kind}({words})") from self._error
        return True

    def end(self) -> None:
        """Wait until it has ended, with or without an error."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # raised again by `done`
            self._error = error
