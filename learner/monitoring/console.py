"""Console output of a run: progress bar with the main metrics, timeline, table of evaluations."""

from __future__ import annotations

import io
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from cluster.program.console import make_console
from cluster.program.logs import FILE_ONLY, PLAIN_ONLY
from learner.monitoring.timeline import RoleUse
from rewards.config import LOO_FID

logger = logging.getLogger(__name__)

FIGURES = {"FID": "fid/ema", "entropy": "policy/entropy"}
"""Label in the progress bar -> metric; between the rewards and img/s."""
REWARD = "reward/"
COLUMNS = {
    "FID↓": "fid",
    "dens.↑": "density",
    "cov.↑": "coverage",
    "prec.↑": "precision",
    "recall↑": "recall",
    "class↑": "accuracy",
    "CLIP↑": "clip",
    "entr.": "entropy",
}
"""Heading of the table -> metric of the evaluation."""
LEGEND = """  FID, density, coverage, precision, recall: against held-out images, in the judge's
  features; class: share that the judge's classifier puts in the requested class;
  CLIP: a second CLIP, never rewarded; entr.: mean token entropy, nats"""
LINES_WITHOUT_TERMINAL = 20
RATE_WINDOW = 20  # iterations
NARROW = 110  # columns; below, the bar gives way to figures
REST = 36  # columns of everything but bar and figures


class RunConsole:
    """Progress bar and tables. Without a terminal the bar becomes a few log lines.

    Args:
        console: standard output by default.
    """

    def __init__(self, iterations: int, console: Console | None = None) -> None:
        self._console = console or make_console()
        self._iterations = iterations
        self._bar = 10 if self._console.width < NARROW else 24
        self._recent: deque[tuple[float, float]] = deque(maxlen=RATE_WINDOW)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=self._bar),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def start(self, done: int) -> None:
        """Show the bar at `done` iterations, or set it back to them."""
        if self._task is not None:
            self._progress.update(self._task, completed=done)
            return
        self._task = self._progress.add_task(
            "learning", total=self._iterations, completed=done, figures=""
        )

    @property
    def seconds_per_iteration(self) -> float:
        """Mean over the last iterations; 0 before the first."""
        return sum(s for s, _ in self._recent) / max(len(self._recent), 1)

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a finished iteration."""
        done = metrics["iteration"]
        seconds = metrics["time/iteration"]
        self._recent.append((seconds, metrics["time/images_per_s"] * seconds))
        rate = sum(images for _, images in self._recent) / sum(s for s, _ in self._recent)
        rewards = {k.removeprefix(REWARD): k for k in metrics if k.startswith(REWARD)}
        rewards.pop(LOO_FID, None)
        shown = {**rewards, **FIGURES}
        parts = [f"{name} {metrics[key]:.3g}" for name, key in shown.items() if key in metrics]
        parts.append(f"img/s {rate:.3g}")
        figures = "  ".join(parts)
        if self._task is not None:
            fitting = fit(parts, self._console.width - REST - self._bar)
            self._progress.update(self._task, completed=done, figures=fitting)
        every = max(1, self._iterations // LINES_WITHOUT_TERMINAL)
        if done % every == 0 or done == self._iterations:
            logger.info(f"iteration {done}/{self._iterations}  {figures}", extra=PLAIN_ONLY)

    def timeline(self, shares: Sequence[RoleUse], bottleneck: str) -> None:
        """Show the working time of each role, and the bottleneck."""
        table = Table(title="Timeline (trace.json)", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("role", no_wrap=True)
        for heading in ("workers", "busy", "idle"):
            table.add_column(heading, justify="right", no_wrap=True)
        for use in shares:
            table.add_row(use.role, str(use.workers), f"{use.busy:.0%}", f"{use.idle:.0%}")
        self._show(table)
        logger.info(bottleneck)

    def table(self, rows: Mapping[str, Mapping[str, float]]) -> None:
        """Show the table of evaluations, one row a policy."""
        images = max((metrics.get("images", 0) for metrics in rows.values()), default=0)
        title = f"Held-out judge, {images:g} images of each policy" if images else "Held-out judge"
        table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("policy", no_wrap=True)
        for heading in COLUMNS:
            table.add_column(heading, justify="right", no_wrap=True)
        for name, metrics in rows.items():
            cells = (f"{metrics[k]:.2f}" if k in metrics else "-" for k in COLUMNS.values())
            table.add_row(name, *cells)
        self._show(table)
        logger.info(LEGEND)

    def _show(self, table: Table) -> None:
        """Print to the console in its width, and to the log in a fixed one."""
        text = io.StringIO()
        Console(file=text, width=NARROW, force_terminal=False, markup=False, emoji=False).print(
            table
        )
        logger.info(f"\n{text.getvalue().rstrip()}", extra=FILE_ONLY)
        self._console.print(table)


def fit(parts: Sequence[str], columns: int) -> str:
    """Join as many parts as fit into the columns."""
    text = ""
    for part in parts:
        longer = f"{text}  {part}" if text else part
        if len(longer) > columns:
            break
        text = longer
    return text
