"""How every command is started: from its first moment on, signals and closed streams end it in an
orderly way, though its imports take seconds."""

from __future__ import annotations

import importlib
import os
from types import FrameType

from cluster.signals import handled_by, held, interrupt
from cluster.streams import safe_streams

INTERRUPTED = 130  # as shells count it


def run_command(module: str, *arguments: list[str]) -> int:
    """Import a command's module, under its own name (so that what it defines reaches workers under
    that name), and run its `main`, with the program's own arguments or with those given. Returns
    the exit status."""
    with safe_streams(output_is_all=True):
        with handled_by(_nothing_done), held():
            main = importlib.import_module(module).main
        with handled_by(interrupt):
            try:
                return int(main(*arguments) or 0)
            except KeyboardInterrupt:
                return INTERRUPTED


def _nothing_done(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)  # an exception would come up inside of somebody's import
