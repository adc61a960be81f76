"""Results of a part: a CSV with a line for each figure of each policy and seed.

    part,seed,policy,metric,value
    llamagen,201,base,accuracy,0.751

Lines are sorted and values have six digits, so that equal results are equal files.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.errors import DataError
from cluster.io.files import replacing, writing

HEADER = ("part", "seed", "policy", "metric", "value")
Figures = Mapping[str, float]
"""Metric -> value."""


@dataclass(frozen=True)
class Results:
    """Figures of a part."""

    part: str
    seeds: tuple[int, ...]
    figures: Mapping[tuple[int, str], Figures]
    """(Seed, policy) -> figures."""

    @property
    def policies(self) -> tuple[str, ...]:
        """Policies that every seed has, in alphabetical order."""
        names = {policy for _, policy in self.figures}
        return tuple(
            name for name in sorted(names) if all((s, name) in self.figures for s in self.seeds)
        )

    def metrics(self, policy: str) -> tuple[str, ...]:
        """Metrics that a policy has in every seed."""
        first, *others = (self.figures[seed, policy] for seed in self.seeds)
        return tuple(name for name in first if all(name in each for each in others))

    def values(self, policy: str, metric: str) -> np.ndarray:
        """One value a seed."""
        return np.array([self.figures[seed, policy][metric] for seed in self.seeds])


def to_csv(results: Results) -> str:
    """The text of the file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for (seed, policy), figures in sorted(results.figures.items()):
        for metric, value in sorted(figures.items()):
            writer.writerow([results.part, seed, policy, metric, f"{value:.6g}"])
    return text.getvalue()


def write_csv(results: Results, path: Path) -> None:
    with writing(path, then="start again"), replacing(path) as partial:
        partial.write_text(to_csv(results), encoding="utf-8")


def read_csv(path: Path) -> Results:
    """
    Raises:
        DataError: not such a file; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    lines = list(csv.reader(io.StringIO(text)))
    if not lines or tuple(lines[0]) != HEADER:
        found = ",".join(lines[0]) if lines else ""
        raise DataError(f"{path}, line 1: expected {','.join(HEADER)}, found {found!r}")
    return _collect(path, lines[1:])


def _collect(path: Path, lines: Iterable[list[str]]) -> Results:
    figures: dict[tuple[int, str], dict[str, float]] = {}
    parts: set[str] = set()
    for number, line in enumerate(lines, start=2):
        try:
            part, seed, policy, metric, value = line
            found = figures.setdefault((int(seed), policy), {})
            if metric in found:
                raise ValueError("a second value of this metric")
            found[metric] = float(value)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: expected {','.join(HEADER)}, found {','.join(line)!r} "
                f"({error})"
            ) from None
        parts.add(part)
    if len(parts) != 1:
        raise DataError(f"{path}: expected results of one part, found {sorted(parts)}")
    seeds = tuple(sorted({seed for seed, _ in figures}))
    return Results(parts.pop(), seeds, figures)


def missing(results: Results) -> list[str]:
    """ "POLICY, METRIC, seed SEED" of each value that is not a number."""
    return [
        f"{policy}, {metric}, seed {seed}"
        for (seed, policy), figures in sorted(results.figures.items())
        for metric, value in figures.items()
        if math.isnan(value)
    ]
