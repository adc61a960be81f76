"""The run directory of a command line: new, to resume, or lost and restored from a URL."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.control.discovery import check_run_name
from cluster.errors import ConfigError, TesseraError
from cluster.io.files import writing
from cluster.io.locks import acquire, owner_of
from cluster.io.paths import default_root, output_path
from cluster.io.run_layout import CHECKPOINTS, CONFIG, OWNER, steps_in
from cluster.program.invocation import command_of
from cluster.program.streams import printable
from learner.checkpoints.remote import RemoteCheckpoints
from learner.checkpoints.remote_owner import RemoteOwner
from learner.config import RunConfig, parse_yaml
from learner.runs.config_file import verify_checksum
from learner.runs.run_dir import CHECKPOINT_CONFIG, OTHER_DIRECTORY, RunDirectory, new_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunTarget:
    """The chosen run directory; nothing is written until `acquire`."""

    path: Path | None
    """None: a new one under runs/."""
    saved: RunConfig | None = None
    """Configuration of the run to resume; None: a new run."""
    saved_config_file: bytes | None = None
    """`config.yaml` of a lost directory, from its newest remote checkpoint."""

    @property
    def begun(self) -> bool:
        """Whether the run resumes a checkpoint, local or remote. Files that only the start of a run
        needs may then be missing."""
        if self.saved_config_file is not None:
            return True
        if self.saved is None or self.path is None:
            return False
        return bool(steps_in(self.path / CHECKPOINTS))

    @contextmanager
    def acquire(self, config: RunConfig) -> Iterator[RunDirectory]:
        """Lock the directory within the block, and create it if need be.

        Raises:
            ConfigError: another process owns it, or it is not a run's.
            StorageError: it cannot be written.
        """
        path = self.path or new_name()
        if printable(path) != str(path):  # TensorBoard, for one, cannot write there
            raise ConfigError(f"the run directory {printable(path)} is not UTF-8: name another")
        stop = f"{command_of('cluster.stop')} --run {shlex.quote(str(path))}"
        what = f"the run directory {path}"
        if self.path is not None and (self.saved is None or self.saved_config_file is not None):
            if owner_of(path):  # says who owns it, rather than what it holds
                with acquire(path / OWNER, what, stop, path.name):
                    pass  # released meanwhile
            RunDirectory.check_unused(path)
        with writing(path, then=OTHER_DIRECTORY):
            path.mkdir(parents=True, exist_ok=True)
        with acquire(path / OWNER, what, stop, path.name) as lock:
            if self.saved_config_file is not None:
                run = RunDirectory.adopt(path, self.saved_config_file)
            elif self.saved is not None:
                run = RunDirectory(path)
            else:
                run = RunDirectory.create(str(path), config)
            run.lock = lock
            with ExitStack() as stack:
                if url := config.output.checkpoint_url:
                    try:
                        run.remote = RemoteOwner.acquire(
                            RemoteCheckpoints(url, run.identity), path.name
                        )
                    except TesseraError:
                        if self.saved is None:  # it is new
                            run.exit_message()
                        raise
                    stack.enter_context(run.remote)
                yield run


def choose_run(run_dir: str, *, resume: bool, auto_resume: bool, url: str) -> RunTarget:
    """The run directory that the options name. Reads only.

    Args:
        auto_resume: resume the run in `run_dir`, or start it if there is none.
        url: of remote checkpoints, to restore a lost directory.

    Raises:
        ConfigError: nothing to resume, or an invalid name.
    """
    path = output_path(run_dir, "--run-dir") if run_dir else None
    if path is not None:
        check_run_name(path.absolute().name)
    if auto_resume and path is None:
        raise ConfigError("--auto-resume needs the --run-dir of the run")
    if not resume and not auto_resume:
        return RunTarget(path)
    if path is None:
        path = newest_run(default_root())
        logger.info(f"resuming the newest run, {path}")
    if (path / CONFIG).is_file():
        return RunTarget(path, RunDirectory(path).read_config())
    if url and (steps := (remote := RemoteCheckpoints(url)).steps()):
        saved_config_file = remote.read(steps[-1], CONFIG)
        return RunTarget(
            path,
            parse_yaml(verify_checksum(saved_config_file, CHECKPOINT_CONFIG)[0], CHECKPOINT_CONFIG),
            saved_config_file,
        )
    if auto_resume:
        logger.info(f"no run in {path} yet: starting one")
        return RunTarget(path)
    why = f"{path.absolute()} has no {CONFIG}" if path.exists() else f"no {path}"
    there = f", and no complete checkpoint at {url}" if url else ""
    raise ConfigError(f"nothing to resume: {why}{there}")


def newest_run(root: Path) -> Path:
    """The newest run that is not active and has results.

    Raises:
        ConfigError: there is none; lists the runs that were skipped.
    """
    files = sorted(root.glob(f"*/{CONFIG}"), key=lambda file: file.stat().st_mtime, reverse=True)
    passed: list[str] = []
    for file in files:
        run = RunDirectory(file.parent)
        owner = owner_of(run.path)
        if not owner and run.has_results():
            for line in passed:
                logger.info(line)
            return run.path
        why = f"it is active ({owner})" if owner else "it kept nothing"
        passed.append(f"passing over {run.path}: {why}")
    if not files:
        raise ConfigError(f"nothing to resume: no run under {root.absolute()}")
    listed = "\n  ".join(passed)
    raise ConfigError(f"nothing to resume under {root.absolute()}:\n  {listed}")
