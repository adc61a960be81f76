"""Results of an evaluation: results.json (complete), results.md, results.csv, and the table."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cluster.io.files import replacing, writing
from learner.evaluation.kept.samples import CONTINUE, write_json
from rewards.metrics.evaluation import Figure
from rewards.metrics.figures import SECOND_SPACE, better, ordered, prefix_of, split_figure

JSON, MARKDOWN, CSV = "results.json", "results.md", "results.csv"
FORMAT = 1
HEADINGS = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "clip": "CLIP score",
    "hps": "HPSv2",
    "r_precision": "R-precision",
    "accuracy": "class accuracy",
    "vendi": "Vendi score in class",
    "entropy": "token entropy, nats",
}
ARROWS = {"lower": "↓", "higher": "↑", "": ""}
NARROWEST = 24  # columns of a policy in the console's table
FIRST = 26  # columns of the figures' names
Figures = Mapping[str, Figure]


@dataclass(frozen=True)
class Results:
    """Figures of all rows, and what they are of."""

    rows: Mapping[str, Figures]
    """Name of a row -> its figures."""
    identities: Mapping[str, Mapping[str, Any]]
    """Name of a row -> what its samples are of (`identity_of`)."""
    settings: Mapping[str, Any]
    """Of the metrics, the real images, versions."""

    def plain(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            "format": FORMAT,
            **self.settings,
            "rows": {
                name: {
                    "figures": {
                        figure: {"value": f.value, "low": f.low, "high": f.high}
                        for figure, f in figures.items()
                    },
                    "identity": self.identities[name],
                }
                for name, figures in self.rows.items()
            },
        }


def heading(figure: str, *, arrow: bool = True) -> str:
    """A figure's name in tables."""
    prefix, name = split_figure(figure)
    named = "2nd" if prefix == prefix_of(SECOND_SPACE) else prefix.rstrip("/")
    space = f" ({named} space)" if prefix else ""
    name, comma, part = name.partition(", ")
    mark = ARROWS[better(figure)] if arrow else ""
    return f"{HEADINGS.get(name, name)}{comma}{part}{space} {mark}".rstrip()


def figures_of(rows: Mapping[str, Figures]) -> list[str]:
    """Every figure that some row has, in the order of `figures.ordered`."""
    return ordered(figure for figures in rows.values() for figure in figures)


def best_of(rows: Mapping[str, Figures], figure: str) -> set[str]:
    """The rows with the best value; none if there are fewer than two rows, or neither direction is
    better."""
    there = {
        name: figures[figure].value
        for name, figures in rows.items()
        if figure in figures and math.isfinite(figures[figure].value)
    }
    direction = better(figure)
    if len(there) < 2 or not direction:
        return set()
    best = (min if direction == "lower" else max)(there.values())
    return {name for name, value in there.items() if value == best}


def shown(figure: Figure | None) -> str:
    """A figure with its interval: "3.211 [2.95, 3.48]"."""
    if figure is None:
        return "-"
    if math.isnan(figure.low) or math.isnan(figure.high):
        return number(figure.value)
    return f"{number(figure.value)} [{number(figure.low)}, {number(figure.high)}]"


def number(value: float, digits: int = 4) -> str:
    """So many significant digits, without an exponent."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value)}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(places, 8)}f}"


def tables(results: Results, width: int) -> list[Table]:
    """Tables for a console of so many columns: figures down, policies across. Best ones have a
    star."""
    names = list(results.rows)
    at_once = max(1, (width - FIRST) // NARROWEST)
    found = []
    for first in range(0, len(names), at_once):
        some = names[first : first + at_once]
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("figure", no_wrap=True)
        for name in some:
            table.add_column(name, justify="right")
        for figure in figures_of(results.rows):
            best = best_of(results.rows, figure)
            cells = [
                shown(results.rows[name].get(figure)) + ("*" if name in best else "")
                for name in some
            ]
            table.add_row(heading(figure), *cells)
        found.append(table)
    return found


def show(results: Results, console: Console) -> None:
    """Print the tables."""
    for table in tables(results, console.width):
        console.print(table)
    console.print(legend(results), highlight=False)


def legend(results: Results) -> str:
    """What the table shows."""
    intervals = any(
        math.isfinite(f.low) for figures in results.rows.values() for f in figures.values()
    )
    text = "* the best of a row, whether or not the difference is significant (--compare A B says)"
    if intervals:
        text = f"[low, high]: 95 % bootstrap interval. {text}"
    return text


def markdown(results: Results) -> str:
    """The table in Markdown, with what it was computed with."""
    names = list(results.rows)
    lines = [
        f"| figure | {' | '.join(names)} |",
        f"| --- |{' ---: |' * len(names)}",
    ]
    for figure in figures_of(results.rows):
        best = best_of(results.rows, figure)
        cells = [shown(results.rows[name].get(figure)) for name in names]
        cells = [f"**{cell}**" if name in best else cell for name, cell in zip(names, cells)]
        lines.append(f"| {heading(figure)} | {' | '.join(cells)} |")
    about = [f"- {name}: {value}" for name, value in results.settings.items() if name != "command"]
    command = results.settings.get("command", "")
    return "\n".join(
        [
            "# Evaluation",
            "",
            *lines,
            "",
            "Bold: the best of a line, whether or not the difference is significant. [low, high]: "
            "95 % bootstrap interval.",
            "",
            *about,
            "",
            f"    {command}",
            "",
        ]
    )


def comma_separated(results: Results) -> str:
    """One line a row and figure."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "figure", "value", "low", "high", "better"])
    for name, figures in results.rows.items():
        for figure in figures_of({name: figures}):
            f = figures[figure]
            writer.writerow([name, figure, *map(_cell, (f.value, f.low, f.high)), better(figure)])
    return text.getvalue()


def _cell(value: float) -> str:
    return repr(value) if math.isfinite(value) else ""


def write_results(out: Path, results: Results) -> None:
    """Write the three files.

    Raises:
        StorageError: no space left.
    """
    write_text(out / MARKDOWN, markdown(results))
    write_text(out / CSV, comma_separated(results))
    write_json(out / JSON, results.plain())


def write_text(path: Path, text: str) -> None:
    """Raises StorageError: it cannot be written."""
    with writing(path, then=CONTINUE), replacing(path, durable=True) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
