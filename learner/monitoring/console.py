"""Console output of a run: a live table on a terminal, else a line an iteration; timeline and table
of evaluations at the end."""

from __future__ import annotations

import io
import logging
import textwrap
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from cluster.program.console import make_console
from cluster.program.logs import FILE_ONLY, PLAIN_ONLY
from learner.monitoring.live import REWARD, LiveTable, Pace, further_fids
from learner.monitoring.timeline import RoleUse
from rewards.config import is_loo_fid

logger = logging.getLogger(__name__)

FIGURES = {"FID": "fid/ema", "entropy": "policy/entropy"}
"""Label in a line of an iteration -> metric; between the rewards and img/s."""
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
"""Heading of the table -> figure of the evaluation."""
FURTHER = {
    "sFID↓": "sfid",
    "IS↑": "inception_score",
    "Vendi↑": "vendi",
    "HPS↑": "hps",
    "R-prec.↑": "r_precision",
}
"""The same, of figures that some judges have."""
DECIMALS = {"hps": 4}
"""Of a figure in the table; others have two."""
LEGEND = {
    "fid": "FID, density, coverage, precision, recall: against held-out images, in the judge's "
    "features",
    "accuracy": "class: share that the judge's classifier puts in the requested class",
    "clip": "CLIP: a second CLIP, never rewarded",
    "entropy": "entr.: mean token entropy, nats",
    "sfid": "sFID: FID in Inception's spatial features",
    "inception_score": "IS: Inception Score",
    "vendi": "Vendi: effective number of different images in a class",
    "hps": "HPS: HPSv2's score",
    "r_precision": "R-prec.: share that the judge's CLIP gives its own text among the run's",
}
"""Figure -> what the line below the table says if it is there."""
LEGEND_WIDTH = 85  # columns
REDRAWS_PER_S = 2
LOG_WIDTH = 110  # columns of tables in the log


class RunConsole:
    """Live table while training, and tables at the end. Without a terminal the live table becomes a
    line an iteration; the log has those lines in any case.

    Args:
        console: standard output by default.
    """

    def __init__(self, iterations: int, console: Console | None = None) -> None:
        self._console = console or make_console()
        self._iterations = iterations
        self._pace = Pace(iterations)
        self._table = LiveTable(iterations, self._pace)
        self._live: Live | None = None
        self._warnings = _Warnings(self._table)

    def __enter__(self) -> Self:
        logging.getLogger().addHandler(self._warnings)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        logging.getLogger().removeHandler(self._warnings)

    def start(self, done: int, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """Begin at `done` iterations, or go back to them.

        Args:
            rows: metrics of the run so far.
        """
        self._table.begin(done, rows)
        if self._console.is_terminal and self._live is None:
            self._live = Live(
                self._table,
                console=self._console,
                refresh_per_second=REDRAWS_PER_S,
                vertical_overflow="crop",
            )
            self._live.start()

    def stop(self) -> None:
        """Leave the live table as it is; what follows appears below it."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    @property
    def seconds_per_iteration(self) -> float:
        """Mean over the last iterations; 0 before the first."""
        return self._pace.seconds

    def roles(self, shares: Sequence[RoleUse]) -> None:
        """Show the working time of each role so far, from the next update on."""
        self._table.shares = shares

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a finished iteration."""
        done = metrics["iteration"]
        self._pace.add(metrics["time/iteration"], metrics["time/images_per_s"])
        self._table.add(metrics)
        rewards = {k.removeprefix(REWARD): k for k in metrics if k.startswith(REWARD)}
        rewards = {name: key for name, key in rewards.items() if not is_loo_fid(name)}
        spaces = {f"FID {name}": key for name, key in further_fids(metrics).items()}
        shown = {**rewards, **spaces, **FIGURES}
        parts = [f"iteration {done}/{self._iterations}"]
        parts += [f"{name} {metrics[key]:.3g}" for name, key in shown.items() if key in metrics]
        parts.append(f"img/s {self._pace.images_per_s:.3g}")
        if done < self._iterations:
            parts.append(f"{self._pace.left(done)} left")
        logger.info("  ".join(parts), extra=PLAIN_ONLY)

    def evaluated(self, step: int, figures: Mapping[str, float]) -> None:
        """Show an evaluation while training."""
        columns = {**COLUMNS, **FURTHER}
        parts = [f"{h} {figures[k]:.3g}" for h, k in columns.items() if k in figures]
        self._table.evaluated(step, "  ".join(parts))
        logger.info(f"evaluation after {step}: {'  '.join(parts)}", extra=PLAIN_ONLY)

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
        there = {name for figures in rows.values() for name in figures}
        columns = {h: name for h, name in {**COLUMNS, **FURTHER}.items() if name in there}
        for heading in columns:
            table.add_column(heading, justify="right", no_wrap=True)
        for name, metrics in rows.items():
            table.add_row(name, *(_cell(metrics, figure) for figure in columns.values()))
        self._show(table)
        said = "; ".join(text for figure, text in LEGEND.items() if figure in there)
        logger.info(textwrap.indent(textwrap.fill(said, LEGEND_WIDTH - 2), "  "))

    def _show(self, table: Table) -> None:
        """Print to the console in its width, and to the log in a fixed one."""
        text = io.StringIO()
        Console(file=text, width=LOG_WIDTH, force_terminal=False, markup=False, emoji=False).print(
            table
        )
        logger.info(f"\n{text.getvalue().rstrip()}", extra=FILE_ONLY)
        self._console.print(table)


def _cell(figures: Mapping[str, float], name: str) -> str:
    return f"{figures[name]:.{DECIMALS.get(name, 2)}f}" if name in figures else "-"


class _Warnings(logging.Handler):
    """Counts warnings for the live table."""

    def __init__(self, table: LiveTable) -> None:
        super().__init__(logging.WARNING)
        self._table = table

    def emit(self, record: logging.LogRecord) -> None:
        self._table.warnings += 1
