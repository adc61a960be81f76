"""The bench's CSV: one figure a row, in long format."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from cluster.io.files import replacing

RESULTS = Path(__file__).with_name("results.csv")


@dataclass(frozen=True, slots=True)
class Job:
    """What is computed at once, and the settings of its rows."""

    part: str
    dim: int
    """D; of the part `plan`, the number of GPUs."""
    exponent: float
    """Of the spectrum; 0 in the part `plan`."""
    strength: float = 1.0
    """Of the generator's faults."""
    batch: int = 0
    window: int = 0
    iterations: int = 0

    @property
    def key(self) -> tuple[Any, ...]:
        return astuple(self)

    def at(self, batch: int, window: int, iterations: int) -> Job:
        return replace(self, batch=batch, window=window, iterations=iterations)


@dataclass(frozen=True, slots=True)
class Row:
    """A figure."""

    job: Job
    space: str
    figure: str
    value: float

    @property
    def cells(self) -> tuple[Any, ...]:
        return *self.job.key, self.space, self.figure, f"{self.value:.6g}"


COLUMNS = [*(column.name for column in fields(Job)), "space", "figure", "value"]


@dataclass
class Results:
    """Rows of a CSV."""

    rows: list[Row] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Of a file; none if it does not exist."""
        if not path.exists():
            return cls()
        with path.open(newline="", encoding="utf-8") as file:
            found = list(csv.DictReader(file))
        return cls([_row(cells) for cells in found])

    def has(self, job: Job) -> bool:
        return any(row.job == job for row in self.rows)

    def add(self, job: Job, rows: Iterable[Row]) -> None:
        """All rows of a job, once they are all known."""
        self.rows = sorted(
            [*self.rows, *rows], key=lambda row: (*row.job.key, row.space, row.figure)
        )

    def write(self, path: Path) -> None:
        """Atomically, sorted: the same rows give the same bytes."""
        with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(row.cells for row in self.rows)

    def value(self, job: Job, space: str, figure: str) -> float:
        """
        Raises:
            KeyError: no such row.
        """
        for row in self.rows:
            if (row.job, row.space, row.figure) == (job, space, figure):
                return row.value
        raise KeyError(f"{job} {space} {figure}")


def _row(cells: dict[str, str]) -> Row:
    exponent, strength = float(cells["exponent"]), float(cells["strength"])
    dim, *others = (int(cells[name]) for name in ("dim", "batch", "window", "iterations"))
    job = Job(cells["part"], dim, exponent, strength, *others)
    return Row(job, cells["space"], cells["figure"], float(cells["value"]))
