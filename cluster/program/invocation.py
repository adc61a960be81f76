"""How this program was started, and what follows from it for others: which commands messages name,
and where workers look for the user's modules."""

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
    """As `tessera`, not as `python -m`."""
    directory: str = ""
    """Where modules are searched last: the working directory of one that was started by name. That
    of `python -m` comes first, by Python's own rule, and Ray tells its workers."""
    hidden: bool = False
    """Other files of the four packages' names lie before them on the path."""


_current = Invocation()


def current() -> Invocation:
    return _current


def begin_by_name(directory: str, *, hidden: bool) -> None:
    """Of the command `tessera`: remember how it was started."""
    adopt_invocation(Invocation(by_name=True, directory=directory, hidden=hidden))


def adopt_invocation(invocation: Invocation) -> None:
    """Do as the program that was started so; for its workers, too."""
    global _current
    if invocation.by_name and not _current.by_name:
        home = Path(__file__).resolve().parents[2]
        import_own_packages(home)  # an editable install comes after the whole path
    _current = invocation
    if invocation.directory and invocation.directory not in sys.path:
        sys.path.append(invocation.directory)


def command_of(module: str) -> str:
    """How the user calls a command, given its module: the way he called this one."""
    if _current.by_name and module.count(".") == 1:
        return f"{COMMAND} {module.rpartition('.')[2]}"
    return f"python -m {module}"
