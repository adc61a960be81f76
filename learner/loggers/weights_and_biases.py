"""Weights & Biases. Project, entity, name, mode and credentials are the user's own settings of it
(WANDB_PROJECT, WANDB_MODE=offline, `wandb login`); no file of the run holds a key.

Without a connection to its server a run can be stored (offline), but not continued: each start
stores the whole curves, and `wandb sync` of the newest folder replaces what an older one uploaded.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import wandb

from cluster.errors import ConfigError
from cluster.io.starts import read_events
from learner.config import RunConfig, to_dict
from learner.loggers.logger import (
    CLOSE_S,
    EVALUATED,
    EVALUATION,
    HISTOGRAMS,
    SCALARS,
    Newest,
    Values,
    kind_of,
)
from learner.runs.run_dir import RunDirectory

logger = logging.getLogger(__name__)

PROJECT = "tessera"
OFFLINE = ("offline", "dryrun", "disabled")
REMEDY = "log in (`wandb login`, or WANDB_API_KEY), or set WANDB_MODE=offline"


def check_login() -> None:
    """
    Raises:
        ConfigError: W&B is to send to its server, and has no credentials for it.
    """
    if wandb.setup().settings.mode not in OFFLINE and not wandb.login(prompt=False, verify=False):
        raise ConfigError(f"expected credentials of Weights & Biases, found none: {REMEDY}")


class WeightsAndBiases:
    """A run of W&B.

    Args:
        run_id: of the W&B run, which is continued if it exists.
        tags: shown beside the name.
    """

    def __init__(
        self, config: RunConfig, run: RunDirectory, run_id: str, tags: Mapping[str, str]
    ) -> None:
        settings = wandb.setup().settings
        offline = settings.mode in OFFLINE
        try:
            self._run = wandb.init(
                id=run_id,
                resume=None if offline else "allow",
                project=settings.project or PROJECT,
                name=settings.run_name or run.path.name,
                tags=settings.run_tags or [value[:64] for value in tags.values()],
                config=to_dict(config) | _command(run),
                dir=run.path,
                settings=wandb.Settings(
                    console="off",  # the run's log has it, and the console a live table
                    silent=True,
                    x_disable_meta=True,  # has the command line with its secrets
                    disable_git=True,  # has the remote's URL, which may hold a token
                    finish_timeout=CLOSE_S / 2,
                ),
            )
        except (wandb.errors.Error, OSError) as error:
            raise ConfigError(
                f"output.loggers: Weights & Biases could not begin the run ({error}): {REMEDY}"
            ) from error
        self._folder = Path(self._run.dir).parent
        self._begun = False
        if url := None if offline else self._run.url:
            logger.info(f"Weights & Biases: {url}")
        elif settings.mode != "disabled":
            logger.info(f"Weights & Biases, offline: upload with\n  wandb sync {self._folder}")

    @property
    def run_id(self) -> str:
        return str(self._run.id)

    def begin(self, next_step: int) -> Newest:
        self._begun = True
        if not self._run.resumed:
            _set_aside(self._folder)
            return {}
        newest = self._run.step - 1
        evaluated = self._run.summary.get(EVALUATED, newest)
        return {
            SCALARS: newest,
            HISTOGRAMS: newest,
            EVALUATION: evaluated,
            kind_of("gallery"): newest - 1,
        }

    def scalars(self, values: Values, step: int) -> None:
        self._log(dict(values), step)

    def evaluation(self, figures: Values, step: int) -> None:
        named = {f"{EVALUATION}/{name}": value for name, value in figures.items()}
        self._log({**named, EVALUATED: step}, step)

    def histograms(self, values: Mapping[str, np.ndarray], step: int) -> None:
        finite = {name: array[np.isfinite(array)].tolist() for name, array in values.items()}
        self._log({f"histogram/{k}": wandb.Histogram(v) for k, v in finite.items() if v}, step)

    def images(self, name: str, image: np.ndarray, step: int) -> None:
        self._log({name: wandb.Image(image, caption=f"after {step} iterations")}, step)

    def _log(self, values: dict[str, Any], step: int) -> None:
        # W&B drops steps below its newest: an image of the last step of an earlier start, say
        self._run.log(values, step=max(step, self._run.step))

    def finish(self, table: Mapping[str, Values], files: Sequence[Path]) -> None:
        for policy, figures in table.items():
            for name, value in figures.items():
                self._run.summary[f"table/{policy}/{name}"] = value
        for file in files:
            copy = shutil.copy(file, self._run.dir)  # else W&B links it, and warns
            self._run.save(copy, base_path=self._run.dir, policy="now")

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
        if not self._begun:
            wandb.teardown()  # its process may still write
            _remove(self._folder)


def _command(run: RunDirectory) -> dict[str, str]:
    """The command of the newest start, without its secrets."""
    commands = [event["command"] for event in read_events(run.path) if "command" in event]
    return {"command": commands[-1]} if commands else {}


def _set_aside(folder: Path) -> None:
    """Rename records of earlier starts, so that `wandb sync` uploads the newest, which is whole."""
    for file in folder.parent.glob("offline-run-*/*.wandb"):
        if file.parent != folder and not file.with_name(f"{file.name}.synced").exists():
            file.rename(file.with_name(f"{file.name}.replaced"))


def _remove(folder: Path) -> None:
    """Remove what W&B wrote for a run that never began."""
    shutil.rmtree(folder, ignore_errors=True)
    for file in folder.parent.iterdir() if folder.parent.is_dir() else ():
        if file.is_symlink() and not file.exists():
            file.unlink()
    if folder.parent.is_dir() and not any(folder.parent.iterdir()):
        os.rmdir(folder.parent)
