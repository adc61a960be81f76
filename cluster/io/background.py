"""One piece of work in a thread: started, asked after, waited for within a bound."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cluster.errors import FleetError


class Background:
    """Runs `work` in a daemon thread, which does not keep a process from ending.

    Args:
        what: it is, for the error of a wait that is over.
    """

    def __init__(self, what: str, work: Callable[[], None]) -> None:
        self.what, self._work = what, work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=what, daemon=True)
        self._thread.start()

    def done(self, wait_s: float = 0.0) -> bool:
        """Whether it has ended, after so long at most.

        Raises:
            FleetError: the work ended by what would end the caller, too (SystemExit and its like).
            Exception: whatever else the work raised.
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
        """Wait until it has ended, however it does."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # is raised at whoever asks
            self._error = error
