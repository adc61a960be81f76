"""Metrics of an iteration under the names of metrics.jsonl, and the recorder that writes them.

To add a metric: one line in `iteration_metrics` (of the learner: in `Learner._metrics`). It then
appears in metrics.jsonl and all loggers; `learner.reports.panels.PANELS` draws it in the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cluster.clock import epoch
from cluster.io.files import writing
from cluster.io.strict_json import dumps
from cluster.messages import ScoredGroup
from cluster.spans import Span
from learner.grpo.advantage import Advantages
from learner.loggers.logger import Loggers
from learner.monitoring.guards import scoring_times
from learner.monitoring.timeline import Trace, Usage
from learner.rollouts.parquet import rollout_table, write_rollouts
from learner.runs.records import ITERATION, STEP, counted_from, read_records, rollout_file, truncate
from learner.runs.run_dir import RunDirectory
from learner.training.batch import StepReport
from rewards.distribution.distribution_reward import DistributionReward

QUANTILES = {"p05": 0.05, "p95": 0.95}
UNREPEATABLE = ("time/", "fleet/")
"""Prefixes of metrics that differ between equal runs."""


def iteration_metrics(
    iteration: int,
    groups: Sequence[ScoredGroup],
    answers: Mapping[str, DistributionReward],
    advantages: Advantages,
    report: StepReport,
    *,
    max_staleness: int,
    restarts: int,
    spans: Sequence[Span],
    seconds: float,
) -> dict[str, Any]:
    """The metrics of an iteration, but for those of the guards. What was not measured is absent.

    Args:
        iteration: from 0; the records count from 1.
        answers: of the moments server, by what the names of a space's metrics begin with.
        restarts: of workers, in the whole run.
        spans: of all workers and the driver.
        seconds: since the end of the iteration before.
    """
    rewards = {n: v for n, v in advantages.rewards.items() if not np.isnan(v).all()}
    ages = staleness_of(groups, report.version - 1).tolist()
    version = next(iter(answers.values())).version
    return {
        "iteration": iteration + 1,
        "version": report.version,
        **{f"staleness/groups_{age}": ages.count(age) for age in range(max_staleness + 1)},
        "moments/version": version,
        "moments/staleness": iteration - version,
        **{f"reward/{name}": float(np.nanmean(values)) for name, values in rewards.items()},
        **{f"reward_std/{name}": float(np.nanstd(values)) for name, values in rewards.items()},
        **{
            f"reward_{label}/{name}": float(np.nanquantile(values, share))
            for label, share in QUANTILES.items()
            for name, values in rewards.items()
        },
        **{f"reward_clipped/{name}": share for name, share in advantages.clipped.items()},
        **{
            prefix + name: value
            for prefix, answer in answers.items()
            for name, value in _of_distribution(answer).items()
        },
        "images/failed": int((~advantages.valid).sum()),
        "groups/flat": advantages.flat_groups,
        **report.metrics,
        "fleet/restarts": restarts,
        **_times(spans, seconds, groups),
    }


def _of_distribution(answer: DistributionReward) -> dict[str, float]:
    """Figures of a distribution reward, without the prefix of its space."""
    found = {
        "ema": answer.fid,
        "batch": answer.batch_fid,
        "effective_size": answer.effective_size,
        "gap": answer.gap,
        "bias": answer.bias,
        "lag": answer.lag,
        "positive_share": answer.positive_share,
    }
    if answer.class_rewards is not None:  # None: captions
        found |= {
            "between_classes": answer.between_classes,
            "within_classes": answer.within_classes,
        }
    return found


def _times(
    spans: Sequence[Span], seconds: float, groups: Sequence[ScoredGroup]
) -> dict[str, float]:
    """Seconds of each phase, summed over workers, and the rate of the iteration."""
    times: dict[str, float] = {}
    for span in spans:
        key = f"time/{span.phase}"
        times[key] = times.get(key, 0.0) + span.seconds
    if scoring := scoring_times(spans):
        times["time/slowest_server"] = max(scoring.values())
    images = sum(group.rollouts.request.num_rollouts for group in groups)
    return {**times, "time/iteration": seconds, "time/images_per_s": images / seconds}


def worker_spans(
    groups: Sequence[ScoredGroup], answers: Mapping[str, DistributionReward], report: StepReport
) -> tuple[Span, ...]:
    """Working times that came with the workers' answers."""
    of_groups = (span for group in groups for span in (*group.rollouts.spans, *group.scores.spans))
    of_moments = (span for answer in answers.values() for span in answer.spans)
    return (*of_groups, *of_moments, *report.spans)


