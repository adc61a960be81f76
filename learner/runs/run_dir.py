"""The run directory: its paths, configuration, owner and table of evaluations.

`cluster.io.run_layout` lists the files.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from pathlib import Path
from typing import Protocol

from cluster.control.discovery import holds_run, resume_command
from cluster.errors import ConfigError, DataError, LockLostError, did_you_mean
from cluster.io.files import AGAIN, RESUME, replacing, writing
from cluster.io.locks import Lock
from cluster.io.paths import default_root, expand_user
from cluster.io.run_layout import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    EVALUATION,
    EVALUATIONS,
    GALLERY,
    LOG,
    METRICS,
    OLD_EVALUATIONS,
    OWNER,
    REPORT,
    ROLLOUTS,
    STARTS,
    TENSORBOARD,
    TRACE,
    steps_in,
)
from cluster.io.strict_json import dumps, number
from learner.config import RunConfig, dump, parse_yaml
from learner.runs.config_file import add_checksum, verify_checksum

INITIAL_FILES = (CONFIG, OWNER, LOG, STARTS)
"""Files of a run that has just started."""
CHECKPOINT_CONFIG = "the checkpoint's configuration"
"""The source of a configuration that a checkpoint holds, for errors."""
OTHER_DIRECTORY = f"{AGAIN}, or name another directory by --run-dir"
"""Advice when a directory cannot be created."""


class Owner(Protocol):
    """A lock on a place where this process writes."""

    def check(self) -> None:
        """Raises LockLostError if another process took the place over."""
        ...


class RunDirectory:
    """Paths of a run, and its configuration."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.checkpoints = self.path / CHECKPOINTS
        self.rollouts = self.path / ROLLOUTS
        self.gallery = self.path / GALLERY
        self.tensorboard = self.path / TENSORBOARD
        self.metrics = self.path / METRICS
        old = self.path / OLD_EVALUATIONS
        self.evaluations = old if old.is_file() else self.path / EVALUATIONS
        self.evaluation = self.path / EVALUATION
        self.best = self.path / BEST
        self.trace = self.path / TRACE
        self.report = self.path / REPORT
        self.log = self.path / LOG
        self.lock: Lock | None = None
        """Held by the process that writes here (`RunTarget.acquire`)."""
        self.remote: Owner | None = None
        """The same for remote checkpoints."""

    def check_owned(self) -> None:
        """Raises LockLostError if another process took the directory over. Called before every
        write."""
        if self.lock is not None:
            self.lock.check()

    @property
    def owned(self) -> bool:
        """Whether this process still owns the directory."""
        try:
            self.check_owned()
        except LockLostError:
            return False
        return True

    def check_remote(self) -> None:
        """As `check_owned`, for `output.checkpoint_url`."""
        if self.remote is not None:
            self.remote.check()

    @classmethod
    def existing(cls, given: str | Path) -> RunDirectory:
        """The directory of a run, for commands that read it; nothing of it is read here.

        Args:
            given: its path, or its name under `default_root`.

        Raises:
            ConfigError: there is none.
        """
        path = expand_user(given)
        named = default_root() / path
        if not path.is_dir() and len(path.parts) == 1 and named.is_dir():
            path = named
        if not holds_run(path):
            there = "holds no run" if path.is_dir() else "is not there"
            known = [folder.name for folder in default_root().glob("*/") if holds_run(folder)]
            raise ConfigError(
                f"{path} {there}: {did_you_mean(path.name, known)}name a run's directory, or one "
                f"under {default_root()} by its name"
            )
        return cls(path)

    @classmethod
    def create(cls, run_dir: str, config: RunConfig) -> RunDirectory:
        """Create a run directory with its configuration.

        Args:
            run_dir: path; empty makes a new one under `default_root`.

        Raises:
            ConfigError: the directory is not empty.
        """
        path = expand_user(run_dir) if run_dir else new_name()
        cls.check_unused(path)
        run = cls(path)
        run._make_folders()
        run.write_config(config)
        return run

    @classmethod
    def check_unused(cls, path: Path) -> None:
        """Refuse a directory that is not empty. Files of a start that was killed before it wrote
        its configuration do not count.

        Raises:
            ConfigError: says what is there.
        """
        for parent in path.absolute().parents:
            if parent.exists() and not parent.is_dir():
                raise ConfigError(
                    f"--run-dir {path} cannot be made, since {parent} is a file: name another "
                    "directory"
                )
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--run-dir {path} is a file: name another directory")
        if (path / CONFIG).is_file():
            raise ConfigError(
                f"--run-dir {path} is not empty: add --resume to continue the run in it, or name "
                "another directory"
            )
        if any(not _is_initial(path, file) for file in path.rglob("*")):
            raise ConfigError(
                f"--run-dir {path} is not empty, and holds no run: name another directory"
            )

    @classmethod
    def adopt(cls, path: Path, config: bytes) -> RunDirectory:
        """Restore the directory of a run from the configuration file in a checkpoint.

        Raises:
            ConfigError: the configuration is damaged.
        """
        text, identity = verify_checksum(config, CHECKPOINT_CONFIG)
        parse_yaml(text, CHECKPOINT_CONFIG)
        run = cls(path)
        run._make_folders()
        run._write_config(add_checksum(text, identity))
        return run

    def _make_folders(self) -> None:
        for folder in (self.checkpoints, self.rollouts, self.gallery, self.tensorboard):
            with writing(folder, then=OTHER_DIRECTORY):
                folder.mkdir(parents=True, exist_ok=True)

    def _can_resume(self) -> bool:
        return bool(steps_in(self.checkpoints)) or self.evaluation.is_file()

    def has_results(self) -> bool:
        """Whether there are checkpoints, metrics or evaluations."""
        if self._can_resume():
            return True
        if self.metrics.is_file() and self.metrics.stat().st_size:
            return True
        try:
            return bool(self.read_config().output.checkpoint_url)  # which may hold checkpoints
        except ConfigError:
            return False

    def exit_message(self) -> str:
        """The last message of a run that ends early. Removes the directory of a run that kept
        nothing, so that no later --resume finds it."""
        try:
            self.check_owned()
        except LockLostError as error:
            return str(error)
        if self._can_resume():
            return f"what was kept is in {self.path}; go on with\n  {resume_command(self.path)}"
        if all(_is_initial(self.path, file) for file in self.path.rglob("*")):
            for file in self.path.iterdir() if self.path.is_symlink() else ():
                if file.is_file():
                    file.unlink(missing_ok=True)
            shutil.rmtree(self.path, ignore_errors=True)  # NFS keeps the name of an open log
            return "nothing was kept"
        return f"what was kept is in {self.path}"

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def identity(self) -> str:
        """Random id of the run; it stays when the directory is renamed."""
        return self._read_config()[1]

    def read_config(self) -> RunConfig:
        """The run's configuration.

        Raises:
            ConfigError: the file is missing, damaged or edited.
        """
        text, _ = self._read_config()
        return parse_yaml(text, str(self.config))

    def write_config(self, config: RunConfig) -> None:
        """Write it, with the run's identity (a new one if there is none)."""
        identity = self.identity if self.config.is_file() else secrets.token_hex(8)
        self._write_config(add_checksum(dump(config), identity))

    def _write_config(self, text: str) -> None:
        self.check_owned()
        then = RESUME if self.config.is_file() else OTHER_DIRECTORY
        with writing(self.config, then=then), replacing(self.config, durable=True) as partial:
            partial.write_text(text, encoding="utf-8")

    def _read_config(self) -> tuple[str, str]:
        try:
            data = self.config.read_bytes()
        except OSError as error:
            raise ConfigError(f"{self.config} cannot be read: {error}") from error
        return verify_checksum(data, str(self.config))

    def config_with_checksum(self) -> str:
        """The text of config.yaml, for a checkpoint."""
        return add_checksum(*self._read_config())

    def read_evaluation(self) -> dict[str, dict[str, float]]:
        """The table of evaluations: name of a policy -> figures.

        Raises:
            DataError: damaged.
        """
        if not self.evaluation.is_file():
            return {}
        try:
            rows = json.loads(self.evaluation.read_text(encoding="utf-8"))
            return {str(k): {n: _figure(v) for n, v in row.items()} for k, row in rows.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.evaluation}: not a table of evaluations ({error}): remove it, and --resume "
                "repeats the evaluation of the tuned policy"
            ) from error

    def write_evaluation(self, rows: dict[str, dict[str, float]]) -> None:
        self.check_owned()
        with writing(self.evaluation), replacing(self.evaluation, durable=True) as partial:
            partial.write_text(dumps(rows, indent=2) + "\n")


def _figure(value: object) -> float:
    value = number(value)
    if not isinstance(value, float | int) or isinstance(value, bool):
        raise TypeError(f"a figure was expected, found {value!r}")
    return float(value)


def _is_initial(run: Path, file: Path) -> bool:
    """Whether this is a directory, or a file of a run that has just started, temporary ones
    included. (Files further below are another run's.)"""
    if file.is_dir():
        return True
    temporary = file.name.startswith((f".{OWNER}.", f".{CONFIG}."))
    return file.parent == run and (file.name in INITIAL_FILES or temporary)


def new_name() -> Path:
    """Create a directory with a new name, unique also among runs that start at once."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path, number = default_root() / stamp, 1
    with writing(path, then=OTHER_DIRECTORY):
        while True:
            try:
                path.mkdir(parents=True)
                return path
            except FileExistsError:
                number += 1
                path = default_root() / f"{stamp}-{number}"
