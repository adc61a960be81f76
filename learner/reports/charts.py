"""Line charts as Plotly figures: plain data, with colours as names of the page's style.

"var(--c1)" and "var(--c1, .2)" (with an opacity) stand for colours of the stylesheet, which differ
between light and dark; the page's script puts them in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.program.streams import printable

COLOURS = 6
"""Series colours of the stylesheet, --c1 to --c6."""
DASHES = ("solid", "dash", "dot")
"""Of series 1 to 6, 7 to 12, 13 to 18."""
MOST_POINTS = 500
"""Of a curve; a longer run's are averaged over neighbouring iterations."""
HEIGHT = 210  # pixels
LABEL_GAP = 13  # pixels between two labels of lines
LETTERS = 18  # of a label
Figure = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One curve."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 1
    """Number of a series colour, from 1."""
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    """Edges of a band around it."""
    markers: bool = False
    """Draw the points, for few of them."""
    grouped: bool = False
    """Colour and name are explained outside of the chart."""


@dataclass(frozen=True)
class Level:
    """A horizontal line, such as the base policy's value."""

    name: str
    y: float


@dataclass(frozen=True)
class Chart:
    """A chart with its heading and explanation."""

    key: str
    title: str
    unit: str
    note: str
    """What it means, and what to look for."""
    lines: list[Line] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)
    x_title: str = "iteration"

    def figure(self) -> Figure:
        """For `Plotly.newPlot`."""
        lines = [line for line in map(thinned, self.lines) if any(map(math.isfinite, line.y))]
        traces = [trace for line in lines for trace in _traces(line)]
        labels = [] if any(line.grouped for line in lines) else _labels(lines, self.levels)
        shapes = [_level_shape(level) for level in self.levels]
        axis = {"title": {"text": self.x_title, "standoff": 6}, "automargin": True}
        layout = {
            "height": HEIGHT,
            "margin": {"l": 44, "r": 12 + 6 * min(_longest(labels), LETTERS), "t": 8, "b": 34},
            "xaxis": axis,
            "yaxis": {"automargin": True, "nticks": 6},
            "showlegend": False,
            "hovermode": "x unified",
            "annotations": labels,
            "shapes": shapes,
        }
        return {"data": traces, "layout": layout}


def has_values(values: Sequence[float]) -> bool:
    return any(map(math.isfinite, values))


def shown_text(text: object) -> str:
    """A text for Plotly, which reads a part of HTML in names and labels."""
    plain = printable(text).replace("&", "&amp;")
    return plain.replace("<", "&lt;").replace(">", "&gt;")


def rounded(values: Sequence[float]) -> list[float | None]:
    """Five significant digits; None (a gap) where not finite."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


def thinned(line: Line, most: int = MOST_POINTS) -> Line:
    """A line of at most `most` points, each the mean of equally many neighbours."""
    step = -(-len(line.x) // most)
    if step <= 1:
        return line
    parts = (line.x, line.y, line.low, line.high)
    x, y, low, high = (None if part is None else _means(part, step) for part in parts)
    assert x is not None
    assert y is not None
    return Line(line.name, x, y, line.colour, low, high, line.markers, line.grouped)


def points_per_mean(count: int, most: int = MOST_POINTS) -> int:
    """How many iterations a point of a curve is the mean of."""
    return max(-(-count // most), 1)


def _means(values: Sequence[float], step: int) -> list[float]:
    array = np.asarray(values, np.float64)
    padded = np.full(-(-len(array) // step) * step, np.nan)
    padded[: len(array)] = array
    parts = padded.reshape(-1, step)
    counts = np.isfinite(parts).sum(1)
    sums = np.where(np.isfinite(parts), parts, 0.0).sum(1)
    means: list[float] = np.where(counts, sums / np.maximum(counts, 1), np.nan).tolist()
    return means


def _traces(line: Line) -> list[dict[str, Any]]:
    colour = f"--c{(line.colour - 1) % COLOURS + 1}"
    dash = DASHES[(line.colour - 1) // COLOURS % len(DASHES)]
    x, name = rounded(line.x), shown_text(line.name)
    found: list[dict[str, Any]] = []
    if line.low is not None and line.high is not None:
        edge = {"x": x, "type": "scatter", "mode": "lines", "line": {"width": 0},
                "hoverinfo": "skip", "name": name}  # fmt: skip
        found.append(edge | {"y": rounded(line.low)})
        fill = {"fill": "tonexty", "fillcolor": f"var({colour}, .16)"}
        found.append(edge | fill | {"y": rounded(line.high)})
    stroke = {"color": f"var({colour})", "width": 2, "dash": dash}
    mode = "lines+markers" if line.markers or len(line.x) < 2 else "lines"
    found.append(
        {"x": x, "y": rounded(line.y), "type": "scatter", "mode": mode, "name": name,
         "line": stroke, "marker": {"size": 6, "color": f"var({colour})"},
         "hovertemplate": "%{y:.4g}<extra>" + name + "</extra>"}
    )  # fmt: skip
    return found


def _level_shape(level: Level) -> dict[str, Any]:
    line = {"color": "var(--muted)", "width": 1.2, "dash": "4px,3px"}
    ends = {"xref": "paper", "x0": 0, "x1": 1, "y0": level.y, "y1": level.y}
    return {"type": "line", "line": line, **ends}


def _labels(lines: Sequence[Line], levels: Sequence[Level]) -> list[dict[str, Any]]:
    """Names at the right end of lines, moved apart where they would overlap; none for a single
    line, which the chart's title names."""
    named = [(level.name, level.y, "var(--muted)") for level in levels]
    if len(lines) + len(levels) > 1:
        for line in lines:
            last = next((value for value in reversed(line.y) if math.isfinite(value)), math.nan)
            colour = f"var(--c{(line.colour - 1) % COLOURS + 1})"
            named.append((line.name, last, colour))
    named = sorted((each for each in named if math.isfinite(each[1])), key=lambda each: each[1])
    values = [v for line in lines for v in (*line.y, *(line.low or ()), *(line.high or ()))]
    finite = [v for v in (*values, *(level.y for level in levels)) if math.isfinite(v)]
    span = (max(finite) - min(finite)) if finite else 0.0
    pixels = [(y - min(finite)) / span * (HEIGHT - 60) if span else 0.0 for _, y, _ in named]
    return [
        {"text": shown_text(shortened(name)), "x": 1, "xref": "paper", "xanchor": "left",
         "xshift": 4, "y": y, "yshift": round(shift, 1), "showarrow": False,
         "font": {"color": colour, "size": 11}}
        for (name, y, colour), shift in zip(named, spread(pixels))
    ]  # fmt: skip


def spread(places: Sequence[float], gap: float = LABEL_GAP) -> list[float]:
    """Shifts that move ascending places at least `gap` apart, about where they are."""
    moved = list(places)
    for _ in range(20):
        for at in range(1, len(moved)):
            lack = gap - (moved[at] - moved[at - 1])
            if lack > 0:
                moved[at - 1] -= lack / 2
                moved[at] += lack / 2
    return [new - old for new, old in zip(moved, places)]


def shortened(text: str, most: int = LETTERS) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _longest(labels: Sequence[dict[str, Any]]) -> int:
    return max((len(label["text"]) for label in labels), default=0)
