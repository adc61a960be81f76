"""What the packages log, for tests to look at."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from cluster.program.logs import PACKAGES


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


@contextmanager
def messages() -> Iterator[list[str]]:
    """Messages of our packages, from INFO on, while the block runs."""
    handler = _Collector()
    with ExitStack() as undo:
        for each in map(logging.getLogger, PACKAGES):
            undo.callback(each.setLevel, each.level)
            undo.callback(each.removeHandler, handler)
            each.setLevel(logging.INFO)
            each.addHandler(handler)
        yield handler.found
