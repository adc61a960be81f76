"""Checks and opens the loggers of a run."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.preflight import Findings
from learner.config import RunConfig
from learner.loggers.logger import Logger, Loggers, kept_runs
from learner.output import LoggerName
from learner.runs.records import ITERATION, read_records
from learner.runs.run_dir import RunDirectory


def check_loggers(config: RunConfig, findings: Findings) -> None:
    """Find tools that are not installed, not logged in to, or not there."""
    checks: dict[LoggerName, Callable[[], None]] = {"wandb": _check_wandb, "mlflow": _check_mlflow}
    for name in config.output.loggers:
        if importlib.util.find_spec(name) is None:
            remedy = f"pip install 'tessera-rl[{name}]'"
            findings.problem("output.loggers", f"{name} to be installed", "none", remedy)
        elif name in checks:
            with findings.of("output.loggers"):
                checks[name]()


def _check_wandb() -> None:
    from learner.loggers.weights_and_biases import check_login

    check_login()


def _check_mlflow() -> None:
    from learner.loggers.ml_flow import check_store

    check_store()


@contextmanager
def open_loggers(
    config: RunConfig, run: RunDirectory, from_step: int | None = None
) -> Iterator[Loggers]:
    """The loggers of a run, completed at the end of the block.

    Args:
        from_step: the step that the run goes back to. If there are later records, tools that
            cannot forget them get a new run, with the earlier part of the curves.

    Raises:
        ConfigError: a tool refuses its settings, or cannot be reached.
    """
    kept = kept_runs(run)
    if from_step is not None and _newest(run) > from_step:
        kept = dict.fromkeys(kept, "")
    tools: dict[str, Logger] = {}
    try:
        for name in config.output.loggers:
            tools[name] = _open(name, config, run, kept.get(name))
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
