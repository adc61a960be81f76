"""The report of a run: `report.html` with table, galleries, curves and configuration."""

from __future__ import annotations

import base64
import importlib.resources
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from cluster.io.run_layout import BEFORE_AFTER
from cluster.io.strict_json import number
from cluster.program.streams import printable
from learner.config import RunConfig, dump
from learner.monitoring.console import COLUMNS
from learner.monitoring.metrics import QUANTILES, read_metrics
from learner.runs.run_dir import RunDirectory
from rewards.config import LOO_FID

REWARDS = "rewards of images (mean, 5th to 95th percentile)"
PANELS: dict[str, dict[str, str]] = {
    REWARDS: {},
    "FID in the reward's features": {"moving average": "fid/ema", "batch": "fid/batch"},
    "policy entropy (nats)": {"entropy": "policy/entropy"},
    "gradient norm": {"gradient norm": "loss/grad_norm"},
}
PANEL_COLUMNS = 2


def write_report(
    run: RunDirectory, config: RunConfig, rows: Mapping[str, Mapping[str, float]]
) -> None:
    """Write `report.html`.

    Args:
        rows: table of evaluations.
    """
    run.check_owned()
    template = importlib.resources.files("learner").joinpath("templates", "report.html")
    environment = jinja2.Environment(autoescape=True)
    page = environment.from_string(template.read_text(encoding="utf-8")).render(
        name=run.path.name,
        iterations=config.iterations,
        groups=config.groups_per_iteration,
        rollouts=config.rollouts_per_group,
        seed=config.seed,
        rows=rows,
        columns=COLUMNS,
        plot=base64.b64encode(curves(read_metrics(run.metrics))).decode(),
        gallery=_encoded(run.gallery / BEFORE_AFTER),
        config=dump(config),
    )
    run.report.write_text(printable(page), encoding="utf-8")


def image_rewards(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the instance rewards."""
    keys = dict.fromkeys(key for row in metrics for key in row)
    names = [key.removeprefix("reward/") for key in keys if key.startswith("reward/")]
    return [name for name in names if name != LOO_FID]


def column(metrics: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Values of a metric; NaN if not measured, or not finite."""
    return [number(row.get(key)) for row in metrics]


def _encoded(path: Path) -> str:
    """A file as base64, so that the page needs no other file."""
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else ""


def curves(metrics: list[dict[str, Any]]) -> bytes:
    """The curves of `PANELS`, as a PNG."""
    from matplotlib.figure import Figure

    steps = [row["iteration"] for row in metrics]
    panels = {**PANELS, REWARDS: {name: f"reward/{name}" for name in image_rewards(metrics)}}
    rows = math.ceil(len(panels) / PANEL_COLUMNS)
    figure = Figure(figsize=(5 * PANEL_COLUMNS, 3 * rows), layout="constrained")
    for place, (title, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, PANEL_COLUMNS, place)
        for label, key in lines.items():
            axes.plot(steps, column(metrics, key), label=label)
            low, high = (key.replace("/", f"_{part}/", 1) for part in QUANTILES)
            if any(low in row for row in metrics):
                band = column(metrics, low), column(metrics, high)
                axes.fill_between(steps, *band, color=axes.lines[-1].get_color(), alpha=0.15)
        axes.set_title(title)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
