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


class FleetError(TesseraError):
    """A role of the fleet failed, or did not answer in time."""


class UnreachableError(FleetError):
    """Nothing takes a connection where a cluster is said to be."""


class StopRequestedError(TesseraError):
    """The user asked the run to stop while it waited for something."""


class LostWhileStoppingError(StopRequestedError):
    """A worker was lost after the run was asked to stop, and nobody takes its place: what it had
    reached since the last checkpoint is lost."""


class LearnerLostError(FleetError):
    """The learner is gone, with what it learned since the last checkpoint."""


class InputLostError(FleetError):
    """A worker is well, but what it was to work on went with another worker, or its machine."""


class StuckError(FleetError):
    """A worker is there, but has been at one request for longer than any may take."""


class NotFiniteError(TesseraError):
    """The policy's logits are NaN or infinite, so that no token can be drawn."""


class DataError(TesseraError):
    """Images, conditions or scores are not what they should be."""


class LearningError(TesseraError):
    """A learning step came to numbers that are not finite; the weights are those before it."""


class StorageError(TesseraError):
    """A file could not be written: the disk is full, a limit is reached, or it went away."""


class LockHeldError(ConfigError):
    """Another process owns what was to be written."""


class LockLostError(TesseraError):
    """Another process took over what this one owned; this one must not write there any more."""


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """The name that was most likely meant: one that begins with what was written, one that is
    spelled alike, or one that contains it; empty if there is none. Of equals, the first."""
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
    """Without what is easily confused: case, and the kinds of separators."""
    return name.casefold().replace("_", "-").replace(" ", "-")
