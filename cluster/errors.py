"""Errors that a user can act on. `main` functions print them without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TesseraError(Exception):
    """Base of every error whose message says what failed, where, and what to do."""


class ConfigError(TesseraError, ValueError):
    """A configuration value is unknown, malformed or impossible."""


class CheckpointError(TesseraError):
    """A file of tensors, a snapshot or a checkpoint is missing, damaged or of another model."""


class NotBuiltError(CheckpointError):
    """Networks that are built on demand have not been; says how, without naming a file of them."""


class FleetError(TesseraError):
    """A role of the fleet failed, or did not answer in time."""


class UnreachableError(FleetError):
    """No cluster accepts a connection at the given address."""


class StopRequestedError(TesseraError):
    """The user asked the run to stop while it waited for something."""


class LostWhileStoppingError(StopRequestedError):
    """A worker was lost while the run was stopping, and is not replaced: what it did since the last
    checkpoint is lost."""


class LearnerLostError(FleetError):
    """The learner was lost, with its steps since the last checkpoint."""


class InputLostError(FleetError):
    """An argument of a call was lost with another worker or node."""


class StuckError(FleetError):
    """A worker responds, but exceeded the time limit of a request."""


class NotFiniteError(TesseraError):
    """The policy's logits are NaN or infinite, so that no token can be drawn."""


class DataError(TesseraError):
    """Images, conditions or scores are invalid."""


class LearningError(TesseraError):
    """A step gave numbers that are not finite; the weights are unchanged."""


class StorageError(TesseraError):
    """A file could not be written: the disk is full, over quota, or gone."""


class LockHeldError(ConfigError):
    """Another process holds the lock."""


class LockLostError(TesseraError):
    """Another process took the lock over; this one must not write there any more."""


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """The name most likely meant: one that starts with `name`, is spelled alike, or contains it;
    empty if there is none."""
    known = {candidate: _plain(candidate) for candidate in names}
    wanted = _plain(name)
    if not wanted:
        return ""
    begins = [candidate for candidate, plain in known.items() if plain.startswith(wanted)]
    begins.sort(key=lambda candidate: not f"{known[candidate]}-".startswith(f"{wanted}-"))
    close = difflib.get_close_matches(wanted, known.values(), n=1, cutoff=cutoff)
    alike = [candidate for candidate, plain in known.items() if plain in close]
    holds = [candidate for candidate, plain in known.items() if wanted in plain]
    return next(iter((*begins, *alike, *(holds if len(wanted) > 2 else ()))), "")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A question with the nearest name, and a space after it; empty if there is none."""
    close = nearest(name, names)
    return f"did you mean {close!r}? " if close else ""


def _plain(name: str) -> str:
    """Lower case, with one kind of separator."""
    return name.casefold().replace("_", "-").replace(" ", "-")
