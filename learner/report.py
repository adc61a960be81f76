"""The report of a run: `report.html` with table, galleries, curves and configuration."""

from __future__ import annotations

import base64
import importlib.resources
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from learner.config import RunConfig, dump
from learner.metrics import read_metrics
from learner.progress import COLUMNS
from learner.rundir import BEFORE_AFTER, RunDirectory

PANELS: dict[str, dict[str, str]] = {
    "rewards (mean score)": {"CLIP": "reward/clip", "preference": "reward/hps"},
    "FID in the reward's features": {"moving average": "fid/ema", "batch": "fid/batch"},
    "policy entropy (nats)": {"entropy": "policy/entropy"},
    "gradient norm": {"gradient norm": "loss/grad_norm"},
}


def write_report(
    run: RunDirectory, config: RunConfig, rows: Mapping[str, Mapping[str, float]]
) -> None:
    """Write `report.html` from the run's files and the exam's rows."""
    template = importlib.resources.files("learner").joinpath("templates", "report.html")
    environment = jinja2.Environment(autoescape=True)
    page = environment.from_string(template.read_text()).render(
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
    run.report.write_text(page)


def _encoded(path: Path) -> str:
    """A file as base64: the page then can be moved alone."""
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else ""


def curves(metrics: list[dict[str, Any]]) -> bytes:
    """The main figures over the iterations, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(2, 2).flat, PANELS.items()):
        for label, key in lines.items():
            axes.plot([row["iteration"] for row in metrics], [row[key] for row in metrics])
            axes.lines[-1].set_label(label)
        axes.set_title(title)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
