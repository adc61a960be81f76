"""Where outputs go: below the working directory, but not into a package that Ray deletes."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from cluster.errors import ConfigError

logger = logging.getLogger(__name__)

RUNS = "runs"
RAY_PACKAGES = "runtime_resources"
"""Folder of Ray's session, into which it unpacks the package of a job."""


def expand_user(given: str | os.PathLike[str]) -> Path:
    """A path as a user writes it, ~ for his home directory.

    Raises:
        ConfigError: nobody knows that directory.
    """
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{given}: the home directory that ~ stands for is not known: set HOME, or write the "
            "whole path"
        ) from error


def in_ray_package(path: Path) -> bool:
    """Whether a path lies in a package that Ray unpacked for a job, and deletes after it."""
    return RAY_PACKAGES in path.absolute().parts


def default_root() -> Path:
    """Of runs: `runs/` here, or `~/tessera-runs` inside the package of a job."""
    here = Path.cwd()
    return expand_user("~/tessera-runs") if in_ray_package(here) else here / RUNS


def output_path(given: str | Path, option: str) -> Path:
    """Where to write what an option names. A relative path inside the package of a Ray job is
    taken from `default_root`, with a note.

    Args:
        option: its name, for messages.

    Raises:
        ConfigError: it lies in the package all the same.
    """
    path = expand_user(given)
    if not in_ray_package(path):
        return path
    deleted = "the package of this job, which Ray deletes after it"
    if path.is_absolute() or ".." in path.parts:
        raise ConfigError(f"{option} {given} lies in {deleted}: name a directory that stays")
    parts = path.parts[1:] if path.parts[:1] == (RUNS,) and len(path.parts) > 1 else path.parts
    moved = default_root().joinpath(*parts)
    logger.warning(f"note: {option} {given} would lie in {deleted}: writing to {moved}")
    return moved
