"""What a run's evaluations say over time: whether training should end, and when to warn.

Pure functions of the evaluations while training and of the iterations' metrics, so that a resumed
run, which replays its records, goes on as if it had not stopped.

Reward hacking is defined so: at each of the last `CONFIRMED` evaluations the judge's FID was more
than `evaluation.max_fid_rise` above its least before them, and since that least one a reward that
has a weight rose: its mean over `WINDOW` iterations by more than three standard errors, or for the
distribution reward, the FID that it lowers (fid/ema, say) fell by as much.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.errors import LearningError
from cluster.io.strict_json import number
from learner.output import EvaluationConfig, best_step

CONFIRMED = 2
"""Evaluations in a row that must agree: one alone may be noise."""
WINDOW = 10
"""Iterations that a reward is averaged over."""
FEWEST = 3  # iterations of which a standard error is computed
ERRORS = 3.0  # standard errors that a rise must exceed
DIVERSITY = ("coverage", "recall")
History = Mapping[int, Mapping[str, float]]
"""Step -> figures of its evaluation, in the order of the steps; 0: the base policy's."""


@dataclass(frozen=True)
class Found:
    """What an evaluation shows."""

    notes: tuple[str, ...] = ()
    """Warnings; each once a run."""
    stop: str = ""
    """Why the run must stop, or empty."""

    def enforce(self) -> None:
        """Raises LearningError if the run must stop, with what to change."""
        if self.stop:
            raise LearningError(self.stop)


def stalled(history: History, figure: str, patience: int) -> str:
    """Why training ends early: evaluations since the best one; empty if it goes on.

    Args:
        figure: the one that is watched (`output.keep_best`).
        patience: of `evaluation.patience`; 0: training never ends early.
    """
    trained = {step: figures for step, figures in history.items() if step}
    best = best_step(figure, trained)
    if best is None:  # nothing was watched
        return ""
    since = [step for step in trained if step > best]
    if not patience or len(since) < patience:
        return ""
    return (
        f"{figure} has not improved in {len(since)} evaluation{'s' * (len(since) > 1)} (best: "
        f"{trained[best][figure]:.4g} after iteration {best}; evaluation.patience {patience})"
    )


@dataclass
class Trends:
    """Warnings about evaluations while training.

    Args:
        fid: the judge's figure that shows reward hacking: FID in a space that no reward uses.
        rewards: names of rewards with a weight, as in the metrics reward/NAME.
        lowered: distribution reward with a weight -> the metric of the FID that it lowers.
    """

    config: EvaluationConfig
    fid: str
    rewards: Sequence[str]
    lowered: Mapping[str, str]
    _warned: set[str] = field(default_factory=set)

    def replay(self, history: History, metrics: Sequence[Mapping[str, Any]]) -> None:
        """Restore the state of a resumed run; warnings are not repeated, and nothing stops."""
        for step in history:
            if step:
                self(upto(history, step), metrics)

    def __call__(self, history: History, metrics: Iterable[Mapping[str, Any]]) -> Found:
        """Check the newest evaluation.

        Args:
            metrics: of the run's iterations, as in its records.
        """
        step = max(history)
        problems = {
            "hacking": (self.config.hacking, self._hacking(history, tuple(metrics))),
            "diversity": (self.config.diversity, self._diversity(history)),
        }
        notes, stop = [], ""
        for name, (action, problem) in problems.items():
            if not problem or action == "off":
                continue
            text = f"evaluation after iteration {step}: {problem}"
            if action == "stop":
                stop = stop or text
            elif name not in self._warned:
                self._warned.add(name)
                notes.append(text)
        return Found(tuple(notes), stop)

    def _hacking(self, history: History, metrics: Sequence[Mapping[str, Any]]) -> str:
        """The problem, or empty; so for the other."""
        values = {step: row[self.fid] for step, row in history.items() if _has(row, self.fid)}
        newest = [*values][-CONFIRMED:]
        before = [step for step in values if step not in newest]
        if len(newest) < CONFIRMED or not before or newest[-1] != max(history):
            return ""
        best = min(before, key=lambda step: (values[step], step))
        bound = (1 + self.config.max_fid_rise) * values[best]
        if not all(values[step] > bound for step in newest):
            return ""
        rises = self._rises(metrics, best, newest[-1])
        if not rises:
            return ""
        return (
            f"{' and '.join(rises)} since iteration {best}, while the judge's {self.fid} went from "
            f"{values[best]:.4g} to {values[newest[-1]]:.4g}: the policy learns what the reward "
            "measures, not better images. Look at gallery/; go on from an earlier checkpoint with "
            "a larger loss.kl_coef, a lower learner.lr or less weight on that reward, or end such "
            "runs by evaluation.patience"
        )

    def _rises(self, metrics: Sequence[Mapping[str, Any]], best: int, now: int) -> list[str]:
        """Rewards that rose between two steps, as text."""
        found = [
            f"the reward {name} rose from {change[0]:.4g} to {change[1]:.4g}"
            for name in self.rewards
            if (change := _change(metrics, f"reward/{name}", best, now, sign=1))
        ]
        found += [
            f"the FID that the reward {reward} lowers ({metric}) fell from "
            f"{change[0]:.4g} to {change[1]:.4g}"
            for reward, metric in self.lowered.items()
            if (change := _change(metrics, metric, best, now, sign=-1))
        ]
        return found

    def _diversity(self, history: History) -> str:
        first, step = history[min(history)], max(history)
        share = 1 - self.config.max_diversity_loss
        space = self.fid.removesuffix("fid")  # the one that no reward uses, beside the first
        names = dict.fromkeys((*DIVERSITY, *(f"{space}{name}" for name in DIVERSITY)))
        lost = [
            f"{name} is {history[step][name]:.3f}, of {first[name]:.3f}"
            for name in names
            if _has(first, name)
            and _has(history[step], name)
            and history[step][name] < share * first[name]
        ]
        if step == min(history) or not lost:
            return ""
        since = "the base policy's" if not min(history) else f"that after iteration {min(history)}"
        return (
            f"{' and '.join(lost)} ({since}): images become alike, more than "
            f"evaluation.max_diversity_loss {self.config.max_diversity_loss:g} allows. More weight "
            "on rewards.loo_fid, --entropy.controller target or a larger loss.kl_coef keep them "
            "apart; an earlier checkpoint is more diverse"
        )


def upto(history: History, step: int) -> dict[int, Mapping[str, float]]:
    """The evaluations up to a step."""
    return {each: figures for each, figures in history.items() if each <= step}


def _has(figures: Mapping[str, float], name: str) -> bool:
    return math.isfinite(number(figures.get(name)))


def _change(
    metrics: Sequence[Mapping[str, Any]], name: str, first: int, last: int, *, sign: int
) -> tuple[float, float] | None:
    """Means of a metric around two steps, if it moved by more than its noise in the direction of
    `sign`."""
    values = [number(row.get(name)) for row in metrics]  # row i is of iteration i + 1
    start = values[max(first - WINDOW, 0) : first] if first >= FEWEST else values[:WINDOW]
    end = values[max(last - WINDOW, 0) : last]
    parts = [np.array([value for value in part if math.isfinite(value)]) for part in (start, end)]
    if min(len(part) for part in parts) < FEWEST:
        return None
    error = math.sqrt(sum(part.var(ddof=1) / len(part) for part in parts))
    before, after = float(parts[0].mean()), float(parts[1].mean())
    return (before, after) if sign * (after - before) > ERRORS * error else None