def staleness_of(groups: Sequence[ScoredGroup], version: int) -> np.ndarray:
    """(P,) int64: updates between each group's weights and those that learn from it."""
    return version - np.array([group.rollouts.version for group in groups], dtype=np.int64)


class Recorder:
    """Writes metrics, rollouts and the trace of a run, and gives loggers their part. Raises
    StorageError when no space is left.

    Args:
        done: iterations of the run so far; records after them, of an interrupted run, are removed.
        rollouts: write rollouts, too.
        loggers: none by default.
    """

    def __init__(
        self, run: RunDirectory, done: int, *, rollouts: bool, loggers: Loggers | None = None
    ) -> None:
        self._run, self._rollouts = run, rollouts
        self._loggers = loggers or Loggers()
        self._base = counted_from(run)  # before records are truncated
        truncate(run, done, rollouts=rollouts)
        self._loggers.begin(run, done + self._base)
        with writing(run.metrics):
            self._metrics = run.metrics.open("a", buffering=1)
        self._trace = Trace(run.trace, resume=done > 0)
        self.usage = Usage(epoch())
        """Working time of each role from now on."""

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Check that this process owns the run, and turn OSError into StorageError."""
        self._run.check_owned()
        with writing(path):
            yield

    def record(
        self,
        metrics: dict[str, Any],
        groups: Sequence[ScoredGroup],
        advantages: Advantages,
        spans: Iterable[Span],
    ) -> None:
        """Write everything of one iteration."""
        iteration = metrics[ITERATION] - 1 + self._base
        row = {**metrics, ITERATION: iteration}
        if self._rollouts:  # first: every line of metrics has its rollouts
            table = rollout_table(iteration, groups, advantages, metrics.get("moments/version", 0))
            self._run.check_owned()
            write_rollouts(rollout_file(self._run, iteration), table)
        with self._writing(self._run.metrics):
            self._metrics.write(dumps(row) + "\n")
        self._loggers.scalars(row, iteration)
        self._loggers.histograms(distributions(metrics, groups, advantages), iteration)
        spans = tuple(spans)
        self.usage.add(spans)
        with self._writing(self._run.trace):
            self._trace.add(spans)
            idle = {use.role: use.idle for use in self.usage.shares()}
            self._trace.idle(idle, metrics[ITERATION])
            self._trace.flush()

    def record_evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Write an evaluation while training, after `step` iterations."""
        append_evaluation(self._run, step, figures)
        self._loggers.evaluation(figures, step)

    def close(self) -> None:
        with writing(self._run.metrics):
            self._metrics.close()
        with writing(self._run.trace):
            self._trace.close(complete=self._run.owned)


def distributions(
    metrics: Mapping[str, Any], groups: Sequence[ScoredGroup], advantages: Advantages
) -> dict[str, np.ndarray]:
    """What loggers show as histograms: raw and normalised rewards and advantages of scored images,
    and the staleness of groups."""
    valid, found = advantages.valid, dict[str, np.ndarray]()
    if valid.any():
        for name, values in advantages.rewards.items():
            found[f"rewards/{name}"] = values[valid]
            found[f"rewards_normalised/{name}"] = advantages.normalised[name][valid]
        found["rewards/advantage"] = advantages.values[valid]
    if "version" in metrics:
        found["staleness/groups"] = staleness_of(groups, metrics["version"] - 1)
    return found


def append_evaluation(run: RunDirectory, step: int, figures: Mapping[str, float]) -> None:
    """Append a line to evaluations.jsonl."""
    run.check_owned()
    with writing(run.evaluations), run.evaluations.open("a") as file:
        file.write(dumps({STEP: step, **figures}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl. A last line that a crash cut short is left out.

    Raises:
        DataError: another line is not JSON, or has no iteration.
    """
    return read_records(path, ITERATION)


def repeatable(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics that equal runs have in common: without times and restarts."""
    return {key: value for key, value in metrics.items() if not key.startswith(UNREPEATABLE)}
