"""The figure of a part: every policy and seed, in several metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cluster.io.files import replacing, writing
from learner.miniature.study.names import BASE
from learner.miniature.study.statistics import mean
from learner.miniature.study.tables import COMPARED, View, with_arrow
from rewards.metrics.figures import better

SHOWN = (*(metric for metric in COMPARED if metric != "clip/coverage"), "clip", "entropy")
COLUMNS = 4
HEIGHT, WIDTH = 0.19, 2.6  # inches, of a policy's row and of a panel


def draw(view: View, path: Path) -> None:
    """Points are seeds; diamonds, means with 95 % intervals. The base policy is grey, and FIDs have
    a logarithmic axis."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    metrics = [view.name(metric) for metric in SHOWN]
    metrics = [metric for metric in metrics if metric in view.results.metrics(BASE)]
    policies = view.policies
    rows = -(-len(metrics) // COLUMNS)
    size = (WIDTH * COLUMNS + 1.6, rows * (0.5 + HEIGHT * len(policies)))
    figure = Figure(figsize=size, layout="constrained")
    for index, metric in enumerate(metrics):
        axes = figure.add_subplot(rows, COLUMNS, index + 1)
        for row, policy in enumerate(policies):
            values = view.values(policy, metric)
            color = "tab:gray" if policy in view.part.base else "tab:blue"
            axes.plot(values, np.full(len(values), row), "o", color=color, alpha=0.35, ms=3)
            found = mean(values)
            axes.errorbar(found.value, row, xerr=found.half, fmt="D", color="black", ms=3, lw=1)
        axes.set_title(with_arrow(metric), fontsize=8)
        axes.set_yticks(
            range(len(policies)), policies if index % COLUMNS == 0 else [""] * len(policies)
        )
        if better(metric) == "lower":  # instance rewards alone may have twenty times the others'
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(labelsize=7)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    with writing(path, then="start again"), replacing(path) as partial:
        figure.savefig(partial, dpi=80, format="png")
