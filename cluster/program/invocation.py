"""How this program was started (`tessera` or `python -m`): for the commands in messages, and for
where workers search the user's modules."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from cluster.own_packages import import_own_packages

COMMAND = "tessera"


@dataclass(frozen=True)
class Invocation:
    """How a program was started."""

    by_name: bool = False
    """By the command `tessera`, not by `python -m`."""
    directory: str = ""
    """Last entry of the module search path: the working directory, if started by name. (`python -m`
    searches it first, and Ray's workers do the same.)"""
    hidden: bool = False
    """Other modules with our packages' names come first on the path."""


_current = Invocation()


def current() -> Invocation:
    return _current


def begin_by_name(directory: str, *, hidden: bool) -> None:
    """Record that the command `tessera` started this process."""
    adopt_invocation(Invocation(by_name=True, directory=directory, hidden=hidden))


def adopt_invocation(invocation: Invocation) -> None:
    """Search modules as the program that was started this way; also used in its workers."""
    global _current
    if invocation.by_name and not _current.by_name:
        home = Path(__file__).resolve().parents[2]
        import_own_packages(home)  # an editable install comes after the whole path
    _current = invocation
    if invocation.directory and invocation.directory not in sys.path:
        sys.path.append(invocation.directory)


def command_of(module: str) -> str:
    """Command line of a module, in the form in which this program was called."""
    if _current.by_name and module.count(".") == 1:
        return f"{COMMAND} {module.rpartition('.')[2]}"
    return f"python -m {module}"
