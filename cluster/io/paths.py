"""Paths of outputs: below the working directory, but not in a package that Ray deletes."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from cluster.errors import ConfigError

logger = logging.getLogger(__name__)

RUNS = "runs"
RAY_PACKAGES = "runtime_resources"
"""Folder of Ray's session with the unpacked packages of jobs."""


def expand_user(given: str | os.PathLike[str]) -> Path:
    """A path with ~ expanded.

    Raises:
        ConfigError: the home directory is not known.
    """
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{given}: the home directory that ~ stands for is not known: set HOME, or write the "
            "whole path"
        ) from error


def in_ray_package(path: Path) -> bool:
    """Whether a path is in a job's package, which Ray deletes after the job."""
    return RAY_PACKAGES in path.absolute().parts


def default_root() -> Path:
    """Parent of new run directories: `runs/`, or `~/tessera-runs` in a job's package."""
    here = Path.cwd()
    return expand_user("~/tessera-runs") if in_ray_package(here) else here / RUNS


def output_path(given: str | Path, option: str) -> Path:
    """The path to write to for an option. Relative paths in a Ray job's package are moved to
    `default_root`, with a warning.

    Args:
        option: its name, for messages.

    Raises:
        ConfigError: the path is in the package and cannot be moved.
    """
    path = expand_user(given)
    if not in_ray_package(path):
        return path
    deleted = "the package of this job, which Ray deletes after it"
    if path.is_absolute() or ".." in path.parts:
        raise ConfigError(f"{option} {given} is in {deleted}: name a directory that stays")
    parts = path.parts[1:] if path.parts[:1] == (RUNS,) and len(path.parts) > 1 else path.parts
    moved = default_root().joinpath(*parts)
    logger.warning(f"note: {option} {given} would be in {deleted}: writing to {moved}")
    return moved
