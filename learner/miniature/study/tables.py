"""Tables and numbers of the results page, from a part's figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import DataError
from learner.miniature.study.claims import Claim, pairs_of
from learner.miniature.study.names import BASE, BEST
from learner.miniature.study.part import Part
from learner.miniature.study.results import Results
from learner.miniature.study.runs import run_config
from learner.miniature.study.statistics import Mean, Paired, corrected, mean, paired
from rewards.metrics.figures import better

HEADINGS = {
    "fid": "FID",
    "density": "density",
    "coverage": "coverage",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "class accuracy",
    "r_precision": "R-precision",
    "clip": "CLIP",
    "entropy": "entropy",
}
SPACES = {"": "", "second/": "pixel ", "clip/": "CLIP "}
ARROWS = {"lower": " ↓", "higher": " ↑", "": ""}
COMPARED = (
    "fid",
    "accuracy",
    "density",
    "coverage",
    "recall",
    "second/fid",
    "second/coverage",
    "second/recall",
    "clip/fid",
    "clip/coverage",
    "clip/recall",
)
"""Figures of the table of comparisons; accuracy is that of captions where these are conditions."""


def heading(metric: str) -> str:
    """A figure in words: second/fid -> pixel FID."""
    space, slash, name = metric.rpartition("/")
    return SPACES.get(space + slash, f"{space} ") + HEADINGS.get(name, name)


def with_arrow(metric: str) -> str:
    return heading(metric) + ARROWS[better(metric)]


@dataclass(frozen=True)
class View:
    """A part and its results."""

    part: Part
    results: Results

    def values(self, policy: str, metric: str) -> np.ndarray:
        """One value a seed.

        Raises:
            DataError: there are none.
        """
        metric = self.name(metric)
        if policy == BEST:
            found = [self.values(each, metric) for each in self.part.base if self.has(each)]
            best = np.min if better(metric) == "lower" else np.max
            return np.asarray(best(found, axis=0))
        if policy not in self.results.policies or metric not in self.results.metrics(policy):
            raise DataError(f"the results of {self.part.name} have no {metric!r} of {policy!r}")
        return self.results.values(policy, metric)

    def name(self, metric: str) -> str:
        """A figure's name here: with captions as conditions, accuracy is R-precision."""
        there = self.results.metrics(BASE)
        return "r_precision" if metric == "accuracy" and "r_precision" in there else metric

    def has(self, policy: str) -> bool:
        return policy in (BEST, *self.results.policies)

    @property
    def policies(self) -> tuple[str, ...]:
        """In the order of tables: the base policy, the arms, others."""
        arms = [p for name in self.part.names for p in self.part.arm(name).policies]
        ranked = dict.fromkeys((*self.part.base, *arms, *self.results.policies))
        return tuple(policy for policy in ranked if policy in self.results.policies)

    def compare(self, policy: str, other: str, metric: str) -> Paired:
        lower = better(self.name(metric)) == "lower"
        return paired(
            self.values(policy, metric), self.values(other, metric), lower_is_better=lower
        )

    @cached_property
    def comparisons(self) -> dict[tuple[str, str, str], Paired]:
        """(Policy, other, metric) -> all comparisons of the part, corrected for their number."""
        there = [policy for policy in self.policies if policy not in self.part.base]
        pairs = [p for p in pairs_of(self.part.name, there) if self.has(p[0]) and self.has(p[1])]
        metrics = [m for m in COMPARED if self.name(m) in self.results.metrics(BASE)]
        keys = [(policy, other, metric) for policy, other in pairs for metric in metrics]
        return dict(zip(keys, corrected([self.compare(*key) for key in keys])))

    def jointly(self, policy: str, other: str, metrics: Iterable[str]) -> int:
        """Seeds in which a policy is better in all of these figures."""
        wins = [
            np.sign(self.values(policy, m) - self.values(other, m))
            * (-1 if better(self.name(m)) == "lower" else 1)
            for m in metrics
        ]
        return int((np.array(wins) > 0).all(axis=0).sum())


