"""Rollouts on a console: a table of many, one in full."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.table import Table

from learner.rollouts.selection import PLACE, column_of, figure_names

TEXT = 28  # letters of a caption in the table
ERROR = 40


def name_of(row: Mapping[str, Any]) -> str:
    """ITERATION.GROUP.ROLLOUT"""
    return ".".join(str(row[part]) for part in PLACE)


def number(value: float | None) -> str:
    """A figure in few letters."""
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"


def shortened(text: str | None, letters: int) -> str:
    line = " ".join((text or "").split())
    return line if len(line) <= letters else f"{line[: letters - 3]}..."


def shown_condition(row: Mapping[str, Any], letters: int = TEXT) -> str:
    """Class and text, or caption."""
    index = row["class_index"]
    text = shortened(row["text"], letters)
    return text if index is None else f"{index} {text}".strip()


def table_of(rows: pa.Table) -> Table:
    """One line a rollout: its condition, figures and the age of its weights."""
    figures = figure_names(rows)
    failed = rows["error"].null_count < rows.num_rows
    table = Table(box=SIMPLE_HEAD)
    table.add_column("rollout", no_wrap=True)
    table.add_column("condition", overflow="fold")  # the one that becomes narrower
    for heading in (*figures, "version"):
        table.add_column(heading, justify="right", no_wrap=True)
    if failed:
        table.add_column("error", overflow="fold")
    columns = [column_of(rows, figure) for figure in figures]
    for row in rows.to_pylist():
        cells = [name_of(row), shown_condition(row), *(number(row[name]) for name in columns)]
        cells += [str(row["policy_version"])]
        table.add_row(*cells, *([shortened(row["error"], ERROR)] if failed else []))
    return table


def identity_lines(row: Mapping[str, Any]) -> list[str]:
    """What a rollout is, and what it was sampled and rewarded with."""
    iteration, group, rollout = (row[part] for part in PLACE)
    spec = ("temperature", "top_k", "top_p", "cfg_scale", "guidance")
    sampling = ", ".join(f"{name} {_plain(row[name])}" for name in spec)
    lines = [
        f"rollout {name_of(row)}: iteration {iteration}, group {group}, rollout {rollout}",
        f"condition: {shown_condition(row, 1000)}",
        f"sampled: weights of version {row['policy_version']}, {sampling}, seed {row['seed']}",
        f"rewarded: moments of {_plain(row['moments_version'])} iterations",
    ]
    return [*lines, f"error: {row['error']}"] if row["error"] else lines


def figures_in_group(group: pa.Table, row: Mapping[str, Any]) -> Table:
    """The figures of a rollout beside those of its group."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for heading in ("rollout", "mean of its group", "deviation", "place in it"):
        table.add_column(heading, justify="right")
    for figure in figure_names(group):
        column = column_of(group, figure)
        values = group[column].cast(pa.float64()).to_numpy()
        values, own = values[np.isfinite(values)], row[column]
        if not len(values) or own is None or math.isnan(own):
            table.add_row(figure, number(own), "-", "-", "-")
            continue
        place = 1 + int((values > own).sum())
        table.add_row(
            figure,
            number(own),
            number(float(values.mean())),
            number(float(values.std())),
            f"{place} of {len(values)}",
        )
    return table


def grid_lines(title: str, values: np.ndarray) -> list[str]:
    """(h, w) numbers under a title, a line a row of the image."""
    whole = values.dtype.kind in "iu"
    cells = [[str(v) if whole else f"{v:.2f}" for v in row] for row in values]
    width = max(len(cell) for row in cells for cell in row)
    return [title, *("  " + " ".join(cell.rjust(width) for cell in row) for row in cells)]


def _plain(value: Any) -> str:
    """A setting; a dash where an early version did not record it."""
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
