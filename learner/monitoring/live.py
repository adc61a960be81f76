"""The live table of a run on a terminal: progress, metrics with their change since the start, idle
time of roles, newest evaluation."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from learner.monitoring.timeline import RoleUse
from rewards.config import is_loo_fid

REWARD = "reward/"
ROWS = {
    "fid/ema": "FID, history",
    "fid/batch": "FID, batch",
    "policy/entropy": "entropy",
    "policy/entropy_coef": "its weight",
    "policy/reference_kl": "KL to base",
    "policy/mismatch_kl": "KL to sampler",
    "policy/clip_fraction": "clipped",
    "policy/staleness": "staleness",
}
"""Metric -> its name in the table; rewards come before them."""
PACE_WINDOW, ETA_WINDOW = 20, 200  # iterations; evaluations would jolt a short mean
POINTS = 32  # of a curve
NAME, FIGURE = 14, 11  # columns
WITH_START, WITH_CURVE = NAME + 3 * FIGURE, NAME + 3 * FIGURE + 18
"""Columns of a terminal with room for the start, and for a curve."""
SHORTEST_BAR = 10
SMALLEST = 10  # lines of a terminal with room for more than progress
NOTHING = 1e-6
"""Figures nearer to 0 are 0: a KL that rounding makes, say."""
LEVELS = "▁▂▃▄▅▆▇█"


def further_fids(metrics: Iterable[str]) -> dict[str, str]:
    """Further feature space of the rewards -> the metric of its FID, fid/SPACE/ema."""
    found = {}
    for metric in metrics:
        match metric.split("/"):
            case ["fid", space, "ema"]:
                found[space] = metric
    return found


class Pace:
    """Seconds per iteration, images per second and the time left, from finished iterations."""

    def __init__(self, iterations: int) -> None:
        self._iterations = iterations
        self._recent: deque[tuple[float, float]] = deque(maxlen=PACE_WINDOW)
        self._longer: deque[float] = deque(maxlen=ETA_WINDOW)

    def add(self, seconds: float, images_per_s: float) -> None:
        self._recent.append((seconds, images_per_s * seconds))
        self._longer.append(seconds)

    @property
    def seconds(self) -> float:
        """Mean over the last iterations; 0 before the first."""
        return sum(s for s, _ in self._recent) / max(len(self._recent), 1)

    @property
    def images_per_s(self) -> float:
        seconds = sum(s for s, _ in self._recent)
        return sum(images for _, images in self._recent) / seconds if seconds else 0.0

    def left(self, done: int) -> str:
        """Time until the last iteration; '?' before the first."""
        if not self._longer:
            return "?"
        mean = sum(self._longer) / len(self._longer)
        return duration((self._iterations - done) * mean)


class Curve:
    """A metric since the start of the run, in constant memory: means of equally many values."""

    def __init__(self) -> None:
        self.first = self.last = float("nan")
        self.moved = False
        """Whether a value was not 0."""
        self._means: list[float] = []
        self._each, self._open, self._count = 1, 0.0, 0

    def add(self, value: float) -> None:
        value = value if abs(value) > NOTHING else 0.0
        self.moved = self.moved or bool(value)
        if not self._means and not self._count:
            self.first = value
        self.last = value
        self._open, self._count = self._open + value, self._count + 1
        if self._count == self._each:
            self._means.append(self._open / self._count)
            self._open, self._count = 0.0, 0
        if len(self._means) == 2 * POINTS:
            pairs = zip(self._means[::2], self._means[1::2])
            self._means = [(a + b) / 2 for a, b in pairs]
            self._each *= 2

    def drawn(self, width: int) -> str:
        """A line of block characters, the newest at the right."""
        shown = self._means[-width:]
        low, high = min(shown, default=0.0), max(shown, default=0.0)
        if high <= low:
            return LEVELS[0] * len(shown)
        scale = (len(LEVELS) - 1) / (high - low)
        return "".join(LEVELS[round((value - low) * scale)] for value in shown)


class LiveTable:
    """What a terminal shows of a run; drawn for the terminal's size of the moment."""

    def __init__(self, iterations: int, pace: Pace) -> None:
        self._iterations, self._pace = iterations, pace
        self._begun = time.monotonic()
        self._done = 0
        self._curves: dict[str, Curve] = {}
        self.shares: Sequence[RoleUse] = ()
        self._evaluation = ""
        self.warnings = 0

    def begin(self, done: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show `done` iterations, with the metrics of earlier starts of the run."""
        self._done, self._curves = done, {}
        for row in rows:
            self._add(row)

    def add(self, metrics: Mapping[str, Any]) -> None:
        self._done = metrics["iteration"]
        self._add(metrics)

    def evaluated(self, step: int, figures: str) -> None:
        self._evaluation = f"evaluation after {step}: {figures}"

    def _add(self, row: Mapping[str, Any]) -> None:
        further = further_fids(row).values()
        for key, value in row.items():
            reward = key.startswith(REWARD) and not is_loo_fid(key.removeprefix(REWARD))
            known = reward or key in ROWS or key in further
            if known and isinstance(value, int | float) and abs(value) < float("inf"):
                self._curves.setdefault(key, Curve()).add(value)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, plain = options.max_width, options.ascii_only
        lines = self._progress(width, plain)
        if options.size.height >= SMALLEST:
            lines += [*self._metrics(width, plain), *self._notes()]
        yield Text("\n".join(lines), no_wrap=True, overflow="ellipsis")

    def _progress(self, width: int, plain: bool) -> list[str]:
        """Iterations, a bar where there is room, and time; below, the pace."""
        share = min(self._done / max(self._iterations, 1), 1.0)
        head = [f"iteration {self._done}/{self._iterations}", f"{share:.0%}"]
        head.append(f"{self._pace.left(self._done)} left")
        room = width - sum(len(part) + 2 for part in head)
        if room >= SHORTEST_BAR:
            full, empty = ("#", "-") if plain else ("█", "░")
            filled = round(share * room)
            head.insert(1, full * filled + empty * (room - filled))
        pace = []
        if seconds := self._pace.seconds:
            pace += [f"{seconds:.3g} s/iteration", f"{self._pace.images_per_s:.3g} images/s"]
        pace.append(f"{duration(time.monotonic() - self._begun)} so far")
        if self.warnings:
            pace.append(f"{self.warnings} warning{'s' * (self.warnings > 1)}")
        return ["  ".join(head), "  ".join(pace)]

    def _metrics(self, width: int, plain: bool) -> list[str]:
        """A line a metric; one that has been 0 so far has none."""
        if not self._curves:
            return []
        with_start, with_curve = width >= WITH_START, width >= WITH_CURVE and not plain
        lines = ["", f"{'':{NAME}}{'now':>{FIGURE}}"]
        if with_start:
            lines[1] += f"{'start':>{FIGURE}}{'change':>{FIGURE}}"
        if with_curve:
            lines[1] += "  since the start"
        spaces = {key: f"FID, {space}" for space, key in further_fids(self._curves).items()}
        names = {key: key.removeprefix(REWARD) for key in sorted(self._curves)}
        rewards = [key for key in names if key not in ROWS and key not in spaces]
        names |= spaces | ROWS
        for key in [*rewards, *spaces, *(key for key in ROWS if key in self._curves)]:
            curve, name = self._curves[key], names[key]
            if not curve.moved and key in ROWS:
                continue
            line = f"{name[: NAME - 1]:{NAME}}{curve.last:>{FIGURE}.4g}"
            if with_start:
                line += f"{curve.first:>{FIGURE}.4g}{curve.last - curve.first:>+{FIGURE}.3g}"
            if with_curve:
                line += f"  {curve.drawn(width - NAME - 3 * FIGURE - 2)}"
            lines.append(line)
        return lines

    def _notes(self) -> list[str]:
        idle = [f"{use.role.removesuffix('-server')} {use.idle:.0%}" for use in self.shares]
        notes = [f"idle: {'  '.join(idle)}"] if idle else []
        return ["", *(note for note in (*notes, self._evaluation) if note)]


def duration(seconds: float) -> str:
    """3725 -> '1:02:05'; with days from one on."""
    return str(timedelta(seconds=round(seconds)))