def number(value: float, *, sign: bool = False) -> str:
    """Two decimals, one from 10 on, as on the other pages: .05, 2.61, 24.7; with `sign`, +.05."""
    if math.isnan(value):
        return "-"
    digits = f"{abs(value):.{1 if abs(value) >= 10 else 2}f}".removeprefix("0")
    zero = not digits.strip(".0")
    return ("" if zero else "-" if value < 0 else "+" if sign else "") + digits


def interval(found: Mean, *, sign: bool = False) -> str:
    """A mean with half its interval: .05±.02."""
    half = "" if math.isnan(found.half) else f"±{number(found.half)}"
    return number(found.value, sign=sign) + half


def probability(value: float) -> str:
    """p = .012, p < .001."""
    return "p < .001" if value < 0.001 else f"p = {value:.3f}".replace("0.", ".", 1)


def table(view: View, metrics: Sequence[str]) -> str:
    """Means with intervals, a row a policy."""
    there = [view.name(metric) for metric in metrics]
    there = [metric for metric in there if metric in view.results.metrics(BASE)]
    rows = [["policy", *map(with_arrow, there)]]
    for policy in view.policies:
        cells = [interval(mean(view.values(policy, metric))) for metric in there]
        rows.append([policy, *cells])
    return markdown(rows)


def settings_table(part: Part) -> str:
    """Weights of each arm's rewards and of real images, its entropy controller and its learning
    rate: a row an arm."""
    rows = [
        ["arm", "CLIP", "HPSv2", "LOO-FID", "in further spaces", "real images", "entropy",
         "learning rate"]
    ]  # fmt: skip
    for arm in part.arms:
        run = run_config(part, arm, 0, Path("networks"))
        instance = [_weight(term) for term in (run.rewards.clip, run.rewards.hps)]
        further = "; ".join(map(_weight, run.rewards.further.values())) or "-"
        entropy = "-" if run.entropy.controller == "none" else run.entropy.controller
        cells = [*instance, _weight(run.rewards.loo_fid), further, _weight(run.real), entropy]
        rows.append([arm.name, *cells, f"{run.learner.lr:g}"])
    return markdown(rows)


def _weight(term: Any) -> str:
    """A weight, with what the reward is divided by, and whether it is joint: "2, batch, joint"."""
    if not (term.weight and getattr(term, "enabled", True)):
        return "-"
    joint = "joint" * getattr(term, "joint", False)
    return ", ".join(filter(None, [f"{term.weight:g}", getattr(term, "normalise", ""), joint]))


def comparison_table(view: View) -> str:
    """Differences with intervals and seeds that are better, a row a pair of policies."""
    found = view.comparisons
    metrics = list(dict.fromkeys(metric for _, _, metric in found))
    rows = [["policy, against", *(with_arrow(view.name(metric)) for metric in metrics)]]
    for pair in dict.fromkeys(key[:2] for key in found):
        cells = [comparison_cell(found[*pair, metric]) for metric in metrics]
        rows.append([f"{pair[0]}, against {pair[1]}", *cells])
    return markdown(rows)


def comparison_cell(found: Paired) -> str:
    """+.05±.02 (9/10), with a star where significant."""
    star = "\\*" if found.significant else ""
    return f"{interval(found.difference, sign=True)}{star} ({found.better}/{found.seeds})"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, the first row its head."""
    head, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *others])


@dataclass(frozen=True)
class Verdict:
    """A claim and what came out."""

    claim: Claim
    holds: bool
    """In each figure the policy is better in nine of ten seeds, and in all of fewer than ten."""
    text: str


def verdict(view: View, claim: Claim) -> Verdict | None:
    """None if a policy was not run."""
    if not (view.has(claim.policy) and view.has(claim.other)):
        return None
    metrics = [m for m in claim.metrics if view.name(m) in view.results.metrics(BASE)]
    found = {m: view.compare(claim.policy, claim.other, m) for m in metrics}
    seeds = len(view.results.seeds)
    holds = all(10 * each.better >= 9 * seeds for each in found.values())
    counts = ", ".join(
        f"{heading(view.name(m))} {each.better} ({interval(each.difference, sign=True)})"
        for m, each in found.items()
    )
    text = (
        f"Seeds of {seeds} in which {claim.policy} is better than {claim.other}: {counts}; all of "
        f"these at once: {view.jointly(claim.policy, claim.other, metrics)}"
    )
    return Verdict(claim, holds, text)
