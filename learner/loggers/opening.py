"""Checks and opens the loggers of a run."""

from __future__ import annotations

import importlib.util
import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ConfigError
from cluster.preflight import Findings
from learner.config import RunConfig
from learner.loggers.logger import Logger, Loggers, kept_runs
from learner.output import LoggerName
from learner.runs.records import ITERATION, read_records
from learner.runs.run_dir import RunDirectory

logger = logging.getLogger(__name__)

FIELD = "output.loggers"
WITHOUT = "the run goes on without it"


def check_loggers(config: RunConfig, findings: Findings, *, begun: bool = False) -> None:
    """Find tools that are not installed, not logged in to, or not there.

    Args:
        begun: the run resumes a checkpoint, and goes on without them.
    """
    found = Findings()
    for name in config.output.loggers:
        with found.of(FIELD):
            _check(name)
    if begun:
        findings.notes += [f"{problem}; {WITHOUT}" for problem in found.problems]
    else:
        findings.problems += found.problems


def _check(name: LoggerName) -> None:
    """
    Raises:
        ConfigError: the tool cannot work.
    """
    if importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"expected {name} to be installed, found none: pip install 'tessera-rl[{name}]'"
        )
    if name == "wandb":
        from learner.loggers.weights_and_biases import check_login

        check_login()
    elif name == "mlflow":
        from learner.loggers.ml_flow import check_store

        check_store()


@contextmanager
def open_loggers(
    config: RunConfig, run: RunDirectory, from_step: int | None = None, *, begun: bool = False
) -> Iterator[Loggers]:
    """The loggers of a run, completed at the end of the block.

    Args:
        from_step: the step that the run goes back to. If there are later records, tools that
            cannot forget them get a new run, with the earlier part of the curves.
        begun: the run resumes a checkpoint: it goes on without a tool that cannot work, which gets
            what it lacks at a later start.

    Raises:
        ConfigError: a tool of a new run refuses its settings, or cannot be reached.
    """
    kept = kept_runs(run)
    if from_step is not None and _newest(run) > from_step:
        kept = dict.fromkeys(kept, "")
    tools: dict[str, Logger] = {}
    try:
        for name in config.output.loggers:
            try:
                if begun:  # else checked before; its own attempts would take minutes, or ask
                    _check(name)
                tools[name] = _open(name, config, run, kept.get(name))
            except ConfigError as error:
                if not begun:
                    raise
                logger.warning(f"note: {name}: {error}; {WITHOUT}")
    except BaseException:
        Loggers(tools).close()
        raise
    loggers = Loggers(tools)
    try:
        yield loggers
    finally:
        loggers.close()


def _open(name: LoggerName, config: RunConfig, run: RunDirectory, kept: str | None) -> Logger:
    """
    Args:
        kept: the tool's run of earlier starts; empty: a new one besides it; None: the first.
    """
    if name == "tensorboard":
        from learner.loggers.tensorboard import TensorBoard

        return TensorBoard(run.tensorboard)
    tags = {"tessera.run": run.identity, "policy": Path(config.policy.checkpoint).name}
    if name == "wandb":
        from learner.loggers.weights_and_biases import WeightsAndBiases

        # the first has the run's own id, so that a directory that was lost finds it again
        first = run.identity if kept is None else f"{run.identity}-{secrets.token_hex(2)}"
        return WeightsAndBiases(config, run, kept or first, tags)
    from learner.loggers.ml_flow import MLflow

    return MLflow(config, run, kept or "", tags)


def _newest(run: RunDirectory) -> int:
    """The last iteration in the run's metrics; 0 before the first."""
    rows = read_records(run.metrics, ITERATION)
    return int(rows[-1][ITERATION]) if rows else 0
